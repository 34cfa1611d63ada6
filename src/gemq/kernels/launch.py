"""How the decode kernels are cut and launched.

Two designs do the same. In 16-bit floats ``vector_kernels`` take one token at a time without tensor cores; float32, and
groups whose bytes do not come in words, go through the tensor cores, 8 or 16 tokens at once (``decode_kernels``).
Block sizes are rules, not a search at run time, and layers with the usual widths share their kernels: compiling is
part of the time to the first token. Knows tensors, not modules; triton is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gemq.kernels import decode_kernels, fields, vector_kernels
from gemq.kernels.activation import Activation
from gemq.kernels.fixed import covered

_LOW = (2, 3, 4, 8)


class Matrices(NamedTuple):
    """One projection of all experts, as in ``packed.PackedMatrices``; a linear has no table."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor
    table: Tensor | None
    bias: Tensor | None  # [E, rows], or [rows]
    rows: int
    group_size: int
    levels: Sequence[int]  # of the widths that occur

    @property
    def experts(self) -> int:
        return 1 if self.table is None else self.table.shape[0]

    def tensors(self, stand_in: Tensor) -> tuple[Tensor, ...]:
        """As kernels take them: what is missing is never read."""
        bias = stand_in if self.bias is None else self.bias
        table = () if self.table is None else (self.table,)
        return (self.codes, self.scales, self.offsets, *table, bias)


class Cut(NamedTuple):
    """How a vector kernel is cut. One compiled kernel for each."""

    block_rows: int  # rows of a program
    lanes: int  # words of a row taken at once, spread over the threads of a warp
    num_warps: int
    max_registers: int | None = None  # of a thread; None leaves it to the compiler
    pdl: bool = False  # the down kernel starts while the up kernel ends (Hopper)


class Config(NamedTuple):
    """How a kernel on the tensor cores is cut."""

    block_rows: int
    split: int  # groups taken at once, spread over the warps
    num_warps: int


def cut_for(rows: int, units: int) -> Cut:
    """The cut for ``units`` vectors through matrices of so many rows."""
    return Cut(64 if rows * units >= 64 * 256 else 32, 128, num_warps=4)


def config_for(rows: int, groups: int, units: int, dtype: torch.dtype) -> Config:
    """The cut for ``units`` matrices of [rows, groups of columns]."""
    # Measured on an H100 for OLMoE's experts (docs/kernels.md): 64 rows. Small problems need more programs than that
    # gives, for a GPU has 100 to 150 multiprocessors; float32 needs more registers.
    if rows * units >= 64 * 256 and dtype != torch.float32:
        return Config(64, min(4, triton.next_power_of_2(groups)), num_warps=4)
    block_rows = 32 if rows * units >= 32 * 256 else 16
    split = 4 if block_rows == 32 or dtype == torch.float32 else 8  # shared memory: three parts of each x
    return Config(block_rows, min(split, triton.next_power_of_2(groups)), num_warps=4)


def vectors_cover(m: Matrices, x: Tensor) -> bool:
    """Whether the vector kernels compute with x [..., columns]."""
    groups = x.shape[-1] // m.group_size
    return x.dtype != torch.float32 and all(covered(levels, m.group_size, groups) for levels in m.levels)


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


def _routed(index: Tensor, experts: int) -> dict[str, int | bool]:
    """Constants of the kernels on the tensor cores."""
    tokens, slots = index.shape
    columns = _columns(tokens)
    return {
        "K": slots,
        "P": triton.next_power_of_2(columns * slots),
        "EXPERTS": triton.next_power_of_2(experts),
        "BY_PAIR": tokens * slots <= experts,
        "N": columns,
    }


def _columns(tokens: int) -> int:
    return 8 if tokens <= 8 else 16


def _gate(activation: Activation) -> tuple[tuple[float, ...], dict[str, Any]]:
    """An activation as kernels take it: numbers, constants."""
    limit = activation.limit if math.isfinite(activation.limit) else 0.0
    constants = {
        "GATED": activation.gated,
        "INTERLEAVED": activation.interleaved,
        "ACTIVATION": activation.function,
        "CLAMP": activation.clamp,
    }
    return (limit, activation.alpha, activation.shift), constants


