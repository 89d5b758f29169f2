"""The folders of tests/test_checkpoints_in.py as transformers opens them: the same logits."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from common.seen import Seen  # noqa: E402
from model.io import hf  # noqa: E402
from model.io.pretrained import families, family, open_pretrained  # noqa: E402
from model.net.transformer import Transformer  # noqa: E402
from tests.parity.test_families import close  # noqa: E402
from tests.test_checkpoints_in import CASES, made  # noqa: E402

pytestmark = pytest.mark.parity
# transformers needs bitsandbytes, an index or its own class of multimodal models for these.
ELSEWHERE = {
    "mrope",
    "bitsandbytes in the config only", "parts without an index", "no model_type", "saved by torch.compile", "llava",
    "qwen2-vl", "smolvlm",
}  # fmt: skip


CONFIGS = {
    "llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig, "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config, "gpt2": transformers.GPT2Config,
    "recurrent_gemma": transformers.RecurrentGemmaConfig, "bert": transformers.BertConfig,
}  # fmt: skip


@pytest.mark.parametrize("name", families())
def test_every_field_of_a_config_is_read_or_known(name):
    read = Seen(CONFIGS[name]().to_dict())
    family(name).config(read)
    assert not read.keys() - read.used - hf.IRRELEVANT


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if not case.error and n not in ELSEWHERE])
def test_logits(name, tmp_path):
    made(CASES[name], tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="float32").eval()
    opened = open_pretrained(tmp_path / "m")
    model = Transformer(opened.config)
    tokens = np.random.default_rng(0).integers(0, 48, (2, 40))
    close(model(opened.load(model.specs), tokens), theirs(torch.from_numpy(tokens)).logits, 1e-4, name)
