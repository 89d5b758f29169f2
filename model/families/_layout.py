"""The mapping between a tensor of a checkpoint and our parameter, written like "(NH)D->DNH": the rows of the tensor are
N and H merged, its columns are D, and our parameter has the axes D, N, H.

The same declaration serves reading and writing, and determines which slice of the file a slice of our parameter needs.
The letters are those of AXES in model/weights.py, and P for learned positions. A digit marks an axis that holds several
parameters one after the other: "D(3NH)->DNH" with part 1 is the middle third (GPT-2's keys). "1" is an axis of
size 1 that our parameter does not have.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Index = tuple[slice, ...]


class Key(NamedTuple):
    name: str  # of the tensor in the checkpoint; {} stands for the number of the layer
    layout: str
    part: int = 0
    less: float = 0.0  # subtracted from our values to get the checkpoint's (1 for Gemma's scales)


def parse(layout: str) -> tuple[list[str], str]:
    """ "(NH)D->DNH" -> (["NH", "D"], "DNH")."""
    theirs, ours = layout.split("->")
    axes, merged = [], None
    for c in theirs:
        if c == "(":
            merged = ""
        elif c == ")":
            axes, merged = [*axes, merged], None
        elif merged is None:
            axes.append(c)
        else:
            merged += c
    return axes, ours


def size(letters: str, sizes: dict[str, int]) -> int:
    """The size of an axis that merges the axes `letters`."""
    return math.prod(int(c) if c.isdigit() else sizes[c] for c in letters)


def shape(key: Key, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of the checkpoint's tensor."""
    return tuple(size(letters, sizes) for letters in parse(key.layout)[0])


def our_shape(key: Key, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[c] for c in parse(key.layout)[1])


def read(key: Key, tensor: Callable[[Index], np.ndarray], sizes: dict[str, int], index: Index) -> np.ndarray:
    """The slice `index` of our parameter; `tensor` reads slices of the checkpoint's tensor.

    If the file merges axes, only the first of them is sliced in the file, since only that slice is contiguous.
    """
    axes, ours = parse(key.layout)
    wanted = dict(zip(ours, index, strict=True))
    cuts, split = [], []
    for merged in axes:
        letters = merged.lstrip("0123456789")
        if not letters:
            cuts.append(slice(0, 1))
            continue
        inner = size(letters[1:], sizes)
        start, stop, _ = wanted.pop(letters[0]).indices(sizes[letters[0]])
        offset = key.part * size(letters, sizes) if letters != merged else 0
        cuts.append(slice(offset + start * inner, offset + stop * inner))
        split += [stop - start, *(sizes[c] for c in letters[1:])]
    order = "".join(axes).translate({ord(d): None for d in "0123456789"})
    x = tensor(tuple(cuts)).reshape(split).transpose([order.index(c) for c in ours])
    x = x[tuple(wanted.get(c, slice(None)) for c in ours)]
    return x.astype(np.float32) + np.float32(key.less) if key.less else x


def write(parts: list[tuple[Key, np.ndarray]], sizes: dict[str, int]) -> np.ndarray:
    """The checkpoint's tensor, built from the parameters that it holds: the inverse of `read`."""
    arrays = []
    for key, x in sorted(parts, key=lambda part: part[0].part):
        axes, ours = parse(key.layout)
        letters = [merged.lstrip("0123456789") for merged in axes]
        x = x.transpose([ours.index(c) for c in "".join(letters)])
        arrays.append((x - key.less if key.less else x).reshape([size(l, sizes) for l in letters]))
    several = next((i for i, merged in enumerate(axes) if merged[0].isdigit()), 0)
    return np.ascontiguousarray(arrays[0] if len(arrays) == 1 else np.concatenate(arrays, several))
