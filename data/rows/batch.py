"""Defines the kinds of batches: the arrays of each kind, their shapes, and example batches. No other module contains
code for specific kinds.

An lm batch (for language modeling) contains arrays [B, T] of B rows with T tokens. Each row contains one document or
several packed documents. The arrays are tokens, targets (the token after each token), mask (1.0 if the target counts in
the loss, else 0.0), segments (which document of the row a token belongs to, counted from 1, or 0 for padding) and
positions (of each token within its document). A batch may also contain other arrays [B, T], such as "tags", and columns
[B], such as "label".

If each example consists of several documents, a batch has several sides, each of which is an lm batch with one document
per row. For example, a batch of preference pairs has the sides "chosen" and "rejected". Row i of every side belongs to
the same example. To add a kind of batch, add one line to KINDS. An encoder-decoder model would need a kind with two
sides.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Side = dict[str, np.ndarray]  # an lm batch (see above); its arrays become jax arrays when they are moved to devices
Batch = dict[str, Any]  # a Side, or {name: Side}
TOKENS = {"tokens": np.int32, "targets": np.int32, "mask": np.float32, "segments": np.int32, "positions": np.int32}
COLUMNS = {"label": np.int32, "rank": np.int32, "rating": np.float32, "group": np.int32, "reward": np.float32}
COLUMNS |= {"margin": np.float32, "tie": np.int32}  # columns of pairs
ONE = "row"  # side name that stands for the whole batch, if the batch is itself an lm batch
ANSWERS = 4  # assumed number of answers per group, until the data are known


class Kind(NamedTuple):
    sides: tuple[str, ...] = (ONE,)
    floats: tuple[str, ...] = ()  # names of the float32 arrays [B, T] that these batches have besides TOKENS
    columns: tuple[str, ...] = ()  # names of their columns [B] (one number per row); COLUMNS has the dtypes


def answers(k: int) -> tuple[str, ...]:
    """The names under which a batch stores `k` answers to the same prompt. Sorting these names keeps the answers in
    order."""
    return tuple(f"answer{i:03d}" for i in range(k))


KINDS = {
    "lm": Kind(),
    "pair": Kind(("chosen", "rejected")),
    "match": Kind(("passage", "query")),
    "group": Kind(answers(ANSWERS), columns=("rank",)),
    "labelled": Kind(columns=("label",)),
    "rated": Kind(columns=("rating",)),
    "rollout": Kind(floats=("logps", "advantages", "returns", "values"), columns=("group", "reward")),
}


@dataclass(frozen=True)
class Spec:
    """The shape and dtype of an array that has not been created yet."""

    shape: tuple[int, ...]
    dtype: np.dtype


def parts(batch: Batch) -> dict[str, Side]:
    """Splits a batch of any kind into one lm batch per side: returns {side name, such as "chosen": lm batch}."""
    return {ONE: batch} if "tokens" in batch else {side: batch[side] for side in sorted(batch)}


def join(parts: dict[str, Batch]) -> Batch:
    """Combines lm batches, given as {side name: lm batch}, into one batch. This is the inverse of `parts`."""
    return parts.get(ONE, parts)


def kind_of(batch: Batch) -> str:
    """Determines the kind of a batch from the names of its sides, and from the names of the arrays in its first side.
    Raises ValueError if the batch is of no known kind."""
    sides = parts(batch)
    if tuple(sides) == answers(len(sides)):
        return "group"
    names = set(next(iter(sides.values())))
    found = [name for name, k in KINDS.items() if {*k.sides} == {*sides} and names >= {*k.floats, *k.columns}]
    if not found:
        raise ValueError(f"no kind of batch has the sides {', '.join(sides)}")
    return found[-1]  # KINDS lists the most specific kinds last


def serves(given: str, asked: str) -> bool:
    """Whether code that reads batches of the kind `asked` can also read batches of the kind `given`."""
    has, needs = KINDS[given], KINDS[asked]
    return has.sides == needs.sides and {*has.columns} >= {*needs.columns} and {*has.floats} >= {*needs.floats}


def abstract(kind: str, rows: int, seq_len: int, k: int = ANSWERS) -> Batch:
    """Returns a batch of `rows` rows that describes each array by a Spec (its shape and dtype) instead of containing
    the array. `k` is the number of answers per group."""
    spec = KINDS[kind]
    part = {name: Spec((rows, seq_len), np.dtype(dtype)) for name, dtype in TOKENS.items()}
    part |= {name: Spec((rows, seq_len), np.dtype(np.float32)) for name in spec.floats}
    part |= {name: Spec((rows,), np.dtype(COLUMNS[name])) for name in spec.columns}
    return join(dict.fromkeys(answers(k) if kind == "group" else spec.sides, part))


def example(kind: str, rows: int, seq_len: int, vocab_size: int, seed: int = 0) -> Batch:
    """Returns an example batch. Each row is one document of random token ids, and the number of targets that count in
    the loss differs greatly between rows."""
    rng = np.random.default_rng(seed)

    def part(spec: Batch) -> Batch:
        ids = rng.integers(0, vocab_size, (rows, seq_len + 1)).astype(np.int32)
        ones = np.ones((rows, seq_len), np.int32)
        made = {
            "tokens": ids[:, :-1],
            "targets": ids[:, 1:],
            "segments": ones,
            "positions": ones.cumsum(1, np.int32) - 1,
        }
        made["mask"] = (np.arange(seq_len) < rng.integers(1, seq_len, (rows, 1))).astype(np.float32)
        for name, s in spec.items():
            whole = np.issubdtype(s.dtype, np.integer)
            made.setdefault(name, (rng.integers(0, 3, s.shape) if whole else rng.random(s.shape)).astype(s.dtype))
        return made

    return join({side: part(spec) for side, spec in parts(abstract(kind, rows, seq_len)).items()})
