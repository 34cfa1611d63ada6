"""How the decode kernels are cut and launched.

Two designs do the same. In 16-bit floats ``vector_kernels`` take one token at a time without tensor cores; float32, and
groups whose bytes do not come in words, go through the tensor cores, 8 or 16 tokens at once (``decode_kernels``).
Block sizes are rules, not a search at run time, and layers with the usual widths share their kernels: compiling is
part of the time to the first token. Knows tensors, not modules; triton is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gemq.kernels.activation import RAW, Activation
from gemq.kernels.activation_triton import kernel_arguments
from gemq.kernels.decode import bit_fields, dp4a, tensor_core
from gemq.kernels.decode.fixed_point import covered, lanes_of
from gemq.kernels.decode.linear_fusion import MOST_LINEARS

_LOW = (2, 3, 4, 8)


class Matrices(NamedTuple):
    """One projection of all experts, as in ``packed.PackedMatrices``."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor
    table: Tensor
    bias: Tensor | None  # [E, rows]
    rows: int
    group_size: int
    levels: Sequence[int]  # of the widths that may occur

    @property
    def experts(self) -> int:
        return self.table.shape[0]

    def tensors(self, stand_in: Tensor) -> tuple[Tensor, ...]:
        """As kernels take them: a bias that is missing is never read."""
        return (self.codes, self.scales, self.offsets, self.table, stand_in if self.bias is None else self.bias)


class Linears(NamedTuple):
    """One to three matrices of the same columns and width, whose rows follow each other in the output."""

    codes: Sequence[Tensor]
    scales: Sequence[Tensor]
    offsets: Sequence[Tensor]
    biases: Sequence[Tensor]  # as many, or none
    levels: int
    group_size: int

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(codes.shape[0] for codes in self.codes)

    def tensors(self, stand_in: Tensor) -> list[Tensor]:
        """As kernels take them: three of each; what is missing is never read."""
        missing = MOST_LINEARS - len(self.codes)
        biases = list(self.biases) or [stand_in] * len(self.codes)
        parts: list[Sequence[Tensor]] = [self.codes, self.scales, self.offsets, biases]
        return [tensor for part in parts for tensor in [*part, *[part[0]] * missing]]

    def three_rows(self) -> list[int]:
        return [*self.rows, *[0] * (MOST_LINEARS - len(self.codes))]

    def programs(self, block_rows: int) -> int:
        return sum(triton.cdiv(rows, block_rows) for rows in self.rows)


class Cut(NamedTuple):
    """How a vector kernel is cut. One compiled kernel for each."""

    block_rows: int  # rows of a program
    num_warps: int
    columns: int = 128  # of a group that one thread has
    max_registers: int | None = None  # of a thread; None leaves it to the compiler
    pdl: bool = True  # where the GPU can, asks for its codes while the kernel before ends


class Config(NamedTuple):
    """How a kernel on the tensor cores is cut."""

    block_rows: int
    split: int  # groups taken at once, spread over the warps
    num_warps: int


def cut_for(units: int, groups: int, down: bool = False) -> Cut:
    """The cut for ``units`` routed vectors and rows of ``groups``. Measured on an H100 for OLMoE's and Mixtral's
    experts (docs/kernels.md).
    """
    if units >= 32:
        return Cut(64, num_warps=4 if down else 8)
    if groups >= 32 and not down:  # a row takes more registers
        return Cut(16, num_warps=4, columns=64)
    return Cut(32, num_warps=4)


def linear_cut_for(tokens: int) -> Cut:
    """The cut for linears: programs of few rows, since there are few rows in all."""
    return Cut(32, num_warps=4, columns=128 if tokens == 1 else 64)


def config_for(rows: int, groups: int, units: int, dtype: torch.dtype) -> Config:
    """The cut for ``units`` matrices of [rows, groups of columns]."""
    # Measured on an H100 for OLMoE's experts (docs/kernels.md): 64 rows. Small problems need more programs than that
    # gives, for a GPU has 100 to 150 multiprocessors; float32 needs more registers.
    if rows * units >= 64 * 256 and dtype != torch.float32:
        return Config(64, min(4, triton.next_power_of_2(groups)), num_warps=4)
    block_rows = 32 if rows * units >= 32 * 256 else 16
    split = 4 if block_rows == 32 or dtype == torch.float32 else 8  # shared memory: three parts of each x
    return Config(block_rows, min(split, triton.next_power_of_2(groups)), num_warps=4)


