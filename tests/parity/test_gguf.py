"""GGUF files that we write, opened by llama.cpp: the same tokens, log-probabilities and chat template."""

import dataclasses
import json
import math
import urllib.request

import jax
import numpy as np
import pytest

xllamacpp = pytest.importorskip("xllamacpp")

from common.errors import UserError  # noqa: E402
from data.text import formats  # noqa: E402
from data.text import gguf_write as words  # noqa: E402
from infer.models import load  # noqa: E402
from model.io import gguf_write  # noqa: E402
from tests.helpers.models import CONFIGS, random_model  # noqa: E402
from tests.parity import test_torture  # noqa: E402

pytestmark = pytest.mark.parity
TEXT = "The sea covers 71 % of the Earth; its tides follow the Moon."


def served(path):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.cpuparams.n_threads = str(path), 64, 1
    return xllamacpp.Server(params)


@pytest.fixture(scope="module")
def tokenizer():
    try:
        return formats.load("smollm2-135m-instruct")
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["llama 3", "gpt-2", "deepseek 3", "smollm", "gemma"])
def test_ids(name, tmp_path):
    """Not those of Qwen 2, whose NFC llama.cpp leaves out, nor Llama's behind a first space: it adds one."""
    made = formats.load(test_torture.FOLDERS[name](tmp_path))
    model, params = random_model(dataclasses.replace(CONFIGS["llama"], windows=(), vocab_size=made.vocab_size))
    gguf_write.write(tmp_path / "m.gguf", model, params, words.metadata(made, made.vocab_size), "F32")
    ours, server = formats.load(tmp_path / "m.gguf"), served(tmp_path / "m.gguf")
    for line in filter(None, test_torture.LINES[::12]):
        for special in (False, True):
            asked = json.dumps({"content": line, "add_special": False, "parse_special": special}).encode()
            request = urllib.request.Request(f"{server.listening_address}/tokenize", asked)
            with urllib.request.urlopen(request) as answer:
                assert json.load(answer)["tokens"] == ours.encode(line, special), line


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("name", ["llama", "llama3", "yarn", "qwen2", "qwen3", "gpt2"])
def test_greedy_tokens_and_logprobs(name, kind, tokenizer, tmp_path):
    config = dataclasses.replace(CONFIGS[name], windows=(), vocab_size=tokenizer.vocab_size)
    model, params = random_model(config)
    path = tmp_path / "m.gguf"
    gguf_write.write(path, model, params, words.metadata(tokenizer, config.vocab_size), kind)
    ours = load(path)
    ids = tokenizer.encode(TEXT)
    assert ours.encode(TEXT) == ids
    server = served(path)
    request = {"prompt": ids, "temperature": 0.0, "ignore_eos": True, "max_tokens": 1, "logprobs": 5}
    told = server.handle_completions(request)["choices"][0]["logprobs"]["content"][0]
    logits = np.asarray(ours.logits(np.asarray(ids)))[-1]
    logps = np.asarray(jax.nn.log_softmax(logits))
    assert int(logits.argmax()) == told["id"]
    tolerance = 5e-3 if kind == "F32" else 0.15  # its cache has 16 bits; of quantized weights it rounds inputs too
    for top in told["top_logprobs"]:
        assert math.isclose(logps[top["id"]], top["logprob"], abs_tol=tolerance), (top, logps[top["id"]])
