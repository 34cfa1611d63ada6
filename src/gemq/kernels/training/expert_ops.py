"""What surrounds the products of routed pairs when experts are trained or scored, on a GPU: one pass each.

Pairs are sorted by expert; ``place`` [T, K] says where a token's pairs lie. Sums go in fixed order, without atomics.
Where several ranks share the experts (``Shared``), a rank's own pairs come first and sums over all pairs are added up.
Knows nothing of modules. Legend: T tokens, K experts per token, P = T K pairs, H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


class Shared(NamedTuple):
    """The pairs of token and expert that belong to one rank.

    Attributes:
        used: [1] int32, number of the first rows of y [P, H] that belong to this rank; other rows are not read
        all_gather: rows [T, ...] of all tokens from rows of this rank's tokens, which may be all tokens
        reduce: the sum over ranks of rows [T, ...], for this rank's tokens
    """

    used: Tensor
    all_gather: Callable[[Tensor], Tensor]
    reduce: Callable[[Tensor], Tensor]


@triton.jit
def _sum_kernel(
    y,
    weights,
    place,
    used,
    out,
    columns,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [T, H]: the (weighted) sum of each token's rows of y [P, H], of the first ``used`` rows where SHARED."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(K):
        row = tl.load(place + token * K + k)
        here = inside & (row < tl.load(used)) if SHARED else inside
        value = tl.load(y + row * columns + column, mask=here, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + row).to(tl.float32)
        total += value
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _spread_kernel(
    gradient, y, weights, token, used, of_y, of_weights, columns, SHARED: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradients of ``_sum_kernel``: of y [P, H] and of the weights [P], which are zero for rows that it left out."""
    row = tl.program_id(0).to(tl.int64)
    here = row < tl.load(used) if SHARED else row >= 0
    source = tl.load(token + row)
    weight = tl.load(weights + row).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < columns:
        column = start + tl.arange(0, BLOCK)
        inside = (column < columns) & here
        slope = tl.load(gradient + source * columns + column, mask=inside, other=0.0).to(tl.float32)
        total += slope * tl.load(y + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(of_y + row * columns + column, (slope * weight).to(of_y.dtype.element_ty), mask=inside)
        start += BLOCK
    tl.store(of_weights + row, tl.sum(total, 0).to(of_weights.dtype.element_ty))


def _summed(y: Tensor, weights: Tensor | None, place: Tensor, shared: Shared | None) -> Tensor:
    """The sums [T, H] in y's type; those of several ranks meet before they are rounded."""
    tokens, k = place.shape
    out = torch.empty(tokens, y.shape[1], dtype=y.dtype if shared is None else torch.float32, device=y.device)
    block = min(1024, triton.next_power_of_2(y.shape[1]))
    grid = (tokens, triton.cdiv(y.shape[1], block))
    if tokens:
        _sum_kernel[grid](
            y,
            y if weights is None else weights,
            place,
            place if shared is None else shared.used,
            out,
            y.shape[1],
            K=k,
            WEIGHTED=weights is not None,
            SHARED=shared is not None,
            BLOCK=block,
        )
    return (out if shared is None else shared.reduce(out)).to(y.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, token: Tensor, place: Tensor, shared: Shared | None) -> Tensor:
        ctx.save_for_backward(place)
        ctx.shared = shared
        return (hidden if shared is None else shared.all_gather(hidden)).index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return _summed(gradient.contiguous(), None, place, ctx.shared), None, None, None


def gather(hidden: Tensor, token: Tensor, place: Tensor, shared: Shared | None = None) -> Tensor:
    """Rows of hidden [T, H] for pairs: token [P] and place [T, K] int64 -> [P, H].

    The gradient of ``hidden`` is that of all ranks' pairs. Of shared pairs, ``hidden`` has this rank's tokens alone if
    ``shared`` spreads them; ``token`` and ``place`` are of all.
    """
    return _Gather.apply(hidden, token, place, shared)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, token: Tensor, place: Tensor, shared: Shared | None) -> Tensor:
        y, weights = y.contiguous(), weights.contiguous()
        ctx.save_for_backward(y, weights, token)
        ctx.shared = shared
        return _summed(y, weights, place, shared)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, weights, token = ctx.saved_tensors
        gradient = gradient if ctx.shared is None else ctx.shared.all_gather(gradient)
        of_y, of_weights = torch.empty_like(y), torch.empty_like(weights)
        block = min(1024, triton.next_power_of_2(y.shape[1]))
        if len(y):
            _spread_kernel[(len(y),)](
                gradient.contiguous(),
                y,
                weights,
                token,
                token if ctx.shared is None else ctx.shared.used,
                of_y,
                of_weights,
                y.shape[1],
                SHARED=ctx.shared is not None,
                BLOCK=block,
            )
        return of_y, of_weights, None, None, None


