"""Arranges the documents of one source in rows: decides which documents are cut, dropped or packed together, and copies
the rows into batches."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.errors import UserError
from data.dataset import Dataset
from data.rows import pack
from data.rows.batch import Batch
from data.rows.pack import Pieces, Rows, ranges
from data.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import rich.text

PACKINGS = ("none", "concat", "best_fit")


class Part(NamedTuple):
    """Examples selected from one source. `documents` has their indices, and `weight` is the weight of the source in the
    mixture."""

    dataset: Dataset
    documents: np.ndarray
    weight: float = 1.0


class Packed(NamedTuple):
    sides: list[Rows]  # the rows of each side (data.rows.batch explains sides)
    report: dict  # numbers of documents that were truncated, split into pieces or dropped
    items: np.ndarray | None = None  # the index of each row's example, if every row holds only one example


def packed(part: Part, *, seq_len: int, packing: str, truncate: bool, max_bad: float, seed: int) -> Packed:
    """Arranges documents in rows of `seq_len` tokens. Texts that are longer than a row are split into pieces, so that
    nothing is lost. Documents of other kinds that are longer than a row lose their last tokens. With truncate=False,
    documents that are longer than a row are dropped, and UserError is raised if their fraction is larger than
    `max_bad`. With packing "concat", all documents are joined, and the result is cut into rows.

    A truncated document is dropped if none of the remaining tokens counts in the loss. Examples with several sides or
    with columns are never packed together: each example gets its own row.
    """
    if packing not in PACKINGS:
        raise UserError(f"unknown packing {packing!r}", "data.packing", f"one of {' '.join(PACKINGS)}")
    data, numbers = part.dataset, part.documents
    count = len(data.sides)
    alone = count > 1 or bool(data.columns)
    sides = [_pieces(data, count * numbers + side) for side in range(count)]
    long = np.any([side.lengths > seq_len for side in sides], axis=0)
    whole = packing == "concat" and not alone
    drop = np.zeros_like(long)
    if not truncate and not whole:
        drop = long
        _check_long(data, int(long.sum()), len(long), seq_len, max_bad)
    elif data.kind != "text" and not whole:
        drop = _nothing_learnt(data, sides, long, seq_len)
    sides = [Pieces(side.starts[~drop], side.lengths[~drop]) for side in sides]
    report = {"truncated": 0, "split": 0, "dropped": int(drop.sum())}
    report["split" if whole or data.kind == "text" else "truncated"] = int((long & ~drop).sum())
    if whole:
        return Packed([pack.concat(sides[0], seq_len)], report)
    shorten = pack.cut if data.kind == "text" else pack.truncate
    sides = [shorten(side, seq_len) for side in sides]
    if packing == "best_fit" and not alone:
        return Packed([pack.best_fit(sides[0], seq_len, seed)], report)
    return Packed([pack.none(side) for side in sides], report, numbers[~drop] if alone else None)


def _pieces(data: Dataset, numbers: np.ndarray) -> Pieces:
    return Pieces(data.stored.offsets[numbers], data.lengths[numbers])


def _nothing_learnt(data: Dataset, sides: list[Pieces], long: np.ndarray, seq_len: int) -> np.ndarray:
    """Returns one boolean per example. It is True if the example is longer than a row and truncating it would leave a
    document in which no token counts in the loss."""
    drop = np.zeros_like(long)
    for i in np.flatnonzero(long):
        kept = [np.arange(side.starts[i], side.starts[i] + min(side.lengths[i], seq_len)) for side in sides]
        drop[i] = not all(data.stored.mask(slots).any() for slots in kept)
    return drop


def _check_long(data: Dataset, count: int, total: int, seq_len: int, max_bad: float) -> None:
    if count > max_bad * total:
        source, fix = data.stored.index["source"], "raise data.seq_len or data.max_bad, or set data.truncate=True"
        raise UserError(f"{count} of {total} documents are longer than seq_len={seq_len}", source, fix)


def write(batch: Batch, at: np.ndarray, data: Dataset, rows: Rows, chosen: np.ndarray, pad_id: int) -> None:
    """Copies rows of a source to a batch. `chosen` has the indices of the rows in the source, and `at` their indices in
    the batch. The target of the last token of a document is the padding token."""
    counts = np.diff(rows.bounds)[chosen]
    pieces = ranges(rows.bounds[chosen], counts)
    starts, lengths = rows.starts[pieces], rows.lengths[pieces]
    nth = ranges(np.zeros_like(counts), counts)  # index of each piece within its row
    before = np.cumsum(lengths) - lengths
    column = before - np.repeat(before[np.cumsum(counts) - counts], counts)
    seq_len = batch["tokens"].shape[1]
    to = ranges(np.repeat(at, counts) * seq_len + column, lengths)
    slots = ranges(starts, lengths)
    flat, offsets = data.stored.tokens, data.stored.offsets
    following = np.minimum(slots + 1, len(flat) - 1)
    targets = flat[following].astype(np.int32)
    ends = starts + lengths
    targets[(np.cumsum(lengths) - 1)[offsets[np.searchsorted(offsets, ends)] == ends]] = pad_id
    values = {"tokens": flat[slots], "targets": targets, "mask": data.stored.mask(slots)}
    if data.stored.tags is not None:
        values["tags"] = data.stored.tags[slots]
    values |= {"segments": np.repeat(nth + 1, lengths), "positions": ranges(np.zeros_like(lengths), lengths)}
    for key, value in values.items():
        batch[key].reshape(-1)[to] = value


def painted(batch: Batch, row: int, tokenizer: Tokenizer) -> "rich.text.Text":
    """Returns the text of a row as a `rich.text.Text` with colors. Tokens that count in the loss are green. Control
    tokens are shown with inverted colors, to distinguish them from plain text that spells a control token."""
    from rich.text import Text

    segments, control = batch["segments"][row], np.isin(batch["tokens"][row], list(tokenizer.special.values()))
    learnt = np.concatenate([[0], batch["mask"][row][:-1]])  # mask[t - 1] says whether token t counts in the loss
    text = Text()
    for document in range(1, int(segments.max()) + 1):
        text.append(" | " if document > 1 else "", style="bold red")
        slots = np.flatnonzero(segments == document)
        for run in np.split(slots, np.flatnonzero(np.diff(2 * learnt[slots] + control[slots])) + 1):
            style = ("green" if learnt[run[0]] else "dim") + " reverse" * bool(control[run[0]])
            text.append(tokenizer.decode(batch["tokens"][row, run]), style=style)
    return text
