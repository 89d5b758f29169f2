"""Converts between checkpoint tensors and our parameters, according to layouts such as "(NH)D->DNH".

The layout "(NH)D->DNH" means that the checkpoint's tensor has shape [N * H, D], and our parameter has shape [D, N, H].
The same layout is used for reading and writing. It also determines which slice of the file to read for a given slice of
our parameter. AXES in model/weights.py defines the letters, except P, which stands for learned positions. A digit
before letters means that the tensor is a concatenation of this number of parameters along this axis. For example,
"D(3NH)->DNH" describes GPT-2's weights for queries, keys and values, which are one tensor. The weights for keys are its
part 1 (counted from 0), the middle third. A "1" stands for an axis of size 1 that our parameter lacks.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Index = tuple[slice, ...]


class Key(NamedTuple):
    name: str  # the tensor's name in the checkpoint; {} stands for the layer index
    layout: str
    part: int = 0
    less: float = 0.0  # our value minus the checkpoint's value: 1 for norm scales of Gemma, which stores scale - 1


def parse(layout: str) -> tuple[list[str], str]:
    """Splits a layout such as "(NH)D->DNH" into its two sides: (["NH", "D"], "DNH")."""
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
    """Returns the size of a merged axis, which is the product of the sizes of the axes `letters`."""
    return math.prod(int(c) if c.isdigit() else sizes[c] for c in letters)


def shape(key: Key, sizes: dict[str, int]) -> tuple[int, ...]:
    """Returns the shape of the checkpoint's tensor."""
    return tuple(size(letters, sizes) for letters in parse(key.layout)[0])


def our_shape(key: Key, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[c] for c in parse(key.layout)[1])


def read(key: Key, tensor: Callable[[Index], np.ndarray], sizes: dict[str, int], index: Index) -> np.ndarray:
    """Returns the slice `index` of our parameter. The function `tensor` reads slices of the checkpoint's tensor.

    If an axis in the file merges several axes, only a slice along the first of them is contiguous in the file. So the
    other axes are read completely and then sliced in memory.
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
    """Builds a checkpoint tensor from all parameters that it contains. This is the inverse of `read`."""
    arrays = []
    for key, x in sorted(parts, key=lambda part: part[0].part):
        axes, ours = parse(key.layout)
        letters = [merged.lstrip("0123456789") for merged in axes]
        x = x.transpose([ours.index(c) for c in "".join(letters)])
        arrays.append((x - key.less if key.less else x).reshape([size(l, sizes) for l in letters]))
    several = next((i for i, merged in enumerate(axes) if merged[0].isdigit()), 0)
    return np.ascontiguousarray(arrays[0] if len(arrays) == 1 else np.concatenate(arrays, several))
