"""A view transforms a row of tokens before a model reads the row. Each file in this folder defines `make(tokenizer,
seq_len, **config) -> View`."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from common.methods import find
from common.types import Config
from data.text.tokenizer import Tokenizer

Row = dict[str, np.ndarray]  # one row of a batch: its arrays have the shape [T], and its columns are scalars


class View(NamedTuple):
    """A transformation of rows. `apply(row, rng)` returns the row that the model reads. If `apply` is None, rows are
    unchanged.

    All rows that `apply` returns have the same shapes. `rng` depends only on the seed, the step and the row's position
    in the batch, so the batches do not depend on the number of hosts.
    """

    apply: Callable[[Row, np.random.Generator], Row] | None = None
    settings: dict = {}  # the view's section of the config, which must not change when a run resumes


def view(cfg: Config, tokenizer: Tokenizer, seq_len: int) -> View:
    """Makes the view that `data.view` names in a config."""
    return find("data.views", cfg)(tokenizer, seq_len)._replace(settings=cfg.to_dict())
