"""RMS norms in one launch each, with the sum that precedes them: residual connections and the terms of experts.

Any number of rows, no gradients. Results are rounded where the operations of PyTorch round them. From Hopper on a
kernel starts while the previous one ends.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemq.kernels.decode import launch
from gemq.kernels.triton_types import Pointer, Scalar

MAX_SIZE = 16384
"""Largest size of a row, which a program holds in registers."""

ELEMENTS_PER_WARP = 512


class NormWeight(NamedTuple):
    """An RMS norm.

    Attributes:
        weight: [size]
        eps: added to the mean square
        rounds_twice: whether the normalized row is rounded before it is multiplied with the weight
    """

    weight: Tensor
    eps: float
    rounds_twice: bool


@triton.jit
def _norm_kernel(
    x: Pointer,  # [rows / HEADS, HEADS, SIZE], or float32 [rows, TERMS, SIZE]
    residual: Pointer,  # [rows, SIZE]
    weight: Pointer,  # [SIZE]
    total: Pointer,  # [rows, SIZE]
    out: Pointer,  # [rows, SIZE]
    eps: Scalar,
    token_stride: Scalar,
    head_stride: Scalar,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,  # SIZE, rounded up
    TERMS: tl.constexpr,  # 0 if x is no sum
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROUNDS_TWICE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid [rows]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    dtype = out.dtype.element_ty
    if HAS_NORM:
        factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if TERMS == 0:
        source = x + row // HEADS * token_stride + row % HEADS * head_stride + column
        value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    else:
        value = tl.zeros([BLOCK], tl.float32)
        for term in range(TERMS):
            value += tl.load(x + (row * TERMS + term) * SIZE + column, mask=inside, other=0.0)
        value = value.to(dtype).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + row * SIZE + column, mask=inside, other=0.0).to(tl.float32)
        value = value.to(dtype).to(tl.float32)
    if HAS_RESIDUAL or TERMS > 0:
        tl.store(total + row * SIZE + column, value.to(dtype), mask=inside)
    if HAS_NORM:
        value = value * tl.rsqrt(tl.sum(value * value, 0) / SIZE + eps)
        if ROUNDS_TWICE:
            value = value.to(dtype).to(tl.float32)
        tl.store(out + row * SIZE + column, (value * factor).to(dtype), mask=inside)


@triton.jit
def _two_norms_kernel(
    x: Pointer,  # [tokens, ...]
    weight: Pointer,  # [SIZE]
    second_weight: Pointer,  # [SECOND_SIZE]
    out: Pointer,  # [tokens, HEADS * SIZE + ...]
    eps: Scalar,
    second_eps: Scalar,
    token_stride: Scalar,
    second_start: Scalar,  # column of x
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    SECOND_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,  # the larger size, rounded up
    COLUMNS: tl.constexpr,  # of out
    ROUNDS_TWICE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid [tokens, heads of both]."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    is_second = head >= HEADS
    size = tl.where(is_second, SECOND_SIZE, SIZE)
    head = tl.where(is_second, head - HEADS, head)
    column = tl.arange(0, BLOCK)
    inside = column < size
    if is_second:
        factor = tl.load(second_weight + column, mask=inside, other=0.0).to(tl.float32)
    else:
        factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x += token * token_stride + tl.where(is_second, second_start, 0) + head * size + column
    value = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / size + tl.where(is_second, second_eps, eps))
    dtype = out.dtype.element_ty
    if ROUNDS_TWICE:
        value = value.to(dtype).to(tl.float32)
    out += token * COLUMNS + tl.where(is_second, HEADS * SIZE, 0) + head * size + column
    tl.store(out, (value * factor).to(dtype), mask=inside)


class SliceNorm(NamedTuple):
    """A norm of columns of a tensor.

    Attributes:
        start: first column
        columns: number of columns, a multiple of the norm's size: each block of this size is normalized
        norm: of a block
    """

    start: int
    columns: int
    norm: NormWeight


def two_norms(x: Tensor, first: SliceNorm, second: SliceNorm) -> tuple[Tensor, Tensor]:
    """Normalize two ranges of the columns of x [tokens, columns]: queries and keys of a joint projection.

    Returns:
        [tokens, columns of the range] for both, rows contiguous.
    """
    size, second_size = len(first.norm.weight), len(second.norm.weight)
    heads, columns = first.columns // size, first.columns + second.columns
    out = torch.empty(len(x), columns, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(max(size, second_size))
    pdl = launch.supports_pdl(x.device)
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    with launch.device_of(x):
        _two_norms_kernel[(len(x), heads + second.columns // second_size)](
            x[:, first.start :],
            first.norm.weight,
            second.norm.weight,
            out,
            first.norm.eps,
            second.norm.eps,
            x.stride(0),
            second.start - first.start,
            HEADS=heads,
            SIZE=size,
            SECOND_SIZE=second_size,
            BLOCK=block,
            COLUMNS=columns,
            ROUNDS_TWICE=first.norm.rounds_twice,
            PDL=pdl,
            num_warps=_num_warps(block),
            **options,
        )
    normed, second_normed = out.split([first.columns, second.columns], 1)
    return normed, second_normed


def usable(x: Tensor, norm: NormWeight) -> bool:
    """Whether ``rms_norm`` supports a row's size and dtype."""
    return x.dtype == norm.weight.dtype and x.shape[-1] == len(norm.weight) <= MAX_SIZE and x.stride(-1) == 1


