"""Block sizes of the kernels in ``trellis.decode``.

They are fixed rules, since compiling is part of the time to the first token.
"""

from __future__ import annotations

from typing import NamedTuple

MIN_PROGRAMS = 512
"""Rows are split between programs until there are this many: about four for each multiprocessor of an H100."""


class ProductConfig(NamedTuple):
    """Launch options of ``decode.rows_kernel``. Each one compiles to a kernel of its own.

    Attributes:
        tile_rows: rows of tiles of a program
        steps: steps of 32 columns that the warps of a program share
        num_warps: warps of a program
        centered: whether to subtract the mean of the codes from each weight; otherwise products contain the sum of the
            inputs, which saves half an instruction per weight and costs three bits of the sums
        prefetch: whether codes are requested before the previous kernel ends
        pdl: whether the kernel may start while the previous one ends, on GPUs that support this
    """

    tile_rows: int
    steps: int
    num_warps: int
    centered: bool = False
    prefetch: bool = True
    pdl: bool = True


PRODUCT = ProductConfig(tile_rows=1, steps=4, num_warps=4)
"""The options for any number of pairs of token and expert."""


def num_splits(pairs: int, rows: int, columns: int) -> int:
    """Return the number of programs that share a row (split-K), for the pairs of a layer.

    Depends on shapes only, since it is a dimension of the result.
    """
    programs = pairs * (rows // 16) // 2
    blocks = columns // 128
    splits = 1
    while programs * splits < MIN_PROGRAMS and blocks % (2 * splits) == 0 and blocks // (2 * splits) >= 8:
        splits *= 2
    return splits
