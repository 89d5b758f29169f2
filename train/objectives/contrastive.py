"""Trains embeddings such that a question is closer to its own passage than to the other passages of the batch (InfoNCE,
van den Oord et al. 2018, arXiv 1807.03748; MultipleNegativesRankingLoss in sentence-transformers)."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from data.rows.batch import Batch
from infer.embed import pool
from model.net.transformer import Transformer
from model.weights import Params
from train.objectives import Objective, Pair, Roles

BATCH = "match"


def make(
    model: Transformer,
    *,
    temperature: float = 0.05,
    pooling: Literal["mean", "first", "last"] = "mean",
    query_tokens: int = 0,
) -> Objective:
    """The loss is -log softmax(cosines / temperature) of a question's own passage, averaged over questions.

    The negatives of a question are the other passages of the micro-batch, on all devices. Copies of its own passage and
    the passages of identical questions are left out. `pooling` says how token vectors are pooled into an embedding.
    Questions are truncated to `query_tokens` tokens, which saves padding; 0 means `data.seq_len`.
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature:g} must be above 0")

    def vectors(params: Params, side: Batch) -> Array:
        x = model.hidden(params, side["tokens"], side["positions"], side["segments"]).x
        return pool(x, side["segments"], pooling)

    def compute(roles: Roles, batch: Batch, key: Array) -> dict[str, Pair]:
        params, passages = roles["policy"], batch["passage"]
        queries = {name: x[:, : query_tokens or None] for name, x in batch["query"].items()}
        cosines = vectors(params, queries) @ vectors(params, passages).T  # [B,B]: questions x passages
        return info_nce(cosines / temperature, negatives(passages, queries), (passages["segments"] > 0).any(-1))

    return Objective(compute, BATCH, logits=False)


def negatives(passages: Batch, queries: Batch) -> Array:
    """A mask [B,B] that is True where passage j is a negative of question i. Passage j is a negative if row j is not
    empty, and rows i and j have different questions and different passages."""
    same = lambda tokens: jnp.all(tokens[:, None] == tokens[None], axis=-1)
    there = (passages["segments"] > 0).any(-1)
    return ~(same(passages["tokens"]) | same(queries["tokens"])) & there[None]


def info_nce(logits: Array, negative: Array, there: Array) -> dict[str, Pair]:
    """Computes the loss, the accuracy and the mean reciprocal rank (MRR) from logits [B,B] (questions x passages), in
    which the logits of the correct passages are on the diagonal."""
    own = jnp.diagonal(logits)
    others = jnp.where(negative, logits, -jnp.inf)
    loss = jax.nn.logsumexp(jnp.concatenate([own[:, None], others], 1), axis=1) - own
    rank = 1 + (others >= own[:, None]).sum(1)
    values = {"loss": loss, "accuracy": (rank == 1).astype(jnp.float32), "mrr": 1.0 / rank}
    weight = there.astype(jnp.float32)
    return {name: ((value * weight).sum(), weight.sum()) for name, value in values.items()}
