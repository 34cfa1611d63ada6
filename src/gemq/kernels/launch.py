"""How the decode kernels are cut and launched.

Block sizes are ``configure``'s rule, not a search at run time, and layers with the usual widths share their
kernels: compiling is part of the time to the first token. Knows tensors, not modules; triton is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gemq.kernels import decode_kernels, fields
from gemq.kernels.activation import Activation

_LOW = (2, 3, 4, 8)


class Config(NamedTuple):
    """How a kernel is cut. One compiled kernel for each."""

    block_rows: int  # rows of a program
    split: int  # groups taken at once, spread over the warps
    num_warps: int
    num_stages: int = 1  # of asynchronous copies; 1: none
    max_registers: int | None = None  # of a thread; None leaves it to the compiler
    pdl: bool = False  # the down kernel starts while the up kernel ends (Hopper)

    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.num_warps, "maxnreg": self.max_registers}


def configure(rows: int, groups: int, units: int, columns: int, dtype: torch.dtype) -> Config:
    """The cut for ``units`` matrices of [rows, groups of columns] and 8 or 16 columns of activations."""
    # Measured on an H100 for OLMoE's experts (docs/kernels.md): 64 rows without asynchronous copies. Small problems
    # need more programs than that gives, for a GPU has 100 to 150 multiprocessors; float32 needs more registers.
    if rows * units >= 64 * 256 and dtype != torch.float32:
        return Config(64, min(4, triton.next_power_of_2(groups)), num_warps=4)
    block_rows = 32 if rows * units >= 32 * 256 else 16
    split = 4 if block_rows == 32 or dtype == torch.float32 else 8  # shared memory: three parts of each x
    return Config(block_rows, min(split, triton.next_power_of_2(groups)), num_warps=4)


def _widths(levels: Sequence[int]) -> tuple[int, ...]:
    """The widths that a kernel is compiled for: layers that mix the usual ones share one kernel."""
    present = set(levels)
    if len(present) == 1:
        return tuple(present)
    return (*_LOW, *sorted(present - set(_LOW)))


def _kind(x: Tensor) -> int:
    if x.device.type != "cuda" or torch.version.hip is not None:
        return int(fields.PLAIN)
    return int({torch.bfloat16: fields.BF16, torch.float16: fields.FP16, torch.float32: fields.SPLIT}[x.dtype])


def _on(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


class _Routing(NamedTuple):
    """What both kernels need to know of a routing."""

    tokens: int
    slots: int
    experts: int
    units: int
    columns: int

    @classmethod
    def of(cls, index: Tensor, table: Tensor) -> _Routing:
        tokens, slots = index.shape
        experts = table.shape[0]
        return cls(tokens, slots, experts, min(experts, tokens * slots), 8 if tokens <= 8 else 16)

    def constants(self) -> dict[str, int | bool]:
        return {
            "K": self.slots,
            "P": triton.next_power_of_2(self.columns * self.slots),
            "EXPERTS": triton.next_power_of_2(self.experts),
            "BY_PAIR": self.tokens * self.slots <= self.experts,
            "N": self.columns,
        }


def launch_up(
    hidden: Tensor,
    index: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor,
    table: Tensor,
    bias: Tensor | None,
    rows: int,
    group_size: int,
    levels: Sequence[int],
    activation: Activation,
    arrivals: Tensor | None,
    config: Config | None = None,
) -> Tensor:
    function, gated, interleaved, clamp, limit, alpha, shift = activation
    routing = _Routing.of(index, table)
    groups = hidden.shape[1] // group_size
    config = config or configure(rows, groups, routing.units, routing.columns, hidden.dtype)
    out = hidden.new_empty(routing.tokens, routing.slots, rows // 2 if gated else rows)
    count = 0 if arrivals is None else arrivals.numel()
    blocks = triton.cdiv(rows, config.block_rows)
    with _on(hidden):
        decode_kernels.experts_up_kernel[(routing.units, blocks)](
            hidden,
            index,
            codes,
            scales,
            offsets,
            table,
            hidden if bias is None else bias,
            out,
            index if arrivals is None else arrivals,
            routing.tokens,
            rows,
            routing.experts,
            count,
            limit if math.isfinite(limit) else 0.0,
            alpha,
            shift,
            ARRIVALS=triton.next_power_of_2(max(count, 1)),
            **routing.constants(),
            GATED=gated,
            INTERLEAVED=interleaved,
            ACTIVATION=function,
            CLAMP=clamp,
            HAS_BIAS=bias is not None,
            WIDTHS=_widths(levels),
            KIND=_kind(hidden),
            G=group_size,
            NG=groups,
            M=config.block_rows,
            S=config.split,
            STAGES=config.num_stages,
            PDL=config.pdl,
            **config.options(),
        )
    return out


def launch_down(
    h: Tensor,
    index: Tensor,
    weights: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor,
    table: Tensor,
    bias: Tensor | None,
    rows: int,
    group_size: int,
    levels: Sequence[int],
    arrivals: Tensor | None,
    config: Config | None = None,
) -> Tensor:
    """[T, rows], or the unweighted [T, K, rows] without ``weights``. ``arrivals``: zeros, one for each block."""
    routing = _Routing.of(index, table)
    groups = h.shape[2] // group_size
    config = config or configure(rows, groups, routing.units, routing.columns, h.dtype)
    weighted = weights is not None
    parts = torch.empty(
        (routing.tokens, routing.slots, rows), dtype=torch.float32 if weighted else h.dtype, device=h.device
    )
    out = h.new_empty(routing.tokens, rows) if weighted else parts
    options = {"launch_pdl": True} if config.pdl else {}
    with _on(h):
        decode_kernels.experts_down_kernel[(routing.units, triton.cdiv(rows, config.block_rows))](
            h,
            index,
            h if weights is None else weights,
            codes,
            scales,
            offsets,
            table,
            h if bias is None else bias,
            parts,
            index if arrivals is None else arrivals,
            out,
            routing.tokens,
            rows,
            routing.experts,
            routing.units,
            **routing.constants(),
            HAS_BIAS=bias is not None,
            WEIGHTED=weighted,
            WIDTHS=_widths(levels),
            KIND=_kind(h),
            G=group_size,
            NG=groups,
            M=config.block_rows,
            S=config.split,
            STAGES=config.num_stages,
            PDL=config.pdl,
            **config.options(),
            **options,
        )
    return out


def down_blocks(rows: int, columns: int, group_size: int, index: Tensor, table: Tensor, dtype: torch.dtype) -> int:
    routing = _Routing.of(index, table)
    return triton.cdiv(rows, configure(rows, columns // group_size, routing.units, routing.columns, dtype).block_rows)


def launch_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    levels: int,
    group_size: int,
    config: Config | None = None,
) -> Tensor:
    tokens, columns = x.shape
    rows, groups = scales.shape
    padded = 8 if tokens <= 8 else 16
    config = config or configure(rows, groups, 1, padded, x.dtype)
    out = x.new_empty(tokens, rows)
    with _on(x):
        decode_kernels.linear_kernel[(triton.cdiv(rows, config.block_rows),)](
            x,
            codes,
            scales,
            offsets,
            x if bias is None else bias,
            out,
            tokens,
            rows,
            HAS_BIAS=bias is not None,
            LEVELS=levels,
            KIND=_kind(x),
            G=group_size,
            NG=columns // group_size,
            M=config.block_rows,
            S=config.split,
            N=padded,
            STAGES=config.num_stages,
            **config.options(),
        )
    return out
