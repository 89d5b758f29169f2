"""The leaf contract: what every Weight keeps, crossed with every equation that a model uses."""

import functools
import importlib
import pkgutil
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model.peft
from common.errors import UserError
from model import weights
from model.net.transformer import Transformer
from model.peft import lora
from model.weights import Spec
from tests.helpers.models import BESIDE, METHODS, activation, everywhere, rand, tiny

EQNS = {
    "BTD,DNH->BTNH": (8, 2, 3),
    "BTNH,NHD->BTD": (2, 3, 8),
    "BTD,DF->BTF": (8, 6),
    "BTD,VD->BTV": (11, 8),
    "BTED,EDF->BTEF": (4, 8, 6),
}
QUANTISERS = [m.name for m in pkgutil.iter_modules([str(Path(model.__path__[0]) / "quant")]) if m.name[0] != "_"]
VIRTUAL = ("prefix", "prompt")  # they change the model from the start


@functools.cache
def start() -> tuple:
    """A tiny model and its parameters."""
    model = tiny()
    return model, jax.jit(model.init)(jax.random.key(0))


@pytest.mark.parametrize("eqn", EQNS)
def test_einsum_and_its_gradients_equal_numpy(eqn):
    w = rand(*EQNS[eqn])
    x = activation(eqn, w.shape)
    want = np.einsum(eqn, np.float64(x), np.float64(w))
    np.testing.assert_allclose(weights.einsum(eqn, x, w), want, atol=1e-5)
    ours = jax.grad(lambda x, w: jnp.sin(weights.einsum(eqn, x, w)).sum(), (0, 1))(x, w)
    plain = jax.grad(lambda x, w: jnp.sin(jnp.einsum(eqn, x, w)).sum(), (0, 1))(x, w)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("eqn", EQNS)
def test_lora_equals_its_dense_matrix(eqn):
    w = rand(*EQNS[eqn])
    names = tuple(weights.AXES[c] for c in weights.operands(eqn)[1])
    spec = Spec(jax.ShapeDtypeStruct(w.shape, w.dtype), names, eqn=eqn)
    leaf = lora.make(rank=2, alpha=6.0, where=".*")({"w": w}, {"w": spec}, jax.random.key(0))["w"]
    leaf = leaf.replace(b=rand(*leaf.b.shape, seed=3))
    x = activation(eqn, w.shape)
    np.testing.assert_allclose(
        weights.einsum(eqn, x, leaf), weights.einsum(eqn, x, leaf.dense(spec)), atol=2e-4, rtol=2e-5
    )


def test_lora_by_hand():
    """x = [1, 2], W = identity, A = [1, 1]^T, B = [3, 0], scale 2: y = x + 2 * (1 + 2) * [3, 0] = [19, 2]."""
    leaf = lora.LoRA(jnp.eye(2), jnp.ones((2, 1)), jnp.array([[3.0, 0.0]]), "BTD,DF->BTF", 2.0)
    y = weights.einsum("BTD,DF->BTF", jnp.array([[[1.0, 2.0]]]), leaf)
    np.testing.assert_array_equal(y[0, 0], [19.0, 2.0])


@pytest.mark.parametrize("method", METHODS)
class TestMethods:
    """Every file in model/peft, by existing. Scanned layers, tied embedding, every multiplied parameter wrapped."""

    def adapted(self, method, noise=0.0):
        model, params = start()
        adapted = everywhere(method)(params, model.specs, jax.random.key(1))
        train, frozen = weights.partition(adapted, weights.trainable(adapted, "adapters"))
        train = jax.tree.map(lambda x: x + noise * rand(*x.shape, seed=7), train)
        return model, params, weights.combine(train, frozen)

    def test_starts_as_the_base_bit_for_bit(self, method):
        model, params, adapted = self.adapted(method)
        tokens = jax.random.randint(jax.random.key(2), (2, 12), 0, 512)
        if method in VIRTUAL:
            assert not np.allclose(jax.jit(model)(params, tokens), jax.jit(model)(adapted, tokens), atol=1e-4)
            return
        np.testing.assert_array_equal(jax.jit(model)(params, tokens), jax.jit(model)(adapted, tokens))

    def test_merged_equals_unmerged(self, method):
        model, _, adapted = self.adapted(method, noise=0.05)
        tokens = jax.random.randint(jax.random.key(2), (2, 12), 0, 512)
        if method in BESIDE:
            with pytest.raises(UserError, match="cannot be merged"):
                weights.dense(adapted, model.specs)
            return
        merged = weights.dense(adapted, model.specs)
        assert not any(map(weights.is_weight, jax.tree.leaves(merged, is_leaf=weights.is_weight)))
        np.testing.assert_allclose(jax.jit(model)(merged, tokens), jax.jit(model)(adapted, tokens), atol=1e-4)

    def test_base_is_what_was_wrapped(self, method):
        _, params, adapted = self.adapted(method, noise=0.05)
        jax.tree.map(np.testing.assert_array_equal, weights.base(adapted), params)

    def test_partition_and_combine_are_inverse(self, method):
        _, _, adapted = self.adapted(method, noise=0.05)
        again = weights.combine(*weights.partition(adapted, weights.trainable(adapted, "adapters")))
        assert jax.tree.structure(again) == jax.tree.structure(adapted)
        jax.tree.map(np.testing.assert_array_equal, again, adapted)

    def test_axes_name_every_array(self, method):
        model, _, adapted = self.adapted(method)
        named = weights.axes(adapted, model.specs)
        jax.tree.map(lambda x, names: np.testing.assert_equal(len(names), x.ndim), adapted, named)


