"""How the decode kernels are cut and launched.

Two designs do the same. In 16-bit floats ``vector_kernels`` take one token at a time without tensor cores; float32, and
groups whose bytes do not come in words, go through the tensor cores, 8 or 16 tokens at once (``decode_kernels``).
Block sizes are rules, not a search at run time, and layers with the usual widths share their kernels: compiling is
part of the time to the first token. Knows tensors, not modules; triton is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gemq.kernels import decode_kernels, fields, vector_kernels
from gemq.kernels.activation import RAW, Activation
from gemq.kernels.fixed import covered
from gemq.kernels.gates import kernel_arguments

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
    num_warps: int
    max_registers: int | None = None  # of a thread; None leaves it to the compiler
    prefetch: bool = False
    pdl: bool = False  # the down kernel starts while the up kernel ends (Hopper)


class Config(NamedTuple):
    """How a kernel on the tensor cores is cut."""

    block_rows: int
    split: int  # groups taken at once, spread over the warps
    num_warps: int


def cut_for(rows: int, units: int) -> Cut:
    """The cut for ``units`` vectors through matrices of so many rows."""
    return Cut(64 if rows * units >= 64 * 256 else 32, num_warps=4)


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


def launch_up(
    hidden: Tensor, index: Tensor, up: Matrices, activation: Activation, cut: Cut | Config | None = None
) -> Tensor:
    """[T, H], [T, K] -> [T, K, rows], or half of them if gated; unused slots are not written."""
    tokens, slots = index.shape
    out = hidden.new_empty(tokens, slots, up.rows // 2 if activation.gated else up.rows)
    if isinstance(cut, Cut) or (cut is None and vectors_cover(up, hidden)):
        cut = cut or cut_for(up.rows, tokens * slots)
        _launch_vectors(hidden, index, None, up, out, activation, cut)
        return out
    units = min(up.experts, tokens * slots)
    config = cut or config_for(up.rows, hidden.shape[1] // up.group_size, units, hidden.dtype)
    numbers, constants = kernel_arguments(activation)
    with _on(hidden):
        decode_kernels.experts_up_kernel[(units, triton.cdiv(up.rows, config.block_rows))](
            *(hidden, index, *up.tensors(hidden), out, tokens, up.rows, up.experts, *numbers),
            **constants,
            **_routed(index, up.experts),
            **_column_constants(hidden, up, config),
            WIDTHS=_widths(up.levels),
        )
    return out


def launch_down(
    h: Tensor, index: Tensor, weights: Tensor | None, down: Matrices, cut: Cut | Config | None = None
) -> Tensor:
    """[T, K, I] -> [T, K, rows]: times ``weights`` in float32 with zeros in unused slots, or in h's dtype without."""
    tokens, slots = index.shape
    size, dtype = (tokens, slots, down.rows), h.dtype if weights is None else torch.float32
    if isinstance(cut, Cut) or (cut is None and vectors_cover(down, h)):
        parts = torch.empty(size, dtype=dtype, device=h.device)
        _launch_vectors(h, index, weights, down, parts, RAW, cut or cut_for(down.rows, tokens * slots))
        return parts
    units = min(down.experts, tokens * slots)
    config = cut or config_for(down.rows, h.shape[2] // down.group_size, units, h.dtype)
    parts = torch.zeros(size, dtype=dtype, device=h.device)
    inputs = (h, index, h if weights is None else weights, *down.tensors(h))
    with _on(h):
        decode_kernels.experts_down_kernel[(units, triton.cdiv(down.rows, config.block_rows))](
            *(*inputs, parts, tokens, down.rows, down.experts),
            **_routed(index, down.experts),
            **_column_constants(h, down, config),
            WEIGHTED=weights is not None,
            WIDTHS=_widths(down.levels),
        )
    return parts


def launch_linear(x: Tensor, w: Matrices, cut: Cut | Config | None = None) -> Tensor:
    """[T, columns] -> [T, rows]."""
    tokens, columns = x.shape
    out = x.new_empty(tokens, w.rows)
    if isinstance(cut, Cut) or (cut is None and tokens <= VECTOR_ROWS and vectors_cover(w, x)):
        _launch_vectors(x, None, None, w, out, RAW, cut or cut_for(w.rows, tokens))
        return out
    config = cut or config_for(w.rows, columns // w.group_size, 1, x.dtype)
    with _on(x):
        decode_kernels.linear_kernel[(triton.cdiv(w.rows, config.block_rows),)](
            *(x, *w.tensors(x), out, tokens, w.rows),
            **_column_constants(x, w, config),
            N=_columns(tokens),
            LEVELS=w.levels[0],
        )
    return out


def _launch_vectors(
    x: Tensor, index: Tensor | None, weights: Tensor | None, w: Matrices, out: Tensor, activation: Activation, cut: Cut
) -> None:
    """x [T, columns], or [T, K, columns] of pairs; without ``index`` the one matrix, K = 1."""
    slots = 1 if index is None else index.shape[1]
    vectors = x.shape[0] * slots
    numbers, constants = kernel_arguments(activation)
    stand_in = lambda tensor: x if tensor is None else tensor  # never read
    with _on(x):
        vector_kernels.vectors_kernel[(vectors, triton.cdiv(w.rows, cut.block_rows))](
            *(x, stand_in(index), stand_in(weights), w.codes, w.scales, w.offsets, stand_in(w.table)),
            *(stand_in(w.bias), out, w.rows, w.experts, *numbers),
            **constants,
            K=slots,
            ROUTED=index is not None,
            PER_PAIR=x.dim() == 3,
            HAS_BIAS=w.bias is not None,
            WEIGHTED=weights is not None,
            WIDTHS=_widths(w.levels),
            PLAIN=_kind(x) == fields.PLAIN,
            G=w.group_size,
            NG=x.shape[-1] // w.group_size,
            M=cut.block_rows,
            THREADS=32 * cut.num_warps,
            PREFETCH=cut.prefetch and x.is_cuda,
            PDL=cut.pdl,
            num_warps=cut.num_warps,
            maxnreg=cut.max_registers,
            **({"launch_pdl": True} if cut.pdl else {}),
        )


def _column_constants(x: Tensor, w: Matrices, config: Config) -> dict[str, Any]:
    sizes = {"G": w.group_size, "NG": x.shape[-1] // w.group_size, "M": config.block_rows, "S": config.split}
    return {**sizes, "KIND": _kind(x), "HAS_BIAS": w.bias is not None, "num_warps": config.num_warps}


VECTOR_ROWS = 4
"""Most rows of x that a linear takes one by one; more share the tensor cores' tile."""
