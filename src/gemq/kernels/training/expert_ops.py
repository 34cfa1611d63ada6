"""Operations around the experts' products in training and scoring on a GPU, in one kernel each.

Pairs of token and expert are sorted by expert. ``positions`` [T, K] holds the positions of a token's pairs. Sums run in
a fixed order, without atomics. Where several ranks share the experts (``RankPairs``), a rank's own pairs come first.
Sums over all pairs are then reduced over the ranks.

Legend: T tokens, K experts per token, P = T K pairs, H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemq.kernels.triton_types import Pointer, Scalar


class RankPairs(NamedTuple):
    """The pairs of token and expert that belong to one rank.

    Attributes:
        num_pairs: [1] int32, number of this rank's pairs: the first rows of y [P, H]; other rows are not read
        all_gather: from rows [T, ...] of this rank's tokens, which may be all tokens, to those of all tokens
        reduce: the sum over ranks of rows [T, ...], for this rank's tokens
    """

    num_pairs: Tensor
    all_gather: Callable[[Tensor], Tensor]
    reduce: Callable[[Tensor], Tensor]


def _block_columns(columns: int) -> int:
    """Return the columns of one program."""
    return min(1024, triton.next_power_of_2(columns))


@triton.jit
def _sum_kernel(
    y: Pointer,
    weights: Pointer,
    positions: Pointer,
    num_pairs: Pointer,
    out: Pointer,
    columns: Scalar,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the (weighted) sum of each token's rows of y [P, H] to out [T, H].

    SHARED: only rows below ``num_pairs`` are added.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(K):
        row = tl.load(positions + token * K + k)
        mask = inside & (row < tl.load(num_pairs)) if SHARED else inside
        value = tl.load(y + row * columns + column, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + row).to(tl.float32)
        total += value
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_gradient_kernel(
    gradient: Pointer,
    y: Pointer,
    weights: Pointer,
    token: Pointer,
    num_pairs: Pointer,
    grad_y: Pointer,
    grad_weights: Pointer,
    columns: Scalar,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradients of ``_sum_kernel``'s y [P, H] and weights [P]. They are zero for rows that it skipped."""
    row = tl.program_id(0).to(tl.int64)
    is_summed = row < tl.load(num_pairs) if SHARED else row >= 0
    source = tl.load(token + row)
    weight = tl.load(weights + row).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < columns:
        column = start + tl.arange(0, BLOCK)
        mask = (column < columns) & is_summed
        grad = tl.load(gradient + source * columns + column, mask=mask, other=0.0).to(tl.float32)
        total += grad * tl.load(y + row * columns + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_y + row * columns + column, (grad * weight).to(grad_y.dtype.element_ty), mask=mask)
        start += BLOCK
    tl.store(grad_weights + row, tl.sum(total, 0).to(grad_weights.dtype.element_ty))


def _sum_pairs(y: Tensor, weights: Tensor | None, positions: Tensor, shared: RankPairs | None) -> Tensor:
    """Return the (weighted) sum of each token's pairs, [T, H] in y's dtype.

    Sums of several ranks are reduced in float32 before they are rounded.
    """
    tokens, k = positions.shape
    columns = y.shape[1]
    out = torch.empty(tokens, columns, dtype=y.dtype if shared is None else torch.float32, device=y.device)
    block = _block_columns(columns)
    if tokens:
        _sum_kernel[(tokens, triton.cdiv(columns, block))](
            y,
            y if weights is None else weights,
            positions,
            positions if shared is None else shared.num_pairs,
            out,
            columns,
            K=k,
            WEIGHTED=weights is not None,
            SHARED=shared is not None,
            BLOCK=block,
        )
    return (out if shared is None else shared.reduce(out)).to(y.dtype)


class _Gather(torch.autograd.Function):
    """Differentiable gather; see ``gather``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, token: Tensor, positions: Tensor, shared: RankPairs | None) -> Tensor:
        """Return the rows of the pairs' tokens."""
        ctx.save_for_backward(positions)
        ctx.shared = shared
        return (hidden if shared is None else shared.all_gather(hidden)).index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the hidden states: the sum over each token's pairs."""
        (positions,) = ctx.saved_tensors
        return _sum_pairs(gradient.contiguous(), None, positions, ctx.shared), None, None, None


def gather(hidden: Tensor, token: Tensor, positions: Tensor, shared: RankPairs | None = None) -> Tensor:
    """Return the hidden states of the pairs' tokens. The gradient of ``hidden`` sums over all ranks' pairs.

    Args:
        hidden: [T, H]; only this rank's tokens if ``shared`` gathers them
        token: [P] int64, token of each pair, of all ranks
        positions: [T, K] int64, positions of each token's pairs, of all ranks
        shared: this rank's pairs, where several ranks share the experts

    Returns:
        [P, H]
    """
    return _Gather.apply(hidden, token, positions, shared)


class _Combine(torch.autograd.Function):
    """Differentiable weighted sum; see ``combine``."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weights: Tensor, token: Tensor, positions: Tensor, shared: RankPairs | None
    ) -> Tensor:
        """Return the sums."""
        y, weights = y.contiguous(), weights.contiguous()
        ctx.save_for_backward(y, weights, token)
        ctx.shared = shared
        return _sum_pairs(y, weights, positions, shared)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the outputs and of the weights."""
        y, weights, token = ctx.saved_tensors
        gradient = gradient if ctx.shared is None else ctx.shared.all_gather(gradient)
        grad_y, grad_weights = torch.empty_like(y), torch.empty_like(weights)
        if len(y):
            _sum_gradient_kernel[(len(y),)](
                gradient.contiguous(),
                y,
                weights,
                token,
                token if ctx.shared is None else ctx.shared.num_pairs,
                grad_y,
                grad_weights,
                y.shape[1],
                SHARED=ctx.shared is not None,
                BLOCK=_block_columns(y.shape[1]),
            )
        return grad_y, grad_weights, None, None, None


