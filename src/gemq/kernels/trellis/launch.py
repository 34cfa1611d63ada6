"""Launches of the kernels in ``trellis.decode`` on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from gemq.kernels.activation import RAW, Activation
from gemq.kernels.activation_triton import kernel_arguments
from gemq.kernels.decode import bit_fields, launch
from gemq.kernels.expert_inputs import projections_with_bias
from gemq.kernels.layout_check import check_layout
from gemq.kernels.trellis import prepare
from gemq.kernels.trellis.decode import rows_kernel
from gemq.kernels.trellis.tuning import (
    ROTATION_GROUPS,
    ProductConfig,
    num_sets,
    num_slots,
    num_splits,
    product_config,
)
from gemq.quant.rotation import block_side

if TYPE_CHECKING:
    from gemq.kernels.modules import PackedExperts
    from gemq.kernels.trellis.experts import TrellisMatrices

GROUP, VECTORS = int(prepare.GROUP), int(prepare.VECTORS)


class TrellisArguments(NamedTuple):
    """One projection of all experts as operators take it: ``tensors`` and ``sizes``.

    Attributes:
        codes: uint8
        scales: [E, rows] uint8
        table: [E, 2] int32
        bias: [E, rows], or None
        rows: rows of each matrix
        columns: columns of each matrix
        state_bits: bits of a state
    """

    codes: Tensor
    scales: Tensor
    table: Tensor
    bias: Tensor | None
    rows: int
    columns: int
    state_bits: int

    @classmethod
    def from_module(cls, matrices: TrellisMatrices, bias: Tensor | None) -> TrellisArguments:
        """Return the matrices of a module with the bias [E, rows] of the projection."""
        tensors = (matrices.codes, matrices.scales, matrices.table, bias)
        return cls(*tensors, matrices.rows, matrices.columns, matrices.state_bits)

    @classmethod
    def from_experts(cls, module: PackedExperts) -> tuple[TrellisArguments, TrellisArguments]:
        """Return gate and up (or up alone), and down, each with its bias."""
        up, down = [cls.from_module(matrices, bias) for matrices, bias in projections_with_bias(module)]
        return up, down

    @classmethod
    def from_lists(cls, tensors: Sequence[Tensor], sizes: Sequence[int]) -> TrellisArguments:
        """Restore the matrices from ``tensors`` and ``sizes``."""
        codes, scales, table = tensors[:3]
        return cls(codes, scales, table, tensors[3] if len(tensors) > 3 else None, *sizes)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors as an operator's argument. The bias is absent if there is none."""
        tensors = [self.codes, self.scales, self.table]
        return tensors if self.bias is None else [*tensors, self.bias]

    @property
    def sizes(self) -> list[int]:
        """The integers as an operator's argument."""
        return [self.rows, self.columns, self.state_bits]


class RotatedVectors(NamedTuple):
    """Inputs of ``launch_rows``.

    Attributes:
        digits: [X, D, G * 128] int8, of numbers of base 256, the highest digit first
        heads: [X, G, 2 D] int32, for each group of 128 columns: -MEAN times the sum of each digit, and the bits of the
            float32 that the numbers are to be multiplied with
    """

    digits: Tensor
    heads: Tensor


class Slots(NamedTuple):
    """Pairs of token and expert in the order in which programs of ``rows_kernel`` take them.

    Attributes:
        chosen: [T, K] experts of the pairs
        table: [slots, 1 + 4 * sets] int32: the expert of each slot or -1, and its pairs or -1. A single token has none.
        sets: sets of four pairs of a slot
    """

    chosen: Tensor
    table: Tensor | None
    sets: int

    @classmethod
    def empty(cls, index: Tensor, experts: int) -> Slots:
        """Return slots for experts [T, K] that ``launch_rotation`` is to fill."""
        if index.shape[0] == 1:
            return cls(index, None, 1)
        sets = num_sets(index.numel(), experts)
        shape = num_slots(index.numel(), experts, sets), 1 + VECTORS * sets
        return cls(index, torch.empty(shape, dtype=torch.int32, device=index.device), sets)


