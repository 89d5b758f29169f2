"""Rounds the sizes of batches and the lengths of padded rows up to a few values, so that a process compiles few
programs."""

from collections.abc import Iterator, Sequence

PREFILL = 512  # maximum prompt tokens per forward pass; limits the memory for attention scores and the number of shapes


def bucket(n: int, least: int = 1) -> int:
    """The smallest number in the series 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least n and at least `least`."""
    power = least
    while power < n:
        if power * 3 // 2 >= n and power > 1:
            return power * 3 // 2
        power *= 2
    return power


def width(longest: int) -> int:
    """The number of columns to which prompts of at most `longest` tokens are padded. Above PREFILL, this number is a
    multiple of PREFILL."""
    return bucket(longest, 16) if longest <= PREFILL else -(-longest // PREFILL) * PREFILL


def batches(lengths: Sequence[int], budget: int, order: Sequence[int] | None = None) -> Iterator[list[int]]:
    """Groups the indices of rows into batches of at most `budget` padded tokens. The rows are sorted by length, or
    taken in `order` if it is given. A row that is longer than `budget` gets a batch of its own."""
    batch: list[int] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__) if order is None else order:
        longest = max(longest, lengths[i])
        if batch and bucket(len(batch) + 1) * bucket(longest, 16) > budget:
            yield batch
            batch, longest = [], lengths[i]
        batch.append(i)
    if batch:
        yield batch
