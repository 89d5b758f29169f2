"""Views transform a row of tokens for a model. Each file defines `make(tokenizer, seq_len, **config) -> View`."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from common.methods import find
from common.types import Config
from data.text.tokenizer import Tokenizer

Row = dict[str, np.ndarray]  # one row of an lm batch: its arrays [T], and its columns as scalars


class View(NamedTuple):
    """`apply(row, rng)` returns the row that the model reads; if `apply` is None, rows are unchanged.

    All returned rows have the same shapes. `rng` depends on the seed, the step and the row's position in the batch, so
    that batches stay a function of (seed, step) on any number of hosts.
    """

    apply: Callable[[Row, np.random.Generator], Row] | None = None
    settings: dict = {}  # the view's part of the config, which is compared when a run resumes


def view(cfg: Config, tokenizer: Tokenizer, seq_len: int) -> View:
    """The view that a config's `data.view` names."""
    return find("data.views", cfg)(tokenizer, seq_len)._replace(settings=cfg.to_dict())
