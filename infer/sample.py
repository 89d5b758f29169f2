"""Next-token distributions: temperature, top-k, top-p and min-p, in the order of Hugging Face's logits warpers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Knobs(NamedTuple):
    """How to sample: scalars, or one value per row. All are traced, so changing them never recompiles.

    The defaults turn each of them off.
    """

    temperature: Array | np.ndarray | float = 0.0  # 0: greedy
    top_k: Array | np.ndarray | int = 0  # keep the k most likely tokens
    # Keep the fewest tokens whose total probability reaches p (Holtzman et al. 2019, arXiv 1904.09751).
    top_p: Array | np.ndarray | float = 1.0
    # Keep tokens at least min_p times as likely as the best (Nguyen et al. 2024, arXiv 2407.01082).
    min_p: Array | np.ndarray | float = 0.0


def sample(logits: Array, keys: Array, knobs: Knobs) -> tuple[Array, Array]:
    """Samples tokens [B] from logits [B,V] with one key per row; returns them and their log-probabilities [B].

    The log-probabilities are those of the model at this temperature before any truncation (greedy: at temperature 1),
    as a trainer recomputes them; probabilities renormalized over the kept tokens would bias its importance ratios.
    """
    greedy = jnp.broadcast_to(knobs.temperature == 0, len(logits))
    scaled = logits / jnp.where(greedy, 1.0, knobs.temperature)[:, None]
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Array:
        drawn = jax.vmap(jax.random.categorical)(keys, truncate(scaled, knobs))
        return jnp.where(greedy, best, drawn.astype(jnp.int32))

    tokens = jax.lax.cond(greedy.all(), lambda: best, draw)
    chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(scaled, axis=-1)


def truncate(logits: Array, knobs: Knobs) -> Array:
    """Logits [B,V] with -inf at the tokens that top-k, top-p and min-p exclude. The best token always remains."""
    knobs = Knobs(*(jnp.broadcast_to(knob, len(logits))[:, None] for knob in knobs))
    sorts = (knobs.top_k > 0) | (knobs.top_p < 1)
    logits = jax.lax.cond(sorts.any(), lambda: _top(logits, knobs), lambda: logits)
    floor = logits.max(-1, keepdims=True) + jnp.log(knobs.min_p)  # a ratio of probabilities is a difference of logits
    return jnp.where(logits < floor, -jnp.inf, logits)


def _top(logits: Array, knobs: Knobs) -> Array:
    """Top-k, then top-p among the kept tokens. Both keep the most likely tokens, and all tokens that tie with the last
    kept."""
    down = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1])
    keep = (rank < knobs.top_k) | (knobs.top_k <= 0)
    probs = jax.nn.softmax(jnp.where(keep, down, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # total probability of the more likely tokens
    keep &= (before < knobs.top_p) | (knobs.top_p >= 1) | (rank == 0)
    least = jnp.where(keep, down, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)
