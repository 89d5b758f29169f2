"""Loss on text that training has not seen: of batches, and of plain text before and after a tuning."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data import sources
from model.net import head
from model.net.transformer import Transformer

Pair = tuple[Any, Any]  # (sum, weight)
PASSAGE = 1000  # characters


def heldout(model: Transformer, params: Any, source: Any, batches: int, tokenizer: Any) -> dict[str, Pair]:
    """nll (nats per target) and bits_per_byte of the first `batches` batches, as (sum, weight) pairs.

    `source.batch(i)` gives device arrays and counts, as train.source.Batches does. Empty when `batches` is 0 or nothing
    is masked in. Bits per byte compares tokenizers: it leaves out control tokens, which stand for no byte.
    """
    total = None
    for i in range(min(batches, source.loader.num_batches)):
        new = _sums(model, params, source.batch(i)[0], _byte_lengths(model, tokenizer))
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    return total or {}


@functools.partial(jax.jit, static_argnums=0)
def _sums(model: Transformer, params: Any, batch: dict, lengths: Any) -> dict[str, Pair]:
    x = model.hidden(params, batch["tokens"], batch["positions"], batch["segments"]).x
    mask = batch["mask"]
    nll = -head.token_logps(model, params, x, batch["targets"], mask)
    written = jnp.take(lengths, batch["targets"]) * (mask > 0)  # bytes [B,T]
    bits = jnp.where(written > 0, nll, 0).sum() / math.log(2)
    return {"nll": (nll.sum(), mask.sum()), "bits_per_byte": (bits, written.sum().astype(jnp.float32))}


def _byte_lengths(model: Transformer, tokenizer: Any) -> np.ndarray:
    """Bytes of every id of the model's vocabulary [V], which may be larger than the tokenizer's."""
    lengths = np.zeros(model.config.vocab_size, np.int32)
    lengths[: tokenizer.vocab_size] = tokenizer.byte_lengths
    return lengths


def text_loss(lm: Any, texts: list[str]) -> Pair:
    """(sum, weight) of the nats per token of plain texts. The difference of two models on one text is forgetting."""
    mean, tokens = lm.loss(texts)
    return mean * tokens, tokens


def passages(source: str, n: int) -> list[str]:
    """`n` passages of a data source, one a document and spread over all of its documents."""
    texts = [text for record in sources.records(source) if (text := _passage(record))]
    return texts[:: max(len(texts) // n, 1)][:n]


def _passage(record: dict) -> str:
    """The middle of a document's text, from the start of a line; "" when it is shorter than a passage."""
    text = record.get("text", "")
    at = text.find("\n", max(len(text) // 2 - PASSAGE, 0)) + 1
    return text[at : at + PASSAGE] if len(text) >= 2 * PASSAGE else ""
