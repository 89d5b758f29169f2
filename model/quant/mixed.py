"""A format for each matrix, as they are given or as the search of tools.quantize finds them for a budget of bytes."""

import importlib
import re

from jax import Array

from model import weights
from model.quant._leaf import Encode, Quantized
from model.weights import Spec, Transform

GROUPED = ("int4", "nf4")
FORMATS = (*GROUPED, "int8", "fp8")


def encoder(path: str, formats: tuple[tuple[str, str], ...], group: int) -> Encode | None:
    """What encodes the parameter `path`; None where it stays float."""
    for where, format in formats:
        if re.fullmatch(where, path):
            options = {"group": group} if format in GROUPED else {}
            return importlib.import_module(f"model.quant.{format}").make(**options).encode
    return None


def make(*, formats: tuple = (("layers/mlp/.*", "int4"), ("layers/.*", "int8")), group: int = 64) -> Transform:
    """A Transform. `formats`: (("layers/mlp/.*", "int4"), ("layers/attn/w[vo]", "int8"), ...), the first regex that
    matches a whole name decides, and what none matches stays float. `group` is that of int4 and nf4.

    Raises ValueError for another format, and when a regex matches nothing.
    """
    if not formats or any(len(pair) != 2 or pair[1] not in FORMATS for pair in formats):
        raise ValueError(f"quant.formats={formats!r} is no list of (regex, one of {', '.join(FORMATS)})")

    def one(path: str, w: Array, spec: Spec, key: Array | None) -> Quantized:
        return encoder(path, formats, group)(w, spec.eqn)

    return weights.wrapping("|".join(where for where, _ in formats), one)
