"""Shared code of the objectives of reward models."""

import jax.numpy as jnp
from jax import Array

from data.rows.batch import Batch
from model import heads
from model.net.transformer import Transformer
from model.weights import Params


def rewards(model: Transformer, params: Params, batch: Batch) -> Array:
    """The output of the head at the last token of each row [B]: the end token, unless the row was truncated."""
    x = model.hidden(params, batch["tokens"], batch["positions"], batch["segments"]).x
    return heads.at_end(params["head"], x, batch["segments"])


def present(batch: Batch) -> Array:
    """1.0 for rows that hold a document, 0.0 for the empty rows of a last held-out batch [B]."""
    return (batch["segments"] > 0).any(-1).astype(jnp.float32)
