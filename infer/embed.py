"""Computes embedding vectors of texts with an encoder or any other language model. The files in the model's folder
specify how hidden states are pooled."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common import files
from common.errors import UserError
from data.text import formats as tokenizers
from data.text.tokenizer import Tokenizer
from infer.models import Run, open_model
from infer.shapes import batches, bucket
from model import build, weights
from model.heads import last_token
from model.io.pretrained import Pretrained
from model.net.transformer import Transformer
from model.weights import Params

BATCH_TOKENS = 16_384  # maximum number of tokens per forward pass
POOLINGS = {  # fields in the file 1_Pooling/config.json, as sentence-transformers writes it
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
}
Pooling = Literal["mean", "first", "last"]


@dataclasses.dataclass(frozen=True, eq=False)
class Embedder:
    """A model that computes one vector per text by pooling the hidden states of the text's tokens."""

    model: Transformer
    params: Params
    tokenizer: Tokenizer
    pooling: Pooling = "mean"
    normalized: bool = True  # whether vectors are scaled to length 1
    longest: int = 512  # maximum tokens per text; further tokens are cut off
    prompts: tuple[tuple[str, str], ...] = ()  # (name, prefix) of each prompt, with names such as "query"

    @property
    def width(self) -> int:
        return self.model.config.embed

    @functools.cached_property
    def flops_per_token(self) -> float:
        """The FLOPs per token of the matrix products in the layers, at 2 FLOPs per multiply-add. Attention scores are
        not counted."""
        found: list[int] = []

        def count(path: str, w: Array | weights.Weight, spec: weights.Spec | None) -> None:
            if spec and spec.eqn and not path.startswith(("embed", "unembed")):
                found.extend(jax.tree.leaves(w.macs(spec.stacked) if weights.is_weight(w) else w.size))

        weights.replace(self.params, self.model.specs, count)
        return 2.0 * sum(found)

    def embed(self, texts: Sequence[str], prompt: str = "") -> np.ndarray:
        """Computes one vector per text, float32 [len(texts), width]. `prompt` names one of the model's prompts, which
        is put before each text; "" means no prompt.

        Texts of similar length share a forward pass, but the vector of a text does not depend on other texts.
        """
        before = dict(self.prompts).get(prompt, "")
        return self.vectors(self.encode([before + text for text in texts]))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The first `longest` token ids of each text."""
        return self.tokenizer.encode_inputs(list(texts), self.longest)

    def vectors(self, ids: Sequence[list[int]]) -> np.ndarray:
        """Computes one vector per text, like `embed`, from texts that are already tokenized."""
        out = np.zeros((len(ids), self.width), np.float32)
        lengths = [len(row) for row in ids]
        for chosen in batches(lengths, BATCH_TOKENS):
            tokens, segments = _padded([ids[i] for i in chosen], self.longest)
            found = _vectors(self.model, self.pooling, self.normalized, self.params, tokens, segments)
            out[chosen] = found[: len(chosen)]
        return out


def load(name: str | Path, dtype: str | None = None) -> Embedder:
    """Loads an embedder from a Hugging Face folder, the name of a packaged model, a hub id, or a run that fine-tuned
    such a model.

    Pooling, normalization, maximum length and prompts are read from the sentence-transformers files beside the model.
    Without such files, a vector is the mean of the hidden states over the tokens, normalized to length 1. Raises
    UserError if a pooling mode or a module is not supported.
    """
    opened = open_model(name)
    model = build.network(opened.config, dtype)
    tokenizer = tokenizers.load(opened.tokenizer_source)
    settings = _settings(Path(_first(opened).tokenizer_source))
    longest = min(settings.pop("longest", opened.config.context), opened.config.context)
    return Embedder(model, opened.load(model.specs, None, model.param_dtype), tokenizer, longest=longest, **settings)


def _first(opened: Pretrained | Run) -> Pretrained | Run:
    """The pretrained model from which a run, or a chain of runs, started."""
    return _first(opened.init) if isinstance(opened, Run) and opened.init else opened


def _settings(folder: Path) -> dict:
    """Reads the settings of an Embedder from the sentence-transformers files in a folder. Returns {} if the folder has
    no such files."""
    listed = folder / "modules.json"
    if not listed.is_file():
        return {}
    try:
        kinds = [module["type"].rpartition(".")[2] for module in files.strict(listed.read_text("utf-8"))]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError("the file is not a list of modules that each have a type", str(listed)) from None
    if strange := set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise UserError(f"module {min(strange)} is not supported", str(listed))
    settings: dict = {"normalized": "Normalize" in kinds}
    pooling = files.load_json(folder / "1_Pooling/config.json")
    modes = [name for name, on in pooling.items() if name.startswith("pooling_mode_") and on is True]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        what = f"pooling {' + '.join(modes) or 'of no kind'} is not supported"
        raise UserError(what, str(folder / "1_Pooling/config.json"), f"supported: {', '.join(POOLINGS)}")
    settings["pooling"] = POOLINGS[modes[0]]
    if longest := files.read_json(folder / "sentence_bert_config.json").get("max_seq_length"):
        settings["longest"] = longest
    prompts = files.read_json(folder / "config_sentence_transformers.json").get("prompts") or {}
    return settings | {"prompts": tuple(sorted(prompts.items()))}


def _padded(rows: list[list[int]], longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows of token ids to one of a few shapes. Returns (tokens, segments) [B,T], in which padding has segment
    0."""
    width = min(bucket(max(map(len, rows)), 16), longest)
    tokens, segments = np.zeros((2, bucket(len(rows)), width), np.int32)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)] = ids
        segments[i, : len(ids)] = 1
    return tokens, segments


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _vectors(
    model: Transformer, pooling: Pooling, normalized: bool, params: Params, tokens: Array, segments: Array
) -> Array:
    x = model.hidden(params, tokens, segments=segments).x
    return pool(x, segments, pooling, normalized)


def pool(x: Array, segments: Array, pooling: Pooling, normalized: bool = True) -> Array:
    """Pools hidden states x [B,T,D] into vectors [B,D] in float32. Tokens with segment 0 are padding and do not
    count."""
    x, there = x.astype(jnp.float32), (segments > 0)[..., None]
    if pooling == "mean":
        x = jnp.where(there, x, 0).sum(1) / jnp.maximum(there.sum(1), 1)
    elif pooling == "first":
        x = last_token(x[:, ::-1], segments[:, ::-1])[:, 0]
    else:
        x = last_token(x, segments)[:, 0]
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12) if normalized else x
