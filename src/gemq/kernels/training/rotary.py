"""Rotary positions in one kernel, forward as backward, rounded once where a family's own ten kernels round thrice.

Shapes: B windows, N heads, S tokens, D numbers a head, of which the second half is turned with the first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 2048
"""Numbers of a token that a program turns, at most, if a head has no more."""


@triton.jit
def _rotary_kernel(
    x,
    cos,
    sin,
    out,
    tokens,
    heads,
    half,
    x_batch,
    x_head,
    x_token,
    cos_batch,
    cos_token,
    out_batch,
    out_head,
    out_token,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (at < half)
    place = x + batch * x_batch + token * x_token + head * x_head + at
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    turn = batch * cos_batch + token * cos_token + at
    cos_first = tl.load(cos + turn, mask=at < half, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + turn + half, mask=at < half, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + turn, mask=at < half, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + turn + half, mask=at < half, other=0.0).to(tl.float32)
    if BACK:
        turned = first * cos_first + second * sin_second
        other = second * cos_second - first * sin_first
    else:
        turned = first * cos_first - second * sin_first
        other = second * cos_second + first * sin_second
    place = out + batch * out_batch + token * out_token + head * out_head + at
    tl.store(place, turned.to(out.dtype.element_ty), mask=inside)
    tl.store(place + half, other.to(out.dtype.element_ty), mask=inside)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    batches, heads, tokens, size = x.shape
    out = torch.empty_like(x)
    half = triton.next_power_of_2(size // 2)
    block = min(triton.next_power_of_2(heads), max(1, BLOCK // (2 * half)))
    if x.numel():
        _rotary_kernel[(batches * tokens, triton.cdiv(heads, block))](
            x,
            cos,
            sin,
            out,
            tokens,
            heads,
            size // 2,
            x.stride(0),
            x.stride(1),
            x.stride(2),
            cos.stride(0) if len(cos) > 1 else 0,
            cos.stride(1),
            out.stride(0),
            out.stride(1),
            out.stride(2),
            BACK=back,
            HEADS=block,
            HALF=half,
        )
    return out


def usable(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether ``rotary`` takes these."""
    return (
        x.dim() == 4
        and cos.dim() == 3
        and cos.shape == sin.shape
        and cos.shape[1:] == x.shape[2:]
        and len(cos) in (1, len(x))
        and x.shape[-1] % 2 == 0
        and x.dtype == cos.dtype == sin.dtype
        and cos.stride() == sin.stride()
        and x.stride(-1) == cos.stride(-1) == 1
    )


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if gradient.stride(-1) != 1:
            gradient = gradient.contiguous()
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin, True), None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, N, S, D] turned by cos and sin [B or 1, S, D]: x cos + (-x2, x1) sin, x2 being x's second half."""
    return _Rotary.apply(x, cos, sin)
