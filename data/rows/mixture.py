"""Determines the order of rows. Permutations and mixtures are computed by arithmetic on indices, so the rows of any
step can be computed directly."""

import numpy as np

BLOCK = 1000  # rows per block; each block contains weight * BLOCK rows of a source, rounded
ROUNDS = 6


def permute(index: np.ndarray, n: int, *key: int) -> np.ndarray:
    """Applies a pseudorandom permutation of 0 to n - 1, determined by `key`, to each value in `index`. No table is
    needed: a Feistel cipher is applied repeatedly until the value is below n.

    This is the method of Black & Rogaway 2002, "Ciphers with arbitrary finite domains".
    """
    half = max((max(n - 1, 1).bit_length() + 1) // 2, 1)
    keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    value = _feistel(np.asarray(index, np.uint64), half, keys)
    while (outside := value >= n).any():
        value[outside] = _feistel(value[outside], half, keys)
    return value.astype(np.int64)


def _feistel(value: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    low = np.uint64((1 << half) - 1)
    left, right = value >> np.uint64(half), value & low
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & low)
    return (left << np.uint64(half)) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of the random number generator splitmix64, with products modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shares(weights: list[float]) -> np.ndarray:
    """The number of rows of each source in a block of BLOCK rows, as int64. The weights are rounded by the largest
    remainder method, and each source gets at least one row."""
    exact = np.asarray(weights) / sum(weights) * BLOCK
    counts = np.maximum(np.floor(exact), 1).astype(np.int64)
    for i in np.argsort(counts - exact, kind="stable")[: max(BLOCK - counts.sum(), 0)]:
        counts[i] += 1
    counts[np.argmax(counts)] += BLOCK - counts.sum()
    return counts


def assign(index: np.ndarray, counts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps each index of the mixed stream of rows to (source, number of earlier rows from the same source)."""
    if len(counts) == 1:
        return np.zeros_like(index), index
    block, place = index // BLOCK, index % BLOCK
    shuffled = np.empty_like(index)
    for b in np.unique(block):
        shuffled[block == b] = permute(place[block == b], BLOCK, seed, 1, int(b))
    ends = np.cumsum(counts)
    source = np.searchsorted(ends, shuffled, side="right")
    return source, block * counts[source] + shuffled - (ends - counts)[source]


def row(nth: np.ndarray, n: int, seed: int, shuffle: bool) -> np.ndarray:
    """The row numbers at the positions `nth` of an endless stream, in which each epoch consists of the same n rows. If
    `shuffle` is set, each epoch has a new order."""
    epoch, place = nth // n, nth % n
    if not shuffle:
        return place
    rows = np.empty_like(place)
    for e in np.unique(epoch):
        rows[epoch == e] = permute(place[epoch == e], n, seed, 0, int(e))
    return rows
