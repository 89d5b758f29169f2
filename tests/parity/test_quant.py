"""Rounding against torch's own: its 8-bit float types, and its fake quantization with its straight-through gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from model import weights  # noqa: E402  # noqa: E402
from model.quant import _matrix, qat  # noqa: E402  # noqa: E402
from tests.helpers.models import rand  # noqa: E402

pytestmark = pytest.mark.parity
TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@pytest.mark.parametrize("name", TYPES)
def test_floats_of_8_bits(name):
    _, *bits = _matrix.FLOATS[name]
    v = np.array(rand(4096) * 10.0 ** jnp.arange(-6, 2).repeat(512))
    theirs = torch.from_numpy(v).to(TYPES[name]).float().numpy()
    np.testing.assert_array_equal(_matrix.round_float(jnp.asarray(v), *bits), theirs)


def test_fake_quantization_and_its_gradient():
    """int8, one scale an output channel: y = x Q(W), and d sum(sin y) by x and by W."""
    w, x = np.array(rand(64, 6)), np.array(rand(2, 3, 64, seed=1))
    leaf = qat.FakeQuant(jnp.asarray(w), "BTD,DF->BTF", "int8", (), 0)
    product = lambda x, leaf: jnp.sin(weights.einsum("BTD,DF->BTF", x, leaf)).sum()
    by_x, by_w = jax.grad(product, (0, 1))(jnp.asarray(x), leaf)
    scale = torch.from_numpy(np.float32(leaf.convert().scale[0]))
    tw, tx = torch.from_numpy(w).requires_grad_(), torch.from_numpy(x).requires_grad_()
    fake = torch.fake_quantize_per_channel_affine(tw, scale, torch.zeros(6, dtype=torch.int32), 1, -128, 127)
    y = torch.sin(tx @ fake).sum()
    y.backward()
    np.testing.assert_allclose(product(jnp.asarray(x), leaf), y.item(), rtol=1e-5)
    np.testing.assert_allclose(by_x, tx.grad, atol=1e-5)
    inside = np.abs(w) <= 127.5 * scale.numpy()  # torch stops the gradient where a scale rounded down clips
    np.testing.assert_allclose(np.where(inside, by_w.w, 0), tw.grad, atol=1e-5)
