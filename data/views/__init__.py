"""Views transform a row of tokens before a model reads it. A file has `make(tokenizer, seq_len, **config) -> View`."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from common.methods import find
from common.types import Config
from data.text.tokenizer import Tokenizer

Row = dict[str, np.ndarray]  # one row of an lm batch: its arrays [T], and its columns as scalars


class View(NamedTuple):
    """`apply(row, rng)` returns the row as the model is to see it; None leaves rows as they are.

    All rows come back with the same shapes. `rng` depends on the seed, the step and the row's place in the batch, so
    that batches stay a function of (seed, step) on any number of hosts.
    """

    apply: Callable[[Row, np.random.Generator], Row] | None = None
    settings: dict = {}  # of the config: a resume compares them


def view(cfg: Config, tokenizer: Tokenizer, seq_len: int) -> View:
    """The view that a config's `data.view` names."""
    return find("data.views", cfg)(tokenizer, seq_len)._replace(settings=cfg.to_dict())
