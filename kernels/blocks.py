"""Block sizes of the kernels, chosen by comparing compiled schedules with `python -m tools.kernel_report`.

TPU v5e, v5p, v6e and TPU7x use the same sizes, because blocks that are large enough for the 256-wide MXU of v6e also
fit in the VMEM of v5p and TPU7x.
"""

from typing import NamedTuple

VMEM = 60 * 2**20  # limit on the use of VMEM, in bytes; TPU v5p and TPU7x have 64 MiB per core

# The size of a block, as (rows of x, columns of W, rows of W). To be efficient, a decoding step needs blocks of 2
# million weights, and a prefill on v6e must perform 560 FLOPs per byte that it reads from memory.
INT4_FEW = (128, 768, 6144)
INT4 = (1024, 2048, 1024)
NF4 = (4096, 128)  # rows and columns of W


class GpuTile(NamedTuple):
    """The block sizes of one program of `codes_triton`."""

    rows: int  # rows of x
    columns: int  # columns of W
    depth: int  # rows of packed bytes of W read per step
    warps: int
    busy: int  # desired warps per multiprocessor, reached by splitting the rows of W over more programs


# {largest number of rows of x: tile}. Each tile is the fastest of 8 to 20 candidates on an H100, for int4 and int8.
CODES_TRITON = {16: GpuTile(16, 64, 64, 4, busy=16), 256: GpuTile(64, 128, 64, 4, busy=8)}
PROCESSORS = 132  # number of multiprocessors of an H100


def cut(size: int, limit: int, tile: int) -> int:
    """Returns the block size for a dimension of length `size`. If `size` is at most `limit`, this is `size` itself.

    For a larger `size`, the block size is the multiple of `tile` between limit / 2 and `limit` that needs the least
    padding. If several multiples need the same padding, the largest of them is returned.
    """
    return size if size <= limit else min(range(limit - limit % tile, limit // 2, -tile), key=lambda b: -size % b)