def launch_rotation(
    y: Tensor,
    columns: int,
    dtype: torch.dtype,
    activation: Activation = RAW,
    slots: Slots | None = None,
    experts: int = 0,
    pdl: bool = True,
) -> RotatedVectors:
    """Add splits, apply an activation and rotate.

    Args:
        y: [X, S, columns], or [X, S, 2 * columns] if the activation is gated
        columns: columns of the result
        dtype: of the activations: float32 takes four digits, other dtypes two
        activation: applied to the sums
        slots: to be filled
        experts: number of experts
        pdl: whether the kernel may start while the previous one ends, on GPUs that support this
    """
    vectors, splits = y.shape[:2]
    num_digits = 4 if dtype == torch.float32 else 2
    groups = triton.cdiv(columns, GROUP)
    digits = torch.empty(vectors, num_digits, groups * GROUP, dtype=torch.int8, device=y.device)
    heads = torch.empty(vectors, groups, 2 * num_digits, dtype=torch.int32, device=y.device)
    table = None if slots is None else slots.table
    pairs, sets = (1, 1) if slots is None else (slots.chosen.numel(), slots.sets)
    numbers, constants = kernel_arguments(activation)
    blocks = min(ROTATION_GROUPS, triton.next_power_of_2(groups))
    programs = vectors if table is None else vectors + experts + 1
    with launch.device_of(y):
        prepare.rotate_kernel[(programs, triton.cdiv(groups, blocks))](
            y,
            y if slots is None else slots.chosen,
            digits,
            heads,
            heads if table is None else table,
            vectors,
            pairs,
            experts,
            *numbers,
            **constants,
            COLUMNS=columns,
            SIDE=block_side(columns),
            SPLITS=splits,
            DIGITS=num_digits,
            BLOCKS=blocks,
            PADDED_PAIRS=1 if table is None else triton.next_power_of_2(pairs),
            SPARSE=table is not None and len(table) == pairs,
            SETS=sets,
            **_pdl_constants(y.device, pdl),
            num_warps=4,
        )
    return RotatedVectors(digits, heads)


def launch_rows(
    x: RotatedVectors,
    slots: Slots,
    weights: Tensor | None,
    w: TrellisArguments,
    are_slots_ready: bool = False,
    config: ProductConfig | None = None,
    splits: int | None = None,
) -> Tensor:
    """Multiply the chosen experts' matrices with rotated vectors.

    Args:
        x: a vector for each token, or for each pair of token and expert
        slots: filled by ``launch_rotation``; indices outside 0 ... E - 1 mark unused pairs
        weights: [T, K] routing weights, or None
        w: matrices
        are_slots_ready: whether the slots were filled before the rotation that made x
        config: launch options, for benchmarks
        splits: programs that share a row, for benchmarks

    Returns:
        [T, K * S, rows] float32. Unused pairs are zero with weights, and not written without.
    """
    tokens, top_k = slots.chosen.shape
    pairs = tokens * top_k
    vectors, num_digits, _ = x.digits.shape
    config = config or product_config()
    splits = splits or num_splits(pairs, w.rows, w.columns)
    out = torch.empty(tokens, top_k * splits, w.rows, dtype=torch.float32, device=x.digits.device)
    count = pairs if slots.table is None else len(slots.table)
    with launch.device_of(out):
        kernel = rows_kernel[(triton.cdiv(w.rows // 16, config.tile_rows), count, splits)](
            *x,
            slots.chosen if slots.table is None else slots.table,
            out if weights is None else weights,
            w.codes,
            w.scales,
            w.table,
            out if w.bias is None else w.bias,
            out,
            w.rows,
            w.table.shape[0],
            TOP_K=top_k,
            PER_PAIR=vectors == pairs and top_k > 1,
            SINGLE=slots.table is None,
            EARLY=slots.table is None or are_slots_ready,
            HAS_BIAS=w.bias is not None,
            WEIGHTED=weights is not None,
            COLUMNS=w.columns,
            SPLITS=splits,
            STATE_BITS=w.state_bits,
            R=config.tile_rows,
            J=config.num_warps,
            SETS=slots.sets,
            DIGITS=num_digits,
            MULTIPLIED=config.multiplied,
            PORTABLE=launch.operand(out) == int(bit_fields.PORTABLE),
            PREFETCH=config.prefetch,
            **_pdl_constants(out.device, config.pdl),
            num_warps=config.num_warps,
        )
    check_fragment_layout(kernel)
    return out


def _pdl_constants(device: torch.device, is_wanted: bool = True) -> dict[str, Any]:
    """Return the constant and the launch option for kernels that start while the previous one ends."""
    pdl = is_wanted and launch.supports_pdl(device)
    return {"PDL": pdl, "launch_pdl": True} if pdl else {"PDL": False}


def check_fragment_layout(kernel: Any) -> None:
    """Check that element i of the first axis lies in thread i of a warp, as the assembly in ``fragments`` expects."""
    check_layout(kernel, r"mma\.sync.* -> tensor<32x\d+x(\d+)", _is_by_thread)


def _is_by_thread(_: int, layout: str) -> bool:
    """Whether a layout gives the elements of the first axis to the threads of a warp, in order."""
    is_blocked = "threadsPerWarp = [32, 1, 1]" in layout
    is_linear = "lane = [[1, 0, 0], [2, 0, 0], [4, 0, 0], [8, 0, 0], [16, 0, 0]]" in layout
    return is_blocked or is_linear
