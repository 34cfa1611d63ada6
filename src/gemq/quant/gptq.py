"""GPTQ on batches of matrices, every width at once.

For each column in turn (Frantar et al., arXiv:2210.17323): round it to its group's grid, then spread the rounding
error over the columns still to come, in proportion to the rows of the Cholesky factor of the inverse Hessian. Rows are
independent given the factor, and so are experts and widths: all of them go through one loop over columns. On a GPU
that loop is inside a kernel (``gptq_kernel``).

Shapes: W widths, E experts, R rows, C columns, G group size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gemq.quant.grid import Quantized, nearest
from gemq.quant.widths import LEVELS, Width

LLOYD_ROUNDS = 6
"""Rounds of rounding to the grid and fitting the grid to the rounding. More changes nothing that can be measured."""

WIDER = 1.04
"""By how much scales of 8 bits are widened before they are rounded: steps too wide cost less there than cut ends."""


def gptq(
    weight: Tensor, upper: Tensor, widths: tuple[Width, ...], group_size: int, latents: Tensor | None = None
) -> Quantized:
    """Quantizes matrices at several widths with error feedback.

    weight:  [E, R, C], any float dtype
    upper:   [E, C, C] float32, from ``hessian.factorize``
    latents: [W, E, R, C], filled with each weight in units of codes before it was rounded, where training starts

    Returns codes [W, E, R, C] uint8 with scales and offsets [W, E, R, C / G] float32.
    """
    return _gptq(weight, upper, highest_codes(widths, weight.device).unsqueeze(1), group_size, latents)


def gptq_mixed(
    weight: Tensor, upper: Tensor, widths: Sequence[Width], group_size: int, latents: Tensor | None = None
) -> Quantized:
    """Quantizes matrices with error feedback, each at its own width: one of ``widths`` [E] for each expert.

    As ``gptq``, without the leading dimension of widths.
    """
    highest = highest_codes(widths, weight.device).unsqueeze(0)
    q = _gptq(weight, upper, highest, group_size, None if latents is None else latents.unsqueeze(0))
    return Quantized(*(t[0] for t in q))


def _gptq(weight: Tensor, upper: Tensor, highest: Tensor, group_size: int, latents: Tensor | None) -> Quantized:
    """``highest`` [W or 1, E or 1]: the highest code of each matrix."""
    if weight.is_cuda:
        from gemq.quant.gptq_kernel import quantize  # needs triton, which comes with torch for CUDA

        every = highest.expand(len(highest), len(weight))
        return quantize(weight, upper, every, group_size, latents)
    with _one_thread(weight.device):
        return _column_loop(weight, upper, highest.unsqueeze(2), group_size, latents)


def _column_loop(weight: Tensor, upper: Tensor, highest: Tensor, group_size: int, latents: Tensor | None) -> Quantized:
    """The plain loop: for CPUs, and what ``gptq_kernel`` is tested against. ``highest`` [W, E or 1, 1]."""
    experts, rows, columns = weight.shape
    lowest = highest.new_zeros(())
    w = weight.float().expand(len(highest), experts, rows, columns).clone()
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    scales = torch.empty(*w.shape[:3], columns // group_size, device=w.device)
    offsets = torch.empty_like(scales)
    for start in range(0, columns, group_size):
        stop = start + group_size
        block = w[..., start:stop].clone()
        triangle = upper[:, start:stop, start:stop]
        pivots = triangle.diagonal(dim1=-2, dim2=-1)  # [E, G]
        # a column's rounding error costs (error / pivot)^2: what the grid should fit. Relative to the largest, since
        # squares of pivots overflow where activations are tiny
        importance = (pivots.amin(-1, keepdim=True) / pivots).square().unsqueeze(1)  # [E, 1, G]
        scale, offset = fit_grid(block, highest.unsqueeze(3), importance)
        scales[..., start // group_size], offsets[..., start // group_size] = scale, offset
        errors = torch.empty_like(block)
        for j in range(group_size):
            column = block[..., j]
            latent = (column - offset) / scale
            code = latent.round().clamp_(lowest, highest)
            codes[..., start + j] = code.to(torch.uint8)
            if latents is not None:
                latents[..., start + j] = latent
            error = (column - torch.addcmul(offset, code, scale)) / pivots[:, j].unsqueeze(-1)
            errors[..., j] = error
            if j + 1 < group_size:
                block[..., j + 1 :] -= error.unsqueeze(-1) * triangle[:, None, j, j + 1 :]
        if stop < columns:
            w[..., stop:] -= errors @ upper[:, start:stop, stop:]
    return Quantized(codes, scales, offsets)


def round_to_nearest(weight: Tensor, widths: tuple[Width, ...], group_size: int) -> Quantized:
    """Rounds matrices [E, R, C] to grids fitted to the weights alone. Returns what ``gptq`` returns."""
    highest = highest_codes(widths, weight.device).view(-1, 1, 1, 1, 1)
    w = weight.float().unflatten(-1, (-1, group_size)).expand(len(widths), -1, -1, -1, -1)
    scale, offset = fit_grid(w, highest, None)
    codes = ((w - offset.unsqueeze(-1)) / scale.unsqueeze(-1)).round_().clamp_(highest.new_zeros(()), highest)
    return Quantized(codes.to(torch.uint8).reshape(len(widths), *weight.shape), scale, offset)


def fit_grid(w: Tensor, highest: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and offset of each group of weights w [..., G], for codes 0 .. ``highest``, which broadcasts.

    Both [...] float32, with values that bytes stand for. Starts from the smallest and largest weight, then alternates
    rounding with a least-squares fit of the line through (code, weight) pairs, weighted by ``importance``. With two
    levels this is k-means with two free centres.
    """
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    scale, offset = (high - low) / highest, low
    weights = torch.ones_like(w[..., :1]) if importance is None else importance
    weights = weights / weights.sum(-1, keepdim=True) if importance is not None else weights / w.shape[-1]
    mean_w = (weights * w).sum(-1, keepdim=True)
    for _ in range(LLOYD_ROUNDS):
        step = torch.where(scale > 0, scale, torch.ones_like(scale))
        code = ((w - offset) / step).round_().clamp_(highest.new_zeros(()), highest)
        mean_code = (weights * code).sum(-1, keepdim=True)
        spread = code - mean_code
        variance = (weights * spread.square()).sum(-1, keepdim=True)
        slope = (weights * spread * w).sum(-1, keepdim=True) / variance.clamp_min(1e-20)
        # a group whose codes are all alike has no slope: its scale stays
        scale = torch.where((variance > 1e-12) & (slope > 0), slope, scale)
        offset = mean_w - scale * mean_code
    # the stored scale first, then the offset that fits best with it, unless the offset is what made it that wide
    stored, _ = nearest(torch.where(highest > 15, scale * WIDER, scale), offset, highest)
    offset = torch.where(stored < 1.2 * scale, mean_w + (offset - mean_w) * (stored / scale), offset)
    scale, offset = nearest(stored, offset, highest)
    return scale.squeeze(-1), offset.squeeze(-1)


def highest_codes(widths: Sequence[Width], device: torch.device) -> Tensor:
    """The highest code of each width: [len(widths)] float32."""
    return torch.tensor([LEVELS[w] - 1.0 for w in widths], device=device)


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On CPU, one thread: the column loop is thousands of small steps, and waiting for a second thread at the end of
    each costs more than it gains (150 times more where another process keeps that core busy)."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if device.type == "cpu":
            torch.set_num_threads(threads)
