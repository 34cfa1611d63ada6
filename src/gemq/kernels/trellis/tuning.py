"""Block sizes of the kernels in ``trellis.decode``.

They are fixed rules, since compiling is part of the time to the first token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

MIN_PROGRAMS = 512
"""Rows are split between programs until there are this many: about four for each multiprocessor of an H100."""


class RowsConfig(NamedTuple):
    """Launch options of ``decode.rows_kernel``. Each one compiles to a kernel of its own.

    Attributes:
        tile_rows: rows of tiles of a program
        tiles: tiles of a step
        pairs: pairs of token and expert that share the decoded weights
        num_warps: warps of a program
        folded: whether products contain the sum of the inputs, which saves an instruction for each weight
        prefetch: whether codes are requested before the previous kernel ends
        pdl: whether the kernel may start while the previous one ends, on GPUs that support this
    """

    tile_rows: int
    tiles: int
    pairs: int
    num_warps: int
    folded: bool = True
    prefetch: bool = True
    pdl: bool = True


def rows_config(tokens: int, slots: int, dtype: torch.dtype) -> RowsConfig:
    """Return the options for [tokens, slots] pairs and activations of ``dtype``."""
    pairs = 1 if tokens == 1 else 2 if tokens <= 4 else 4
    return RowsConfig(tile_rows=2, tiles=4, pairs=pairs, num_warps=4, folded=dtype != torch.float32)


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


def rotation_blocks(side: int) -> int:
    """Return the blocks of a program of ``decode.rotate_kernel``."""
    return max(1, triton.next_power_of_2(256 // side))
