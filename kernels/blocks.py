"""Block sizes of the kernels, from the schedules that `python -m tools.kernel_report` reads.

One row serves v5e, v5p, v6e and TPU7x: what fills the MXU of v6e, 256 wide, fits the VMEM of v5p and TPU7x.
"""

from typing import NamedTuple

VMEM = 60 * 2**20  # bytes; v5p and TPU7x have 64 MiB a core

# Rows of x, columns of W and rows of W. A decoding step wants 2 M weights a block, a prefill on v6e 560 FLOPs a byte.
INT4_FEW = (128, 768, 6144)
INT4 = (1024, 2048, 1024)
NF4 = (4096, 128)  # rows and columns of W


class GpuTile(NamedTuple):
    """What a program of `codes_triton` has."""

    rows: int  # of x
    columns: int  # of W
    depth: int  # rows of bytes of W in a step
    warps: int
    busy: int  # warps wanted a multiprocessor: rows of W are shared out for that


# By the most rows of x; the fastest of eight to twenty tiles on an H100, for int4 and int8 together.
CODES_TRITON = {16: GpuTile(16, 64, 64, 4, busy=16), 256: GpuTile(64, 128, 64, 4, busy=8)}
PROCESSORS = 132  # of an H100


def cut(size: int, limit: int, tile: int) -> int:
    """The largest block of whole tiles up to `limit`, and of half of it or more, that pads `size` least."""
    return size if size <= limit else min(range(limit - limit % tile, limit // 2, -tile), key=lambda b: -size % b)