def launch_up(
    hidden: Tensor, index: Tensor, up: Matrices, activation: Activation, cut: Cut | Config | None = None
) -> Tensor:
    """[T, H], [T, K] -> [T, K, rows], or half of them if gated; unused slots are not written."""
    tokens, slots = index.shape
    groups = hidden.shape[1] // up.group_size
    numbers, constants = _gate(activation)
    constants |= {"HAS_BIAS": up.bias is not None, "WIDTHS": _widths(up.levels), "G": up.group_size, "NG": groups}
    out = hidden.new_empty(tokens, slots, up.rows // 2 if activation.gated else up.rows)
    with _on(hidden):
        if isinstance(cut, Cut) or (cut is None and vectors_cover(up, hidden)):
            cut = cut or cut_for(up.rows, tokens * slots)
            vector_kernels.pairs_up_kernel[(tokens * slots, triton.cdiv(up.rows, cut.block_rows))](
                *(hidden, index, *up.tensors(hidden), out, up.rows, up.experts, *numbers),
                **constants,
                **_vector_constants(hidden, cut),
                K=slots,
                PDL=cut.pdl,
            )
            return out
        units = min(up.experts, tokens * slots)
        config = cut or config_for(up.rows, groups, units, hidden.dtype)
        decode_kernels.experts_up_kernel[(units, triton.cdiv(up.rows, config.block_rows))](
            *(hidden, index, *up.tensors(hidden), out, tokens, up.rows, up.experts, *numbers),
            **constants,
            **_routed(index, up.experts),
            **_column_constants(hidden, config),
        )
    return out


def launch_down(
    h: Tensor, index: Tensor, weights: Tensor | None, down: Matrices, cut: Cut | Config | None = None
) -> Tensor:
    """[T, K, I] -> [T, K, rows]: times ``weights`` in float32 with zeros in unused slots, or in h's dtype without."""
    tokens, slots = index.shape
    groups = h.shape[2] // down.group_size
    weighted = weights is not None
    dtype = torch.float32 if weighted else h.dtype
    constants: dict[str, Any] = {"HAS_BIAS": down.bias is not None, "WEIGHTED": weighted}
    constants |= {"WIDTHS": _widths(down.levels), "G": down.group_size, "NG": groups}
    inputs = (h, index, h if weights is None else weights, *down.tensors(h))
    size = (tokens, slots, down.rows)
    with _on(h):
        if isinstance(cut, Cut) or (cut is None and vectors_cover(down, h)):
            cut = cut or cut_for(down.rows, tokens * slots)
            parts = torch.empty(size, dtype=dtype, device=h.device)
            vector_kernels.pairs_down_kernel[(tokens * slots, triton.cdiv(down.rows, cut.block_rows))](
                *(*inputs, parts, down.rows, down.experts),
                **constants,
                **_vector_constants(h, cut),
                PDL=cut.pdl,
                **({"launch_pdl": True} if cut.pdl else {}),
            )
            return parts
        units = min(down.experts, tokens * slots)
        config = cut or config_for(down.rows, groups, units, h.dtype)
        parts = torch.zeros(size, dtype=dtype, device=h.device)
        decode_kernels.experts_down_kernel[(units, triton.cdiv(down.rows, config.block_rows))](
            *(*inputs, parts, tokens, down.rows, down.experts),
            **constants,
            **_routed(index, down.experts),
            **_column_constants(h, config),
        )
    return parts


def launch_linear(x: Tensor, w: Matrices, cut: Cut | Config | None = None) -> Tensor:
    """[T, columns] -> [T, rows]."""
    tokens, columns = x.shape
    groups = columns // w.group_size
    constants = {"HAS_BIAS": w.bias is not None, "LEVELS": w.levels[0], "G": w.group_size, "NG": groups}
    out = x.new_empty(tokens, w.rows)
    with _on(x):
        if isinstance(cut, Cut) or (cut is None and tokens <= VECTOR_ROWS and vectors_cover(w, x)):
            cut = cut or cut_for(w.rows, tokens)
            vector_kernels.rows_kernel[(tokens, triton.cdiv(w.rows, cut.block_rows))](
                *(x, *w.tensors(x), out, w.rows), **constants, **_vector_constants(x, cut)
            )
            return out
        config = cut or config_for(w.rows, groups, 1, x.dtype)
        decode_kernels.linear_kernel[(triton.cdiv(w.rows, config.block_rows),)](
            *(x, *w.tensors(x), out, tokens, w.rows), **constants, N=_columns(tokens), **_column_constants(x, config)
        )
    return out


VECTOR_ROWS = 4
"""Most rows of x that a linear takes one by one; more share the tensor cores' tile."""


def _vector_constants(x: Tensor, cut: Cut) -> dict[str, Any]:
    plain = _kind(x) == fields.PLAIN
    constants = {"PLAIN": plain, "M": cut.block_rows, "LANES": cut.lanes}
    return {**constants, "num_warps": cut.num_warps, "maxnreg": cut.max_registers}


def _column_constants(x: Tensor, config: Config) -> dict[str, Any]:
    return {"KIND": _kind(x), "M": config.block_rows, "S": config.split, "num_warps": config.num_warps}