def combine(y: Tensor, weights: Tensor, token: Tensor, place: Tensor, shared: Shared | None = None) -> Tensor:
    """Weighted sum of each token's pairs: y [P, H], weights [P] -> [T, H] in y's type, added up in float32.

    Of all ranks' pairs where they are shared; the gradient of ``weights`` is that of this rank's pairs.
    """
    return _Combine.apply(y, weights, token, place, shared)


@triton.jit
def _gate_kernel(x, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gate = tl.load(x + row * 2 * columns + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + (row * 2 + 1) * columns + column, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * columns + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_gradient_kernel(x, gradient, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gate = tl.load(x + row * 2 * columns + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + (row * 2 + 1) * columns + column, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(gradient + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    of_gate = slope * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    of_up = slope * gate * sigmoid
    tl.store(out + row * 2 * columns + column, of_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(out + (row * 2 + 1) * columns + column, of_up.to(out.dtype.element_ty), mask=inside)


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        rows, columns = x.shape[0], x.shape[1] // 2
        out = x.new_empty(rows, columns)
        block = min(1024, triton.next_power_of_2(columns))
        if rows:
            _gate_kernel[(rows, triton.cdiv(columns, block))](x, out, columns, BLOCK=block)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        rows, columns = x.shape[0], x.shape[1] // 2
        out = torch.empty_like(x)
        block = min(1024, triton.next_power_of_2(columns))
        if rows:
            _gate_gradient_kernel[(rows, triton.cdiv(columns, block))](
                x, gradient.contiguous(), out, columns, BLOCK=block
            )
        return out


def silu_gate(x: Tensor) -> Tensor:
    """x [P, 2 I], gates first -> silu(gate) * up, [P, I]; both computed in float32."""
    return _SiluGate.apply(x)


@triton.jit
def _residual_kernel(out, exact, weights, energy, gradient, exact_rows, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    weight = tl.load(weights + row).to(tl.float32)
    y = tl.load(out + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    target = tl.load(exact + (row % exact_rows) * columns + column, mask=inside, other=0.0).to(tl.float32)
    slope = (y - target) * (2.0 * weight * weight / tl.load(energy))
    tl.store(gradient + row * columns + column, slope.to(gradient.dtype.element_ty), mask=inside)


def residual_gradient(out: Tensor, exact: Tensor, weights: Tensor, energy: Tensor) -> Tensor:
    """Gradient of sum((w out - w exact)^2) / energy with respect to ``out``, in its type.

    out:     [W * P, H]
    exact:   [P, H], the same for each of the W
    weights: [W * P]
    energy:  float32 scalar
    """
    out, exact = out.contiguous(), exact.contiguous()
    gradient = torch.empty_like(out)
    block = min(1024, triton.next_power_of_2(out.shape[1]))
    if len(out):
        _residual_kernel[(len(out), triton.cdiv(out.shape[1], block))](
            out, exact, weights, energy, gradient, len(exact), out.shape[1], BLOCK=block
        )
    return gradient


@triton.jit
def _projection_kernel(direction, changed, exact, out, columns, SQUARES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < columns:
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        place = row * columns + column
        product = tl.load(changed + place, mask=inside, other=0.0).to(tl.float32)
        product -= tl.load(exact + place, mask=inside, other=0.0).to(tl.float32)
        product *= tl.load(direction + place, mask=inside, other=0.0).to(tl.float32)
        total += product * product if SQUARES else product
        start += BLOCK
    tl.store(out + row, tl.sum(total, 0))


def projection(direction: Tensor, changed: Tensor, exact: Tensor, squares: bool) -> Tensor:
    """Of each row of three [P, N]: the sum of direction * (changed - exact), or of its squares: float32 [P]."""
    direction, changed, exact = (t.contiguous() for t in (direction, changed, exact))
    out = torch.empty(len(changed), dtype=torch.float32, device=changed.device)
    block = min(1024, triton.next_power_of_2(changed.shape[1]))
    if len(out):
        _projection_kernel[(len(out),)](direction, changed, exact, out, changed.shape[1], SQUARES=squares, BLOCK=block)
    return out
