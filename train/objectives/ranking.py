"""A reward model from rankings of several answers (Plackett 1975; Luce 1959), ties and partial orders among them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common.errors import UserError
from data.rows.batch import Batch
from model.net.transformer import Transformer
from train.objectives import Objective, Pair, Role, Roles
from train.objectives._preference import summed
from train.objectives._reward import present, rewards

BATCH = "group"
HEAD = "scalar"
MOST = 8  # answers to a prompt: the orders of ties are summed over their 2^K subsets


def make(model: Transformer) -> Objective:
    """-log of the probability of each group's order, a mean over groups.

    Plackett-Luce: P(order) = prod_i exp(r_i) / sum_{j behind i} exp(r_j). A tie stands for all orders of the tied
    answers, whose probabilities are added. The answers that were not ranked all have the last rank, and so are tied.
    The data have a column `rank` (1 is the best) or `rating` (the highest is the best).
    """

    def compute(roles: Roles, batch: Batch, key: Array) -> dict[str, Pair]:
        sides = [batch[name] for name in sorted(batch)]
        rows = jax.tree.map(lambda *x: jnp.concatenate(x), *sides)
        scores = rewards(model, roles["policy"], rows).reshape(len(sides), -1).T  # [B,K]
        ranks = jnp.stack([side["rank"] if "rank" in side else -side["rating"] for side in sides], axis=1)
        before, decided = ranks[:, :, None] < ranks[:, None], scores[:, :, None] > scores[:, None]
        pairs = before.sum((1, 2))
        there = present(sides[0])
        accuracy = (before & decided).sum((1, 2)) / jnp.maximum(pairs, 1)
        values = {"loss": -order_logp(scores, ranks)}
        return summed(values, there) | summed({"accuracy": accuracy}, there * pairs)

    return Objective(compute, BATCH, {"policy": Role("train", head=HEAD)})


def order_logp(scores: Array, ranks: Array) -> Array:
    """log P [B] that answers with `scores` [B,K] come in the order of their `ranks` [B,K], equal ranks in any order.

    A recursion over the sets of answers that were taken first, by their size: log P(S) is the sum over the last i of S
    of log P(S - i) + r_i - log sum of the rest, where no answer that is left has a better rank than i. Raises UserError
    for more than MOST answers.
    """
    count = scores.shape[1]
    if count > MOST:
        raise UserError(
            f"{count} answers to a prompt; at most {MOST} can be ranked", "data.source", "keep the best few"
        )
    taken = np.array(list(itertools.product((False, True), repeat=count)))[:, ::-1]  # [2^K,K], row number = bits
    left = jnp.asarray(~taken)
    rest = jax.nn.logsumexp(jnp.where(left, scores[:, None], -jnp.inf), axis=-1)  # [B,2^K]
    best = jnp.where(left, ranks[:, None], jnp.inf).min(-1)
    total = jnp.full(rest.shape, -jnp.inf).at[:, 0].set(0.0)
    for size in range(1, count + 1):
        sets = np.flatnonzero(taken.sum(1) == size)
        last = np.array([np.flatnonzero(taken[s]) for s in sets])  # [sets,size]
        before = sets[:, None] - (1 << last)
        may = ranks[:, last] <= best[:, before]
        steps = total[:, before] + scores[:, last] - rest[:, before]
        total = total.at[:, sets].set(_logsumexp(jnp.where(may, steps, -jnp.inf)))
    return total[:, -1]


def _logsumexp(x: Array) -> Array:
    """logsumexp over the last axis; where all entries are -inf, the result is -inf and the gradient 0 instead of
    NaN."""
    none = jnp.isneginf(x).all(-1, keepdims=True)
    return jnp.where(none[..., 0], -jnp.inf, jax.nn.logsumexp(jnp.where(none, 0.0, x), axis=-1))