def vectors_cover(dtype: torch.dtype, columns: int, group_size: int, levels: Sequence[int]) -> bool:
    """Whether the vector kernels compute with x [..., columns] of ``dtype``."""
    groups = columns // group_size
    if groups == 1:
        return False  # Triton 3.6 fails to compile them
    return dtype != torch.float32 and all(covered(count, group_size, groups) for count in levels)


def parts_of(dtype: torch.dtype, columns: int, group_size: int, levels: Sequence[int]) -> int:
    """Programs that share a row of the down projection: one alone would take long for a row of Mixtral's, and the sum
    over experts adds their parts up at no cost.
    """
    groups = columns // group_size
    if groups <= GROUPS_OF_A_LONE_PROGRAM or not vectors_cover(dtype, columns, group_size, levels):
        return 1
    return -(-groups // GROUPS_OF_A_PART)


def widths_for(levels: Sequence[int], group_size: int) -> list[int]:
    """The widths that a kernel is compiled for: layers that mix the usual ones share it, and one compiled layer."""
    present = set(levels)
    if len(present) == 1 or group_size != 128:  # smaller groups: no vector kernel takes every width
        return sorted(present)
    return [*_LOW, *sorted(present - set(_LOW))]


def _kind(x: Tensor) -> int:
    if x.device.type != "cuda" or torch.version.hip is not None:
        return int(bit_fields.PLAIN)
    return int(
        {torch.bfloat16: bit_fields.BF16, torch.float16: bit_fields.FP16, torch.float32: bit_fields.SPLIT}[x.dtype]
    )


def is_plain(x: Tensor) -> bool:
    """Whether kernels on ``x`` go without NVIDIA's assembly: in the interpreter, and on other GPUs."""
    return _kind(x) == bit_fields.PLAIN


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
    groups = hidden.shape[1] // up.group_size
    covers = vectors_cover(hidden.dtype, hidden.shape[1], up.group_size, up.levels)
    if isinstance(cut, Cut) or (cut is None and covers):
        _launch_vectors(hidden, index, None, up, out, activation, cut or cut_for(tokens * slots, groups))
        return out
    units = min(up.experts, tokens * slots)
    config = cut or config_for(up.rows, groups, units, hidden.dtype)
    numbers, constants = kernel_arguments(activation)
    with _on(hidden):
        tensor_core.experts_up_kernel[(units, triton.cdiv(up.rows, config.block_rows))](
            *(hidden, index, *up.tensors(hidden), out, tokens, up.rows, up.experts, *numbers),
            **constants,
            **_routed(index, up.experts),
            **_column_constants(hidden, up.group_size, config),
            HAS_BIAS=up.bias is not None,
            WIDTHS=tuple(up.levels),
        )
    return out


def launch_down(
    h: Tensor, index: Tensor, weights: Tensor | None, down: Matrices, cut: Cut | Config | None = None
) -> Tensor:
    """[T, K, I] -> [T, K, rows] in h's dtype; or [T, K * P, rows], a slot's share in P = ``parts_of`` parts that are to
    be added up: times ``weights`` in float32 with zeros in unused slots.
    """
    tokens, slots = index.shape
    dtype = h.dtype if weights is None else torch.float32
    shape = h.dtype, h.shape[2], down.group_size, down.levels
    if isinstance(cut, Cut) or (cut is None and vectors_cover(*shape)):
        parts = 1 if weights is None else parts_of(*shape)
        out = torch.empty(tokens, slots * parts, down.rows, dtype=dtype, device=h.device)
        _launch_vectors(
            h, index, weights, down, out, RAW, cut or cut_for(tokens * slots, shape[1] // shape[2], down=True)
        )
        return out
    units = min(down.experts, tokens * slots)
    config = cut or config_for(down.rows, h.shape[2] // down.group_size, units, h.dtype)
    out = torch.zeros(tokens, slots, down.rows, dtype=dtype, device=h.device)
    inputs = (h, index, h if weights is None else weights, *down.tensors(h))
    with _on(h):
        tensor_core.experts_down_kernel[(units, triton.cdiv(down.rows, config.block_rows))](
            *(*inputs, out, tokens, down.rows, down.experts),
            **_routed(index, down.experts),
            **_column_constants(h, down.group_size, config),
            HAS_BIAS=down.bias is not None,
            WEIGHTED=weights is not None,
            WIDTHS=tuple(down.levels),
        )
    return out


def launch_linears(x: Tensor, w: Linears, cut: Cut | Config | None = None) -> Tensor:
    """[T, columns] -> [T, rows of all]."""
    tokens, columns = x.shape
    rows = sum(w.rows)
    out = x.new_empty(tokens, rows)
    few = tokens * rows * columns < VECTOR_PRODUCTS
    if isinstance(cut, Cut) or (cut is None and few and vectors_cover(x.dtype, columns, w.group_size, [w.levels])):
        cut = cut or linear_cut_for(tokens)
        with _on(x):
            kernel = dp4a.linears_vectors_kernel[(tokens, w.programs(cut.block_rows))](
                *(x, *w.tensors(x), out, *w.three_rows()),
                HAS_BIAS=bool(w.biases),
                LEVELS=w.levels,
                **_vector_constants(x, w.group_size, [w.levels], 1, cut),
            )
        _check_layout(kernel)
        return out
    config = cut or config_for(rows, columns // w.group_size, 1, x.dtype)
    with _on(x):
        tensor_core.linears_kernel[(w.programs(config.block_rows),)](
            *(x, *w.tensors(x), out, tokens, *w.three_rows()),
            **_column_constants(x, w.group_size, config),
            HAS_BIAS=bool(w.biases),
            N=_columns(tokens),
            LEVELS=w.levels,
        )
    return out


def _launch_vectors(
    x: Tensor, index: Tensor, weights: Tensor | None, w: Matrices, out: Tensor, activation: Activation, cut: Cut
) -> None:
    """x [T, columns], or [T, K, columns] of pairs."""
    tokens, slots = index.shape
    parts = out.shape[1] // slots
    numbers, constants = kernel_arguments(activation)
    with _on(x):
        kernel = dp4a.experts_vectors_kernel[(tokens * slots, triton.cdiv(w.rows, cut.block_rows), parts)](
            *(x, index, x if weights is None else weights, *w.tensors(x), out, w.rows, w.experts, *numbers),
            **constants,
            K=slots,
            PER_PAIR=x.dim() == 3,
            HAS_BIAS=w.bias is not None,
            WEIGHTED=weights is not None,
            WIDTHS=tuple(w.levels),
            PARTS=parts,
            **_vector_constants(x, w.group_size, w.levels, parts, cut),
        )
    _check_layout(kernel)


def _vector_constants(x: Tensor, group_size: int, levels: Sequence[int], parts: int, cut: Cut) -> dict[str, Any]:
    pdl = cut.pdl and starts_early(x.device)
    groups = x.shape[-1] // group_size
    lanes = min(lanes_of(count, group_size, -(-groups // parts), cut.columns) for count in levels)
    return {
        "PLAIN": is_plain(x),
        "G": group_size,
        "NG": groups,
        "M": cut.block_rows,
        "COLUMNS": cut.columns,
        "PDL": pdl,
        # A thread for each row and lane at most, or loads would be shared out by the word.
        "num_warps": max(1, min(cut.num_warps, lanes * cut.block_rows // 32)),
        "maxnreg": cut.max_registers,
        **({"launch_pdl": True} if pdl else {}),
    }


def _check_layout(kernel: Any) -> None:
    """Raises RuntimeError unless threads have their words as the assembly in ``dots`` takes them: all that follow each
    other along the last axis, next to each other in registers. Triton promises no such thing; so far it has been so.
    """
    if kernel is None or kernel.hash in _checked:  # the interpreter gives None
        return
    text = kernel.asm["ttgir"]
    for wide, name in re.findall(r"elementwise_inline_asm .*dp4a.* -> tensor<(?:\d+x)*(\d+)xi32, (#\w+)>", text):
        layout = re.search(rf"^{name} = (.*)$", text, re.MULTILINE)
        assert layout, name
        if wide != "1" and (f"sizePerThread = [1, 1, {wide}]" not in layout[1] or "order = [2" not in layout[1]):
            raise RuntimeError(
                f"Triton {triton.__version__} gives threads their words in another order than gemq's kernels expect: "
                "set GEMQ_KERNELS=reference, or install triton 3.6"
            )
    _checked.add(kernel.hash)


_checked: set[str] = set()
"""Hashes of compiled kernels whose layout is as it should be."""


@cache
def starts_early(device: torch.device) -> bool:
    """Whether a kernel may start while the one before ends (programmatic dependent launch): from Hopper on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def _column_constants(x: Tensor, group_size: int, config: Config) -> dict[str, Any]:
    sizes = {"G": group_size, "NG": x.shape[-1] // group_size, "M": config.block_rows, "S": config.split}
    return {**sizes, "KIND": _kind(x), "num_warps": config.num_warps}


VECTOR_PRODUCTS = 1 << 26
"""Below so many products in all linears take rows one by one; more share the tensor cores' tile. Measured: they meet at
16 x 2048 x 2048."""

GROUPS_OF_A_LONE_PROGRAM, GROUPS_OF_A_PART = 32, 16
"""Rows of more groups than the first are shared, so many groups a program."""
