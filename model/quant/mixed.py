"""Quantizes each matrix to its own format.

The config sets the formats, or tools.quantize chooses them for a size budget.
"""

import re

from jax import Array

from common import methods
from model import weights
from model.quant._leaf import Encode, Quantized
from model.weights import Spec, Transform

GROUPED = ("int4", "nf4")
FORMATS = (*GROUPED, "int8", "fp8")


def encoder(path: str, formats: tuple[tuple[str, str], ...], group: int) -> Encode | None:
    """Returns the function that quantizes the parameter `path`, or None if the parameter is not quantized."""
    for where, format in formats:
        if re.fullmatch(where, path):
            options = {"group": group} if format in GROUPED else {}
            return methods.module("model.quant", format).make(**options).encode
    return None


def make(*, formats: tuple = (("layers/mlp/.*", "int4"), ("layers/.*", "int8")), group: int = 64) -> Transform:
    """Returns a Transform that quantizes matrices. `formats` has pairs such as ("layers/mlp/.*", "int4").

    The first regex that matches the whole name of a parameter determines its format. Parameters that match no regex are
    not quantized. `group` is the group size of int4 and nf4. Raises ValueError for an unknown format, or if no regex
    matches any parameter.
    """
    if not formats or any(len(pair) != 2 or pair[1] not in FORMATS for pair in formats):
        raise ValueError(f"quant.formats={formats!r} is not a list of pairs (regex, one of {', '.join(FORMATS)})")

    def one(path: str, w: Array, spec: Spec, key: Array | None) -> Quantized:
        return encoder(path, formats, group)(w, spec.eqn)

    return weights.wrapping("|".join(where for where, _ in formats), one)
