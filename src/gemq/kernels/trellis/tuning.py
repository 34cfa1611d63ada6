"""Block sizes of the kernels in ``trellis.decode``.

They are fixed rules, since compiling is part of the time to the first token.
"""

from __future__ import annotations

from typing import NamedTuple

MIN_PROGRAMS = 512
"""Rows are split between programs until there are this many: about four for each multiprocessor of an H100."""

ROTATION_GROUPS = 4
"""Groups of 128 columns that a program of the rotation takes, one for each warp."""


class ProductConfig(NamedTuple):
    """Launch options of ``decode.rows_kernel``. Each one compiles to a kernel of its own.

    Attributes:
        tile_rows: rows of tiles of a program
        num_warps: warps of a program, which share its rows
        multiplied: weights of a period that are moved by a multiplication, see ``values.period_products``
        prefetch: whether codes are requested before the previous kernel ends
        pdl: whether the kernel may start while the previous one ends, on GPUs that support this
    """

    tile_rows: int
    num_warps: int
    multiplied: int = 4
    prefetch: bool = True
    pdl: bool = True


def product_config() -> ProductConfig:
    """Return the launch options of ``launch.launch_rows``."""
    return ProductConfig(tile_rows=2, num_warps=4)


def num_sets(pairs: int, experts: int) -> int:
    """Return how many sets of four pairs a slot has, so that few experts need two slots."""
    mean = pairs / experts
    return 1 if mean <= 2 else 2


def num_slots(pairs: int, experts: int, sets: int) -> int:
    """Return how many slots are enough for any routing. If that is ``pairs``, each pair has a slot."""
    return min(pairs, pairs // (4 * sets) + experts + 1)


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
