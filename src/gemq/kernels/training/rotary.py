"""Rotary position embeddings in one kernel, forward and backward.

Results are rounded once, where a family's own ten kernels round three times. Shapes: B windows, N heads, S tokens, D
head size. The first half of each head is rotated with the second half.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemq.kernels.triton_types import Pointer, Scalar

MAX_BLOCK_ELEMENTS = 2048
"""Elements of a token that a program rotates, unless a single head has more."""


@triton.jit
def _rotary_kernel(
    x: Pointer,
    cos: Pointer,
    sin: Pointer,
    out: Pointer,
    tokens: Scalar,
    heads: Scalar,
    half: Scalar,
    x_batch_stride: Scalar,
    x_head_stride: Scalar,
    x_token_stride: Scalar,
    cos_batch_stride: Scalar,
    cos_token_stride: Scalar,
    out_batch_stride: Scalar,
    out_head_stride: Scalar,
    out_token_stride: Scalar,
    BACKWARD: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Program (t, b) rotates block b of the heads of token t. BACKWARD rotates in the opposite direction."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    x_pointer = x + batch * x_batch_stride + token * x_token_stride + head * x_head_stride + column
    x1 = tl.load(x_pointer, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_pointer + half, mask=inside, other=0.0).to(tl.float32)
    angle = batch * cos_batch_stride + token * cos_token_stride + column
    cos1 = tl.load(cos + angle, mask=column < half, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + angle + half, mask=column < half, other=0.0).to(tl.float32)
    sin1 = tl.load(sin + angle, mask=column < half, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + angle + half, mask=column < half, other=0.0).to(tl.float32)
    if BACKWARD:
        rotated1 = x1 * cos1 + x2 * sin2
        rotated2 = x2 * cos2 - x1 * sin1
    else:
        rotated1 = x1 * cos1 - x2 * sin1
        rotated2 = x2 * cos2 + x1 * sin2
    out_pointer = out + batch * out_batch_stride + token * out_token_stride + head * out_head_stride + column
    tl.store(out_pointer, rotated1.to(out.dtype.element_ty), mask=inside)
    tl.store(out_pointer + half, rotated2.to(out.dtype.element_ty), mask=inside)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """Launch the kernel on x [B, N, S, D], and cos and sin [B or 1, S, D]."""
    batches, heads, tokens, size = x.shape
    out = torch.empty_like(x)
    half = triton.next_power_of_2(size // 2)
    block_heads = min(triton.next_power_of_2(heads), max(1, MAX_BLOCK_ELEMENTS // (2 * half)))
    if x.numel():
        _rotary_kernel[(batches * tokens, triton.cdiv(heads, block_heads))](
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
            BACKWARD=backward,
            HEADS=block_heads,
            HALF=half,
        )
    return out


def usable(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether ``rotary`` supports these shapes, dtypes and strides."""
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
    """Differentiable rotation; see ``rotary``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x."""
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x."""
        if gradient.stride(-1) != 1:
            gradient = gradient.contiguous()
        cos, sin = ctx.saved_tensors
        return _rotate(gradient, cos, sin, backward=True), None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x by its position: ``x cos + (-x2, x1) sin`` with x1 and x2 the halves of x.

    Args:
        x: [B, N, S, D]
        cos: [B or 1, S, D]
        sin: [B or 1, S, D]
    """
    return _Rotary.apply(x, cos, sin)
