"""Methods on flax.linen models as their authors wrote them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from examples import linen_lora
from model import linen, weights
from model.peft import dora, ia3, lora


class Model(nn.Module):
    """A tied head, two and one spatial dimensions, groups, a Dense without bias, what no method wraps."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 6, name="table")
        x = nn.LayerNorm()(embed(tokens))
        x = nn.Conv(6, (3,), feature_group_count=2)(x)
        x = nn.Conv(4, (2, 3), strides=2, padding="VALID")(x[..., None])
        x = nn.Dense(6, use_bias=False)(x.mean(2))
        x = x + nn.DenseGeneral((3, 2), name="general")(x).reshape(*x.shape)
        return embed.attend(x)


@pytest.fixture(scope="module")
def plain():
    model, tokens = Model(), jax.random.randint(jax.random.key(1), (2, 8), 0, 11)
    params = model.init(jax.random.key(0), tokens)["params"]
    apply = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))
    return apply, params, linen.specs(apply, params, tokens), tokens


def moved(params):
    train, frozen = weights.partition(params, weights.trainable(params, "adapters"))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), train), frozen


def test_equations_are_those_of_the_modules(plain):
    _, _, specs, _ = plain
    found = {weights.name(p): s.eqn for p, s in jax.tree.leaves_with_path(specs, is_leaf=weights.is_spec) if s.eqn}
    assert found == {
        "table/embedding": "BV,VD->BD", "Conv_0/kernel": "BXD,XDF->BF", "Conv_1/kernel": "BXYD,XYDF->BF",
        "Dense_0/kernel": "BD,DF->BF",
    }  # fmt: skip


@pytest.mark.parametrize("make", [lora.make, dora.make, ia3.make])
def test_starts_as_the_base_and_merged_equals_unmerged(plain, make):
    apply, params, specs, tokens = plain
    run = linen.wrap(apply, specs)
    adapted = make(where=".*")(params, specs, jax.random.key(2))
    np.testing.assert_allclose(run(adapted, tokens), apply(params, tokens), atol=1e-6)
    train, frozen = moved(adapted)
    whole = weights.combine(train, frozen)
    y = run(whole, tokens)
    assert float(jnp.abs(y - apply(params, tokens)).max()) > 0.1
    np.testing.assert_allclose(apply(weights.dense(whole, specs), tokens), y, rtol=1e-6, atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, weights.base(whole), params)
    grads = jax.grad(lambda t: jnp.square(run(weights.combine(t, frozen), tokens)).sum())(train)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    assert len(jax.tree.leaves(grads)) == len(jax.tree.leaves(train)) == 4 * len(train_fields(adapted))


def train_fields(adapted):
    return adapted["Dense_0"]["kernel"].trainable


def test_a_dense_makes_no_copy_of_its_kernel():
    """Rank 1 on 64 x 32: no value that the program computes has the shape of A B."""
    model, x = nn.Dense(32), jnp.ones((3, 64))
    params = model.init(jax.random.key(0), x)["params"]
    apply = lambda params, x: model.apply({"params": params}, x)
    specs = linen.specs(apply, params, x)
    adapted = lora.make(rank=1, where=".*")(params, specs, jax.random.key(1))
    shapes = lambda run, p: [v.aval.shape for eqn in jax.make_jaxpr(run)(p, x).eqns for v in eqn.outvars]
    assert (64, 32) not in shapes(linen.wrap(apply, specs), adapted)
    assert (64, 32) in shapes(lambda p, x: apply(weights.dense(p, specs), x), adapted)


def test_batch_shapes_and_types_are_those_of_linen():
    model, x = nn.Dense(5, dtype=jnp.bfloat16), jnp.ones((2, 3, 4))
    params = model.init(jax.random.key(0), x)["params"]
    apply = lambda params, x: model.apply({"params": params}, x)
    specs = linen.specs(apply, params, x)
    adapted = lora.make(rank=1, where=".*")(params, specs, jax.random.key(1))
    for inputs in (x, x[0], x[0, 0]):
        ours, theirs = linen.wrap(apply, specs)(adapted, inputs), apply(params, inputs)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_array_equal(ours, theirs)


def test_layers_that_a_model_stacks():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            step = lambda layer, x, _: (nn.relu(layer(x)), None)
            return nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(
                nn.Dense(4), x, None
            )[0]

    model, x = Stack(), jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)["params"]
    apply = lambda params, x: model.apply({"params": params}, x)
    specs = linen.specs(apply, params, x)
    adapted = lora.make(rank=2, where=".*")(params, specs, jax.random.key(1))
    whole = weights.combine(*moved(adapted))
    np.testing.assert_allclose(linen.wrap(apply, specs)(whole, x), apply(weights.dense(whole, specs), x), rtol=1e-5)


def test_a_model_without_kernels_is_refused():
    model, x = nn.LayerNorm(), jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)["params"]
    with pytest.raises(UserError, match="calls no Dense, Embed or Conv"):
        linen.specs(lambda params, x: model.apply({"params": params}, x), params, x)


@pytest.mark.slow
def test_the_example_learns_and_leaves_its_base():
    scores = linen_lora.main()
    own, before, after, merged, off = scores.values()
    assert own > 0.95 and before < 0.7 and after > 0.95 and merged == pytest.approx(after, abs=1e-3) and off == own
