"""Block sizes of the decode kernels, and which of the two designs computes a product.

In 16-bit floats, ``vector_kernels`` compute one token at a time without tensor cores. float32, and groups whose bytes
do not fill words, go through the tensor cores, 8 or 16 tokens at a time (``tensor_core``). Block sizes are fixed rules
instead of a search at run time, since compiling is part of the time to the first token. They were measured on an H100
for the experts of OLMoE and Mixtral (docs/kernels.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

from gemq.kernels.decode.fixed_point import is_supported

COMMON_LEVELS = (2, 3, 4, 8)
"""Levels of the widths that experts usually have."""

MAX_VECTOR_PRODUCTS = 1 << 26
"""Linears with fewer multiplications in total use the vector kernels, larger ones the tensor cores. The measured times
are equal at 16 x 2048 x 2048."""

MAX_UNSPLIT_GROUPS = 32
"""Longer rows of the down projection, in groups, are split between programs."""

GROUPS_PER_SPLIT = 16
"""Groups of one program when a row is split."""


class VectorConfig(NamedTuple):
    """Launch options of a vector kernel. Each one compiles to a kernel of its own.

    Attributes:
        block_rows: rows of a program
        num_warps: warps of a program
        columns_per_lane: columns of a group that one thread computes
        max_registers: registers of a thread; None leaves the choice to the compiler
        pdl: whether the kernel may load its codes while the previous kernel ends, on GPUs that support this
    """

    block_rows: int
    num_warps: int
    columns_per_lane: int = 128
    max_registers: int | None = None
    pdl: bool = True


class TensorCoreConfig(NamedTuple):
    """Launch options of a kernel on the tensor cores.

    Attributes:
        block_rows: rows of a program
        groups_per_step: groups of one step, distributed over the warps
        num_warps: warps of a program
    """

    block_rows: int
    groups_per_step: int
    num_warps: int


LaunchConfig = VectorConfig | TensorCoreConfig


def vector_config(pairs: int, groups: int, is_down: bool = False, pdl: bool = True) -> VectorConfig:
    """Return the options for ``pairs`` of token and expert and rows of ``groups``. ``pdl`` as in ``VectorConfig``."""
    if pairs >= 32:
        return VectorConfig(64, num_warps=4 if is_down else 8, pdl=pdl)
    if groups >= 32 and not is_down:  # long rows take more registers
        return VectorConfig(16, num_warps=4, columns_per_lane=64, pdl=pdl)
    return VectorConfig(32, num_warps=4, pdl=pdl)


def linear_vector_config(tokens: int) -> VectorConfig:
    """Return the options for linears. They have few rows in total, so each program takes few."""
    return VectorConfig(32, num_warps=4, columns_per_lane=128 if tokens == 1 else 64)


def tensor_core_config(rows: int, groups: int, matrices: int, dtype: torch.dtype) -> TensorCoreConfig:
    """Return the options for a number of matrices of [rows, groups of columns].

    64 rows were fastest for OLMoE's experts. Small problems would then have fewer programs than a GPU has
    multiprocessors (100 to 150), and float32 needs more registers.
    """
    if rows * matrices >= 64 * 256 and dtype != torch.float32:
        return TensorCoreConfig(64, min(4, triton.next_power_of_2(groups)), num_warps=4)
    block_rows = 32 if rows * matrices >= 32 * 256 else 16
    # float32 needs shared memory for three parts of each x.
    groups_per_step = 4 if block_rows == 32 or dtype == torch.float32 else 8
    return TensorCoreConfig(block_rows, min(groups_per_step, triton.next_power_of_2(groups)), num_warps=4)


def vectors_cover(dtype: torch.dtype, columns: int, group_size: int, levels: Sequence[int]) -> bool:
    """Whether the vector kernels support matrices of these widths times activations [..., columns] of ``dtype``."""
    groups = columns // group_size
    if groups == 1:
        return False  # Triton 3.6 fails to compile them
    return dtype != torch.float32 and all(is_supported(count, group_size, groups) for count in levels)


def down_splits(dtype: torch.dtype, columns: int, group_size: int, levels: Sequence[int]) -> int:
    """Return the number of programs that share a row of the down projection (split-K).

    One program would take long for a row of Mixtral's. The sum over experts adds the splits up at no cost.
    """
    groups = columns // group_size
    if groups <= MAX_UNSPLIT_GROUPS or not vectors_cover(dtype, columns, group_size, levels):
        return 1
    return triton.cdiv(groups, GROUPS_PER_SPLIT)


def widths_for(levels: Sequence[int], group_size: int) -> list[int]:
    """Return the levels that a kernel is compiled for.

    Layers that mix the common widths share one kernel, and one compiled layer.
    """
    present = set(levels)
    if len(present) == 1 or group_size != 128:  # the vector kernels do not support every width in smaller groups
        return sorted(present)
    return [*COMMON_LEVELS, *sorted(present - set(COMMON_LEVELS))]