@flax.struct.dataclass
class Rounded(weights.Weight):
    """A stand-in for a quantized leaf: nothing but what a Weight must have."""

    values: jax.Array

    def einsum(self, eqn, x):
        return jnp.einsum(eqn, x, self.values.astype(x.dtype))

    def take(self, ids, dtype):
        return self.values[ids].astype(dtype)

    def dense(self, spec):
        return self.values.astype(spec.value.dtype)

    def axes(self, spec):
        return self.replace(values=spec.names)


def rounded():
    return lambda params, specs, key: weights.replace(
        params, specs, lambda _, w, spec: Rounded(w.astype(jnp.bfloat16)) if spec.eqn else w
    )


OVER = [(method, quant) for method in METHODS if method not in BESIDE for quant in ("rounded", *QUANTISERS)]


def quick(method, quant):
    """Pairs that run in `make test`; the other pairs are left to `make slow`."""
    return method == "lora" or quant == "nf4"


@pytest.mark.parametrize(
    "method, quant", [pair if quick(*pair) else pytest.param(*pair, marks=pytest.mark.slow) for pair in OVER]
)
def test_methods_over_quantized_bases(method, quant):
    """A leaf starts as its quantized base, which stays as it is; once moved, all of the adapter has a gradient."""
    model, params = start()
    make = rounded if quant == "rounded" else importlib.import_module(f"model.quant.{quant}").make
    base = make()(params, model.specs, jax.random.key(1))
    adapted = everywhere(method)(base, model.specs, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, weights.base(adapted), base)
    named = weights.axes(adapted, model.specs)
    jax.tree.map(lambda x, names: np.testing.assert_equal(len(names), x.ndim), adapted, named)
    for at, name in (("attn", "wq"), ("mlp", "down")):
        eqn = model.specs["layers"][at][name].eqn
        leaf, under = (jax.tree.map(lambda x: x[0], p["layers"][at][name]) for p in (adapted, base))
        x = activation(eqn, model.specs["layers"][at][name].shape[1:])
        np.testing.assert_allclose(weights.einsum(eqn, x, leaf), weights.einsum(eqn, x, under), atol=1e-5)
        train, frozen = weights.partition(leaf, weights.trainable({"w": leaf}, "adapters")["w"])
        moved = jax.tree.map(lambda x: x + 0.05 * rand(*x.shape, seed=7), train)
        loss = lambda t: jnp.square(weights.einsum(eqn, x, weights.combine(t, frozen))).sum()  # noqa: B023
        grads = jax.grad(loss)(moved)
        assert all(bool(jnp.isfinite(g).all()) and float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def test_trainable_by_regex_and_by_role():
    model = tiny()
    params = model.abstract
    mask = weights.trainable(params, r"layers/attn/w[qv]")
    assert mask["layers"]["attn"]["wq"] and not mask["layers"]["attn"]["wk"] and not mask["embed"]["table"]
    with pytest.raises(ValueError, match="selects no parameter"):
        weights.trainable(params, "adapters")
    with pytest.raises(ValueError, match="matches no"):
        lora.make(where="nothing")(params, model.specs, jax.random.key(0))


def test_adapter_bytes_are_adapter_bytes():
    """Rank 4 on wq of 2 layers: A 2 x 64 x 4, B 2 x 4 x (4 x 16), in float32."""
    model = tiny()
    params = jax.eval_shape(
        lambda p: lora.make(rank=4, where="layers/attn/wq")(p, model.specs, jax.random.key(0)), model.abstract
    )
    train, _ = weights.partition(params, weights.trainable(params, "adapters"))
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(train)) == 4 * (2 * 64 * 4 + 2 * 4 * 64)


def test_frozen_weights_cost_no_gradient():
    """FLOPs of the compiled step, layers unrolled, since the compiler counts a scanned body once.

    Without remat: 6 N full; 4 N plus the adapters under LoRA.
    """
    from train.cost import cost

    model = Transformer(tiny().config, remat="none")
    tokens = jnp.zeros((4, 64), jnp.int32)

    def flops(params, what):
        from model.net.transformer import unstack

        mask = weights.trainable(params, what)
        price = cost(model.config, params, model.specs, mask, 64)
        train, frozen = weights.partition(params, mask)

        def loss(train, frozen):
            whole = unstack(weights.combine(train, frozen), model.config)
            return model.logits(whole, model.hidden(whole, tokens)[0]).mean()

        compiled = jax.jit(jax.grad(loss)).lower(train, frozen).compile()
        return compiled.cost_analysis()["flops"], price.step(tokens.size, tokens.size)

    params = model.init(jax.random.key(0))
    adapted = lora.make(rank=4)(params, model.specs, jax.random.key(1))
    full, full_equations = flops(params, "all")
    slim, slim_equations = flops(adapted, "adapters")
    assert slim < 0.75 * full
    np.testing.assert_allclose(full_equations, full, rtol=0.1)  # the compiler adds softmax, norms and full attention
    np.testing.assert_allclose(slim_equations, slim, rtol=0.1)
