"""Code shared by the objectives that train reward models."""

import jax.numpy as jnp
from jax import Array

from data.rows.batch import Batch
from model import heads
from model.net.transformer import Transformer
from model.weights import Params


def rewards(model: Transformer, params: Params, batch: Batch) -> Array:
    """The reward of each row [B]: the head's output at the row's last token, which is the end token unless the row was
    truncated."""
    x = model.hidden(params, batch["tokens"], batch["positions"], batch["segments"]).x
    return heads.at_end(params["head"], x, batch["segments"])


def has_document(batch: Batch) -> Array:
    """A weight for each row [B]: 1.0, or 0.0 for the empty rows that fill up the last held-out batch."""
    return (batch["segments"] > 0).any(-1).astype(jnp.float32)
