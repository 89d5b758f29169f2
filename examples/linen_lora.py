"""Applies LoRA to an ordinary flax.linen model that has no LoRA code: a small convolutional classifier of strings.

    python -m examples.linen_lora

The model first learns whether a string contains "ab". Then the model is frozen, and a LoRA adapter learns whether a
string contains "ba". Running this example takes a few seconds on a laptop CPU. Expected result: the frozen model is
accurate on "ab" and near chance on "ba", and the adapter is accurate on "ba". With the adapter switched off, the
accuracy on "ab" is unchanged.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from model import linen, weights
from model.peft import lora
from model.weights import Params

LETTERS, LENGTH = 5, 16
STEPS, BATCH, HELD_OUT = 400, 64, 2000


class Classifier(nn.Module):
    """An ordinary flax.linen model, which has no LoRA code."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(LETTERS, 16)(tokens)
        x = nn.relu(nn.Conv(32, kernel_size=(2,))(x))
        return nn.Dense(2)(nn.relu(nn.Dense(32)(x.max(1))))


def draw(key: jax.Array, pair: tuple[int, int], n: int) -> tuple[jax.Array, jax.Array]:
    """Draws random strings [n, LENGTH], and labels that say whether each string contains `pair`; 46 % of the strings
    do."""
    tokens = jax.random.randint(key, (n, LENGTH), 0, LETTERS)
    found = (tokens[:, :-1] == pair[0]) & (tokens[:, 1:] == pair[1])
    return tokens, found.any(1).astype(jnp.int32)


def train(apply: Callable, params: Params, what: str, pair: tuple[int, int], seed: int) -> Params:
    """Runs STEPS steps of Adam on the parameters that `weights.trainable(params, what)` selects. Returns all
    parameters."""
    moving, frozen = weights.partition(params, weights.trainable(params, what))
    tx = optax.adam(3e-3)

    def loss(moving: Params, key: jax.Array) -> jax.Array:
        tokens, labels = draw(key, pair, BATCH)
        logits = apply(weights.combine(moving, frozen), tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(carry: tuple, key: jax.Array) -> tuple[tuple, None]:
        moving, state = carry
        updates, state = tx.update(jax.grad(loss)(moving, key), state)
        return (optax.apply_updates(moving, updates), state), None

    keys = jax.random.split(jax.random.key(seed), STEPS)
    (moving, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((moving, tx.init(moving)))
    return weights.combine(moving, frozen)


def main() -> dict[str, float]:
    """Trains the model and the adapter, then prints and returns accuracies on held-out strings."""
    model, ab, ba = Classifier(), (0, 1), (1, 0)
    tokens, _ = draw(jax.random.key(0), ab, 1)
    plain = lambda params, tokens: model.apply({"params": params}, tokens)
    params = train(plain, model.init(jax.random.key(0), tokens)["params"], "all", ab, seed=1)

    specs = linen.specs(plain, params, tokens)
    apply = linen.wrap(plain, specs)
    adapted = lora.make(rank=4, alpha=8.0, where=".*")(params, specs, jax.random.key(2))
    adapted = train(apply, adapted, "adapters", ba, seed=3)

    def right(apply: Callable, params: Params, pair: tuple[int, int]) -> float:
        tokens, labels = draw(jax.random.key(9), pair, HELD_OUT)
        return float((jax.jit(apply)(params, tokens).argmax(-1) == labels).mean())

    scores = {
        "base on its own task": right(plain, params, ab),
        "base on the new task": right(plain, params, ba),
        "adapter on the new task": right(apply, adapted, ba),
        "adapter merged": right(plain, weights.dense(adapted, specs), ba),
        "adapter off, own task": right(plain, weights.base(adapted), ab),
    }
    for name, score in scores.items():
        print(f"{name:<24} {score:.1%} of {HELD_OUT}, one seed")
    return scores


if __name__ == "__main__":
    main()
