"""Samples the next token. Temperature, top-k, top-p and min-p are applied in the same order as Hugging Face's logits
warpers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Knobs(NamedTuple):
    """Sampling parameters. Each is a scalar, or has one value per row. All parameters are traced, so changing them
    never causes a recompilation.

    With the default values, sampling is greedy, and no token is excluded.
    """

    temperature: Array | np.ndarray | float = 0.0  # 0: greedy
    top_k: Array | np.ndarray | int = 0  # keep only the top_k most likely tokens; 0: keep all
    # Keep the smallest set of most likely tokens whose total probability is at least top_p (Holtzman et al. 2019, arXiv
    # 1904.09751).
    top_p: Array | np.ndarray | float = 1.0
    # Keep the tokens that are at least min_p times as likely as the most likely token (Nguyen et al. 2024, arXiv
    # 2407.01082).
    min_p: Array | np.ndarray | float = 0.0


def sample(logits: Array, keys: Array, knobs: Knobs) -> tuple[Array, Array]:
    """Samples tokens [B] from logits [B,V] with one random key per row. Returns the tokens and their log-probabilities
    [B].

    The log-probabilities are computed at the sampling temperature (for greedy sampling, at temperature 1), before
    top-k, top-p or min-p exclude any tokens. A trainer recomputes log-probabilities in the same way. If probabilities
    were renormalized over the remaining tokens, the trainer's importance ratios would be biased.
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
    """Sets logits [B,V] to -inf for the tokens that top-k, top-p and min-p exclude. The most likely token is never
    excluded."""
    knobs = Knobs(*(jnp.broadcast_to(knob, len(logits))[:, None] for knob in knobs))
    sorts = (knobs.top_k > 0) | (knobs.top_p < 1)
    logits = jax.lax.cond(sorts.any(), lambda: _top(logits, knobs), lambda: logits)
    floor = logits.max(-1, keepdims=True) + jnp.log(knobs.min_p)  # a ratio of probabilities is a difference of logits
    return jnp.where(logits < floor, -jnp.inf, logits)


def _top(logits: Array, knobs: Knobs) -> Array:
    """Applies top-k, and then top-p to the remaining tokens. Tokens that tie with the least likely kept token are kept
    too."""
    down = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1])
    keep = (rank < knobs.top_k) | (knobs.top_k <= 0)
    probs = jax.nn.softmax(jnp.where(keep, down, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # total probability of all more likely tokens
    keep &= (before < knobs.top_p) | (knobs.top_p >= 1) | (rank == 0)
    least = jnp.where(keep, down, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)
