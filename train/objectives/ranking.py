"""Trains a reward model on rankings of several answers (Plackett 1975; Luce 1959), with ties and unranked answers."""

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
from train.objectives._reward import has_document, rewards

BATCH = "group"
HEAD = "scalar"
MOST = 8  # maximum number K of answers to a prompt: order_logp visits all 2^K subsets of the answers


def make(model: Transformer) -> Objective:
    """The loss is the negative log-probability of the order in which a group of answers is ranked, averaged over
    groups.

    Plackett-Luce: P(order) = prod_i exp(r_i) / sum_{j not before i} exp(r_j). The probability of a tie is the sum over
    all orders of the tied answers. Answers that were not ranked share the last rank, so they are tied. The data have a
    column `rank` (1 is the best) or `rating` (the highest is the best).
    """

    def compute(roles: Roles, batch: Batch, key: Array) -> dict[str, Pair]:
        sides = [batch[name] for name in sorted(batch)]
        rows = jax.tree.map(lambda *x: jnp.concatenate(x), *sides)
        scores = rewards(model, roles["policy"], rows).reshape(len(sides), -1).T  # [B,K]
        ranks = jnp.stack([side["rank"] if "rank" in side else -side["rating"] for side in sides], axis=1)
        before, decided = ranks[:, :, None] < ranks[:, None], scores[:, :, None] > scores[:, None]
        pairs = before.sum((1, 2))
        there = has_document(sides[0])
        accuracy = (before & decided).sum((1, 2)) / jnp.maximum(pairs, 1)
        values = {"loss": -order_logp(scores, ranks)}
        return summed(values, there) | summed({"accuracy": accuracy}, there * pairs)

    return Objective(compute, BATCH, {"policy": Role("train", head=HEAD)})


def order_logp(scores: Array, ranks: Array) -> Array:
    """The log-probability [B] that answers with `scores` [B,K] are ordered as in `ranks` [B,K]. Tied answers may be in
    any order.

    P(S) is the probability that the answers in the set S come first. P(S) is computed for sets S of increasing size:
    P(S) is the sum over i in S of P(S - i) exp(r_i) / sum_{j not in S - i} exp(r_j), where answer i is added last. The
    sum leaves out each answer i for which an answer outside S - i has a better rank than i. Raises UserError for more
    than MOST answers.
    """
    count = scores.shape[1]
    if count > MOST:
        raise UserError(
            f"{count} answers to a prompt; at most {MOST} are supported", "data.source", "keep the best few"
        )
    # [2^K,K]: row n holds the bits of n
    taken = np.array(list(itertools.product((False, True), repeat=count)))[:, ::-1]
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
    """Computes logsumexp over the last axis. Where all entries are -inf, the result is -inf and the gradient is 0
    instead of NaN."""
    none = jnp.isneginf(x).all(-1, keepdims=True)
    return jnp.where(none[..., 0], -jnp.inf, jax.nn.logsumexp(jnp.where(none, 0.0, x), axis=-1))