def combine(y: Tensor, weights: Tensor, token: Tensor, positions: Tensor, shared: RankPairs | None = None) -> Tensor:
    """Return the weighted sum of each token's pairs, added up in float32.

    With ``shared``, the sum runs over all ranks' pairs, and the gradient of ``weights`` is that of this rank's pairs.

    Args:
        y: [P, H] outputs of the pairs
        weights: [P] routing weights
        token: [P] int64, token of each pair
        positions: [T, K] int64, positions of each token's pairs
        shared: this rank's pairs, where several ranks share the experts

    Returns:
        [T, H] in y's dtype.
    """
    return _Combine.apply(y, weights, token, positions, shared)


@triton.jit
def _gate_kernel(x: Pointer, out: Pointer, columns: Scalar, BLOCK: tl.constexpr):
    """Program (r, b) writes block b of row r of silu(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gate = tl.load(x + row * 2 * columns + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + (row * 2 + 1) * columns + column, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * columns + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_gradient_kernel(x: Pointer, gradient: Pointer, out: Pointer, columns: Scalar, BLOCK: tl.constexpr):
    """Write the gradients of ``_gate_kernel``'s gate and up."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gate = tl.load(x + row * 2 * columns + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + (row * 2 + 1) * columns + column, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(gradient + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    grad_up = grad * gate * sigmoid
    tl.store(out + row * 2 * columns + column, grad_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(out + (row * 2 + 1) * columns + column, grad_up.to(out.dtype.element_ty), mask=inside)


class _SiluGate(torch.autograd.Function):
    """Differentiable gate; see ``silu_gate``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return silu(gate) * up."""
        x = x.contiguous()
        ctx.save_for_backward(x)
        rows, columns = x.shape[0], x.shape[1] // 2
        out = x.new_empty(rows, columns)
        block = _block_columns(columns)
        if rows:
            _gate_kernel[(rows, triton.cdiv(columns, block))](x, out, columns, BLOCK=block)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the gradient of x."""
        (x,) = ctx.saved_tensors
        rows, columns = x.shape[0], x.shape[1] // 2
        out = torch.empty_like(x)
        block = _block_columns(columns)
        if rows:
            _gate_gradient_kernel[(rows, triton.cdiv(columns, block))](
                x, gradient.contiguous(), out, columns, BLOCK=block
            )
        return out


def silu_gate(x: Tensor) -> Tensor:
    """x [P, 2 I], gates first -> silu(gate) * up, [P, I]. Computed in float32."""
    return _SiluGate.apply(x)


@triton.jit
def _residual_kernel(
    out: Pointer,
    exact: Pointer,
    weights: Pointer,
    energy: Pointer,
    gradient: Pointer,
    exact_rows: Scalar,
    columns: Scalar,
    BLOCK: tl.constexpr,
):
    """Program (r, b) writes block b of row r of the gradient. See ``residual_gradient``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    weight = tl.load(weights + row).to(tl.float32)
    y = tl.load(out + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    target = tl.load(exact + (row % exact_rows) * columns + column, mask=inside, other=0.0).to(tl.float32)
    grad = (y - target) * (2.0 * weight * weight / tl.load(energy))
    tl.store(gradient + row * columns + column, grad.to(gradient.dtype.element_ty), mask=inside)


def residual_gradient(out: Tensor, exact: Tensor, weights: Tensor, energy: Tensor) -> Tensor:
    """Return the gradient of sum((w out - w exact)^2) / energy with respect to ``out``, in its dtype.

    Args:
        out: [W * P, H] outputs of W quantized versions
        exact: [P, H] outputs of the full-precision experts, shared by all versions
        weights: [W * P] routing weights
        energy: float32 scalar
    """
    out, exact = out.contiguous(), exact.contiguous()
    gradient = torch.empty_like(out)
    block = _block_columns(out.shape[1])
    if len(out):
        _residual_kernel[(len(out), triton.cdiv(out.shape[1], block))](
            out, exact, weights, energy, gradient, len(exact), out.shape[1], BLOCK=block
        )
    return gradient


@triton.jit
def _projection_kernel(
    direction: Pointer,
    changed: Pointer,
    exact: Pointer,
    out: Pointer,
    columns: Scalar,
    SQUARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program r sums row r. See ``projection``."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < columns:
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        element = row * columns + column
        product = tl.load(changed + element, mask=inside, other=0.0).to(tl.float32)
        product -= tl.load(exact + element, mask=inside, other=0.0).to(tl.float32)
        product *= tl.load(direction + element, mask=inside, other=0.0).to(tl.float32)
        total += product * product if SQUARES else product
        start += BLOCK
    tl.store(out + row, tl.sum(total, 0))


def projection(direction: Tensor, changed: Tensor, exact: Tensor, squares: bool) -> Tensor:
    """Return, for each row, the sum of direction * (changed - exact), or of the squares of these products.

    Args:
        direction: [P, N]
        changed: [P, N]
        exact: [P, N]
        squares: whether to square the products before summing

    Returns:
        [P] float32
    """
    direction, changed, exact = direction.contiguous(), changed.contiguous(), exact.contiguous()
    out = torch.empty(len(changed), dtype=torch.float32, device=changed.device)
    block = _block_columns(changed.shape[1])
    if len(out):
        _projection_kernel[(len(out),)](direction, changed, exact, out, changed.shape[1], SQUARES=squares, BLOCK=block)
    return out
