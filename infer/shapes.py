"""Sizes of batches and paddings, rounded up to a few shapes, so that a process compiles few programs."""

from collections.abc import Iterator, Sequence

PREFILL = 512  # prompt tokens per forward pass; bounds the attention scores and the number of shapes


def bucket(n: int, least: int = 1) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least n."""
    power = least
    while power < n:
        if power * 3 // 2 >= n and power > 1:
            return power * 3 // 2
        power *= 2
    return power


def width(longest: int) -> int:
    """Columns for prompts of at most `longest` tokens; above PREFILL, a multiple of PREFILL."""
    return bucket(longest, 16) if longest <= PREFILL else -(-longest // PREFILL) * PREFILL


def batches(lengths: Sequence[int], budget: int, order: Sequence[int] | None = None) -> Iterator[list[int]]:
    """Groups indices, sorted by length or in `order`, into batches of at most `budget` padded tokens, or of a single
    row."""
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
