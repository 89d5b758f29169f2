"""Packs documents into rows of T slots. A row is stored as a list of references to pieces of documents, without copying
any tokens.

A slot is a position in a row. It holds a token as the input and the next token as the target, so a piece of n tokens
fills n slots. The last token of a document has no next token, so its slot does not count in the loss.
"""

from typing import NamedTuple

import numpy as np

from data.rows.mixture import permute

BLOCK = 10_000  # number of pieces that are packed at a time


class Pieces(NamedTuple):
    starts: np.ndarray  # int64 [P], index of each piece's first token in the flat array of tokens
    lengths: np.ndarray  # int64 [P], in tokens


class Rows(NamedTuple):
    """Rows of pieces: row r consists of the pieces bounds[r] to bounds[r + 1] - 1."""

    starts: np.ndarray  # int64 [P]
    lengths: np.ndarray  # int64 [P]
    bounds: np.ndarray  # int64 [R + 1], for R rows

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def fill(self, seq_len: int) -> float:
        """The fraction of the slots that hold a token instead of padding."""
        return float(self.lengths.sum() / max(len(self) * seq_len, 1))


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenates arange(s, s + n) for each start s and its length n."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def cut(pieces: Pieces, seq_len: int) -> Pieces:
    """Splits each piece that is longer than a row into full rows and a remainder. Nothing is dropped."""
    counts = -(-pieces.lengths // seq_len)
    nth = ranges(np.zeros_like(counts), counts)
    starts = np.repeat(pieces.starts, counts) + nth * seq_len
    lengths = np.minimum(np.repeat(pieces.lengths, counts) - nth * seq_len, seq_len)
    return Pieces(starts, lengths)


def truncate(pieces: Pieces, seq_len: int) -> Pieces:
    """Shortens each piece that is longer than a row to the length of a row. The tokens that do not fit are lost."""
    return Pieces(pieces.starts, np.minimum(pieces.lengths, seq_len))


def none(pieces: Pieces) -> Rows:
    """Puts each piece into a row of its own."""
    return Rows(*pieces, np.arange(len(pieces.starts) + 1))


def concat(pieces: Pieces, seq_len: int) -> Rows:
    """Joins all documents, and cuts the result into rows of `seq_len` slots. Only the last row has padding."""
    ends = np.cumsum(pieces.lengths)
    begins = ends - pieces.lengths
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(begins, np.arange(0, total, seq_len))
    document = np.searchsorted(begins, cuts, side="right") - 1
    lengths = np.diff(np.append(cuts, total))
    bounds = np.searchsorted(cuts, np.arange(0, total, seq_len))
    return Rows(pieces.starts[document] + cuts - begins[document], lengths, np.append(bounds, len(cuts)))


def best_fit(pieces: Pieces, seq_len: int, seed: int) -> Rows:
    """Divides the pieces at random into blocks of BLOCK pieces, and packs each block separately: from the longest piece
    to the shortest, each piece goes into the fullest row that has enough space. No piece is cut.

    The algorithm is best-fit-decreasing bin packing, as in Ding et al. 2024, "Fewer Truncations Improve Language
    Modeling".
    """
    n = len(pieces.lengths)
    order = permute(np.arange(n), n, seed, 2) if n else np.zeros(0, np.int64)
    rows: list[list[int]] = []
    for begin in range(0, n, BLOCK):
        block = order[begin : begin + BLOCK]
        rows += [[int(block[i]) for i in row] for row in _best_fit(pieces.lengths[block], seq_len)]
    chosen = np.array([i for row in rows for i in row], np.int64)
    bounds = np.cumsum([0, *map(len, rows)])
    return Rows(pieces.starts[chosen], pieces.lengths[chosen], bounds)


def _best_fit(lengths: np.ndarray, seq_len: int) -> list[list[int]]:
    """Packs pieces into rows. Each row is a list of the indices of its pieces. Bit s of the integer `open_` is set if
    there is a row with s free slots. For a piece of n tokens, the lowest set bit at position n or above therefore gives
    the fullest row that has enough space."""
    rows: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(seq_len + 1)]
    open_ = 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[i])
        above = open_ >> size
        if above:
            space = size + (above & -above).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                open_ ^= 1 << space
            rows[row].append(i)
        else:
            space, row = seq_len, len(rows)
            rows.append([i])
        left = space - size
        if left:
            by_space[left].append(row)
            open_ |= 1 << left
    return rows
