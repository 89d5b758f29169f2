"""Block sizes of the kernels, from the schedules that `python -m tools.kernel_report` reads.

One row serves v5e, v5p, v6e and TPU7x: what fills the MXU of v6e, 256 wide, fits the VMEM of v5p and TPU7x.
"""

VMEM = 60 * 2**20  # bytes; v5p and TPU7x have 64 MiB a core

# Rows of x, columns of W and rows of W. A decoding step wants 2 M weights a block, a prefill on v6e 560 FLOPs a byte.
INT4_FEW = (128, 768, 6144)
INT4 = (1024, 2048, 1024)
NF4 = (4096, 128)  # rows and columns of W

# On a GPU, by the most rows of x: rows, columns, warps, and 64 rows of W how often ahead. None spills on an H100.
INT4_TRITON = {16: (16, 64, 4, 6), 64: (64, 64, 4, 6), 512: (128, 128, 8, 2)}
WARPS = 8 * 132  # wanted, eight a multiprocessor: 24 KB under way in each, more than 600 ns of its share of HBM


def cut(size: int, limit: int, tile: int) -> int:
    """The largest block of whole tiles up to `limit`, and of half of it or more, that pads `size` least."""
    return size if size <= limit else min(range(limit - limit % tile, limit // 2, -tile), key=lambda b: -size % b)
