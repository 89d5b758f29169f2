"""Shared code of the objectives of reward models."""

import jax.numpy as jnp
from jax import Array

from data.rows.batch import Batch
from model import heads
from model.net.transformer import Transformer
from model.weights import Params


def rewards(model: Transformer, params: Params, batch: Batch) -> Array:
    """The head's output [B] at the last token of each row, which is the end token unless the row was truncated."""
    x = model.hidden(params, batch["tokens"], batch["positions"], batch["segments"]).x
    return heads.at_end(params["head"], x, batch["segments"])


def present(batch: Batch) -> Array:
    """An array [B]: 1.0 for rows that hold a document, 0.0 for the empty rows that the last held-out batch may have."""
    return (batch["segments"] > 0).any(-1).astype(jnp.float32)
