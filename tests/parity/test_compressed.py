"""Exports of quantized models, opened by transformers with the compressed-tensors library itself."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from data.text import formats  # noqa: E402
from model import weights  # noqa: E402
from model.io import export  # noqa: E402
from model.quant import fp8, int4, int8  # noqa: E402  # noqa: E402
from tests.helpers.models import CONFIGS, random_model  # noqa: E402

pytestmark = pytest.mark.parity
MAKES = {
    "int4": int4.make(group=16),
    "int8": int8.make(),
    "w8a8": int8.make(activations=True),
    "fp8": fp8.make(),
    "fp8 of a tensor": fp8.make(scale="tensor"),
    "a part": int4.make(group=16, where=".*/(mlp/.*|wo)"),
}


def both(make, family, folder):
    """(our logits; ours with float activations; a function for theirs of what was exported; their model)."""
    model, params = random_model(CONFIGS[family])
    params["embed"]["table"] *= 3
    small = make(params, model.specs, None)
    export.export_hf(model, small, formats.load("bytes"), folder)
    tokens = np.random.default_rng(1).integers(0, 272, (2, 24))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    run = torch.no_grad()(lambda: theirs(torch.from_numpy(tokens)).logits.numpy())
    plain = jax.jit(model)(weights.dense(small, model.specs), tokens)
    return np.asarray(jax.jit(model)(small, tokens)), np.asarray(plain), run, theirs


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_are_ours(name, family, tmp_path):
    """Weights to 1e-4. Of activations the library spreads a token over -128 .. 127, we and vLLM over -127 .. 127: two
    roundings of the same values, sqrt(2) of one apart."""
    ours, plain, run, theirs = both(MAKES[name], family, tmp_path / "out")
    got = run()
    if name == "w8a8":
        one, two = (np.sqrt(np.square(x).mean()) for x in (ours - plain, ours - got))
        assert 0 < two < 1.6 * one
        for module in theirs.modules():
            module.quantization_enabled = False
        ours, got = plain, run()
    assert np.abs(ours - got).max() <= 1e-4 * np.abs(ours).max()


def test_several_formats_in_a_model(tmp_path):
    attn, mlp = int8.make(where=".*/attn/.*"), int4.make(group=16, where=".*/mlp/.*")
    mixed = lambda params, specs, key: attn(mlp(params, specs, key), specs, key)
    ours, _, run, theirs = both(mixed, "llama", tmp_path / "out")
    assert np.abs(ours - run()).max() <= 1e-4 * np.abs(ours).max()
    layer = theirs.model.layers[0]
    bits = [m.quantization_scheme.weights.num_bits for m in (layer.self_attn.q_proj, layer.mlp.up_proj)]
    assert bits == [8, 4]