def rms_norm(x: Tensor, norm: NormWeight) -> Tensor:
    """Normalize the last axis of x, of any shape and strides: contiguous, in x's dtype."""
    heads = x.shape[-2] if x.dim() > 3 else 1
    rows = x.view(-1, heads, x.shape[-1]) if _is_viewable(x, heads) else x.reshape(-1, heads, x.shape[-1])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(rows, None, norm, out, out, heads=heads, terms=0)
    return out


def add(x: Tensor, residual: Tensor | None, norm: NormWeight | None, terms: int = 0) -> tuple[Tensor, Tensor]:
    """Add a residual connection to x, and normalize the sum.

    Args:
        x: as ``residual``; or float32 with an axis of ``terms`` before the last one, which is summed first
        residual: contiguous, or None
        norm: of the sum, or None
        terms: terms of a sum in x, 0 if it is none

    Returns:
        The sum in the dtype of the residual, and the normalized sum. Without a norm the sum twice.
    """
    size = x.shape[-1]
    assert residual is not None or norm is not None
    like = residual if residual is not None else norm.weight  # type: ignore[union-attr]
    shape = residual.shape if residual is not None else (*x.shape[:-2], size)
    total = torch.empty(shape, dtype=like.dtype, device=x.device)
    out = total if norm is None else torch.empty_like(total)
    _launch(x.reshape(-1, 1, size), residual, norm, total, out, heads=1, terms=terms)
    return total, out


def sum_shares(shares: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over the second axis of shares, float32 [T, S, H], rounded once: [T, H]."""
    tokens, terms, size = shares.shape
    if torch.compiler.is_compiling() or size > MAX_SIZE:  # a compiler fuses the sum with what follows
        return shares.sum(1).to(dtype)
    total = torch.empty(tokens, size, dtype=dtype, device=shares.device)
    _launch(shares.view(-1, 1, size), None, None, total, total, heads=1, terms=terms)
    return total


def _num_warps(block: int) -> int:
    """Return the warps of a program for a row of ``block`` elements."""
    return max(1, min(8, block // ELEMENTS_PER_WARP))


def _is_viewable(x: Tensor, heads: int) -> bool:
    """Whether [.., heads, size] is a view with one stride for all leading axes."""
    leading = [(n, s) for n, s in zip(x.shape[: -2 if heads > 1 else -1], x.stride(), strict=False) if n > 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(leading))


def _launch(
    rows: Tensor, residual: Tensor | None, norm: NormWeight | None, total: Tensor, out: Tensor, heads: int, terms: int
) -> None:
    """Launch the kernel on rows [.., heads, size]."""
    size = rows.shape[-1]
    count = total.numel() // size
    if not count:
        return
    block = triton.next_power_of_2(size)
    pdl = launch.supports_pdl(rows.device)
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    with launch.device_of(rows):
        _norm_kernel[(count,)](
            rows,
            total if residual is None else residual,
            total if norm is None else norm.weight,
            total,
            out,
            0.0 if norm is None else norm.eps,
            rows.stride(0),
            rows.stride(1),
            HEADS=heads,
            SIZE=size,
            BLOCK=block,
            TERMS=terms,
            HAS_RESIDUAL=residual is not None,
            HAS_NORM=norm is not None,
            ROUNDS_TWICE=norm is not None and norm.rounds_twice,
            PDL=pdl,
            num_warps=_num_warps(block),
            **options,
        )
