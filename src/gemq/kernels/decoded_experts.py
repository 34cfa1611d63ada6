"""Experts for very many tokens on a GPU: each projection is decoded once, and torch's grouped product follows.

Legend: T tokens, K experts per token, P = T K pairs (see ``kernels.grouped.routing``), E experts, H hidden size, I
intermediate size.

For affine and for trellis codes. The dense matrices of one projection exist at a time. The host never waits for the GPU
and no shape depends on data, so that a CUDA graph can capture all of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemq.kernels import grouped_product
from gemq.kernels.activation import RAW, Activation
from gemq.kernels.activation_triton import activated, gated, kernel_arguments
from gemq.kernels.grouped.routing import Routing, combine, sort_pairs
from gemq.kernels.trellis.rotation import MIN_BLOCK, sign_block, signed_sums
from gemq.kernels.triton_types import Pointer, Scalar
from gemq.quant.rotation import block_side
from gemq.quant.widths import ROTATION_SIDE

ROWS, BLOCKS = 64, 4
"""Pairs of a program, and blocks of columns, which share the signs of the rotation."""

WARPS, STAGES = 8, 1
"""Warps of a program, and pipeline stages: several programs of a multiprocessor hide latency, with less memory."""


def covers(hidden: Tensor, top_k_index: Tensor, experts: int, up_rows: int, activation: Activation) -> bool:
    """Return whether ``experts`` supports these inputs and should be used for them.

    Args:
        hidden: [T, H]
        top_k_index: [T, K]
        experts: E
        up_rows: rows of gate and up, or of up alone
        activation: applied between the products
    """
    columns = hidden.shape[1]
    if not grouped_product.decodes_first(top_k_index.numel(), experts, columns, up_rows):
        return False
    sizes = (columns, up_rows, up_rows // 2 if activation.gated else up_rows)
    is_supported = grouped_product.is_supported(hidden.device, hidden.dtype, sizes)
    return is_supported and grouped_product.never_waits(hidden.device)


@triton.jit(do_not_specialize=["experts"])
def _operand_kernel(
    x: Pointer,
    out: Pointer,
    order: Pointer,
    starts: Pointer,
    positions: Pointer,
    experts: Scalar,
    columns: Scalar,
    factor: Scalar,
    limit: Scalar,
    alpha: Scalar,
    shift: Scalar,
    GATHER: tl.constexpr,  # row of x: the position in ``order`` if 0, else the token order[position] // GATHER
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    SIDE: tl.constexpr,  # of the rotation's blocks, 0 without rotation
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (i, j) writes positions i * ROWS ... of BLOCKS blocks of columns. See ``operand``."""
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    routed = tl.load(starts + experts)
    if tl.program_id(0) * ROWS >= routed:
        return
    is_routed = position < routed
    x_row = position
    if GATHER:
        pair = tl.load(order + position, mask=is_routed, other=0)
        x_row = pair // GATHER
        if tl.program_id(1) == 0:
            tl.store(positions + pair, position, mask=is_routed)
    source = x + x_row.to(tl.int64)[:, None] * (2 * columns if GATED else columns)
    target = out + position.to(tl.int64)[:, None] * columns
    offset = tl.arange(0, BLOCK)
    if SIDE:
        signs = sign_block(offset[None, :], offset[:, None], SIDE).to(out.dtype.element_ty)
    for i in range(BLOCKS):
        column = ((tl.program_id(1) * BLOCKS + i) * BLOCK + offset)[None, :]
        inside = is_routed[:, None] & (column < columns)
        if GATED:
            gate_column = column * 2 if INTERLEAVED else column
            up_column = gate_column + 1 if INTERLEAVED else column + columns
            gate = tl.load(source + gate_column, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(source + up_column, mask=inside, other=0.0).to(tl.float32)
            y = gated(gate, up, limit, alpha, shift, ACTIVATION, CLAMP)
        else:
            y = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
            y = activated(y, limit, alpha, ACTIVATION, CLAMP)
        if SIDE:
            y = signed_sums(y.to(out.dtype.element_ty), signs) * factor
        tl.store(target + column, y.to(out.dtype.element_ty), mask=inside)


def operand(
    x: Tensor, columns: int, routing: Routing, positions: Tensor, top_k: int, rotated: bool, activation: Activation
) -> Tensor:
    """Return the left operand of a product, [P, columns] in the order of ``routing``. Unused rows are not written.

    Args:
        x: [T, columns] with ``top_k``; else [P, columns], or [P, 2 * columns] if the activation is gated
        columns: columns of the result
        routing: pairs sorted by expert
        positions: [P] int32; with ``top_k``, the position of each routed pair in the order is written to it
        top_k: experts of a token, to gather a pair's token from x; 0 if x has a row for each pair
        rotated: whether to rotate
        activation: applied to x
    """
    pairs = positions.shape[0]
    side = block_side(columns) if rotated else 0
    block = max(side, MIN_BLOCK) if rotated else ROTATION_SIDE
    numbers, constants = kernel_arguments(activation)
    out = torch.empty(pairs, columns, dtype=x.dtype, device=x.device)
    _operand_kernel[(triton.cdiv(pairs, ROWS), triton.cdiv(columns, block * BLOCKS))](
        x,
        out,
        routing.order,
        routing.starts,
        positions,
        routing.starts.shape[0] - 1,
        columns,
        side**-0.5 if rotated else 1.0,
        *numbers,
        GATHER=top_k,
        **constants,
        SIDE=side,
        BLOCK=block,
        BLOCKS=BLOCKS,
        ROWS=ROWS,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out


def experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: Callable[[], Tensor],
    down: Callable[[], Tensor],
    activation: Activation,
    num_experts: int,
    rotated: bool,
) -> Tensor:
    """Run routed experts that ``covers`` supports.

    Args:
        hidden: [T, H], contiguous
        top_k_index: [T, K]; indices outside 0 ... E - 1 mark unused slots and are skipped
        top_k_weights: [T, K]
        up: decodes gate and up projections, or up alone: [E, 2 I, H] or [E, I, H]
        down: decodes down projections: [E, H, I]
        activation: applied between the products
        num_experts: E
        rotated: whether the matrices multiply rotated inputs

    Returns:
        [T, H] in hidden's dtype.
    """
    routing = sort_pairs(top_k_index, num_experts, ROWS)
    ends = routing.starts[1:]
    positions = torch.empty_like(routing.order)
    y = operand(hidden, hidden.shape[1], routing, positions, top_k_index.shape[1], rotated, RAW)
    y = grouped_product.product(y, up(), ends)
    y = operand(y, y.shape[1] // (1 + activation.gated), routing, positions, 0, rotated, activation)
    y = grouped_product.product(y, down(), ends)
    return combine(y, top_k_index, top_k_weights, num_experts, positions)
