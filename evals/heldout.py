"""Measures the loss on text that was not used in training: on held-out batches, and on plain text before and after
tuning."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from data import sources
from data.text.tokenizer import Tokenizer
from infer.lm import LM
from model.net import head
from model.net.transformer import Transformer
from model.weights import Params

Pair = tuple[Array, Array]  # (sum, weight)
PASSAGE = 1000  # characters


def bits_per_byte(model: Transformer, params: Params, batch: dict[str, Array], lengths: Array) -> Pair:
    """Returns (negative log-likelihood in bits, length in bytes), both summed over the target tokens [B,T] of a batch
    for language modeling (kind "lm" in data.rows.batch). Their ratio, bits per byte, is comparable across tokenizers.

    `lengths` [V] comes from `byte_lengths`. Control tokens have no bytes and count in neither sum.
    """
    x = model.hidden(params, batch["tokens"], batch["positions"], batch["segments"]).x
    logps = head.token_logps(model, params, x, batch["targets"], batch["mask"])
    written = jnp.take(lengths, batch["targets"]) * (batch["mask"] > 0)  # bytes [B,T]
    bits = -jnp.where(written > 0, logps, 0).sum() / math.log(2)
    return bits, written.sum().astype(jnp.float32)


def byte_lengths(model: Transformer, tokenizer: Tokenizer) -> np.ndarray:
    """Returns the number of bytes that each token id stands for [V]. V is the size of the model's vocabulary, which may
    be larger than the tokenizer's."""
    lengths = np.zeros(model.config.vocab_size, np.int32)
    lengths[: tokenizer.vocab_size] = tokenizer.byte_lengths
    return lengths


def text_loss(lm: LM, texts: list[str]) -> tuple[float, int]:
    """Returns (total loss in nats, number of tokens) for plain texts. If the loss per token is higher after tuning than
    before, the model has forgotten some of what it knew."""
    mean, tokens = lm.loss(texts)
    return mean * tokens, tokens


def passages(source: str, n: int) -> list[str]:
    """Picks `n` passages from a data source, at most one per document, spread evenly over all documents."""
    texts = [text for record in sources.records(source) if (text := _passage(record))]
    return texts[:: max(len(texts) // n, 1)][:n]


def _passage(record: dict) -> str:
    """Returns a passage from the middle of a document, beginning at the start of a line, or "" if the document is too
    short."""
    text = record.get("text", "")
    at = text.find("\n", max(len(text) // 2 - PASSAGE, 0)) + 1
    return text[at : at + PASSAGE] if len(text) >= 2 * PASSAGE else ""
