"""Block sizes of the kernels, chosen from the compiled schedules that `python -m tools.kernel_report` analyzes.

The same sizes serve v5e, v5p, v6e and TPU7x: blocks that fill the 256-wide MXU of v6e still fit the VMEM of v5p and
TPU7x.
"""

from typing import NamedTuple

VMEM = 60 * 2**20  # bytes; v5p and TPU7x have 64 MiB per core

# (rows of x, columns of W, rows of W) per block. To be efficient, a decoding step needs 2 M weights per block, and a
# prefill on v6e needs 560 FLOPs per byte.
INT4_FEW = (128, 768, 6144)
INT4 = (1024, 2048, 1024)
NF4 = (4096, 128)  # rows and columns of W


class GpuTile(NamedTuple):
    """The tile of one program of `codes_triton`."""

    rows: int  # rows of x
    columns: int  # columns of W
    depth: int  # rows of packed bytes of W per step
    warps: int
    busy: int  # desired warps per multiprocessor, reached by splitting the rows of W over programs


# {largest number of rows of x: tile}. Each tile is the fastest of 8 to 20 on an H100, for int4 and int8 together.
CODES_TRITON = {16: GpuTile(16, 64, 64, 4, busy=16), 256: GpuTile(64, 128, 64, 4, busy=8)}
PROCESSORS = 132  # multiprocessors of an H100


def cut(size: int, limit: int, tile: int) -> int:
    """The block size for a dimension of `size`: `size` itself if it is at most `limit`, else the multiple of `tile`
    between limit / 2 and `limit` that needs the least padding; of equally good multiples, the largest."""
    return size if size <= limit else min(range(limit - limit % tile, limit // 2, -tile), key=lambda b: -size % b)
