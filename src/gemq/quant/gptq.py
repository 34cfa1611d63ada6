"""GPTQ on batches of matrices, at several widths in one pass.

Each column in turn is rounded to the grid of its group (Frantar et al., arXiv:2210.17323). Its rounding error is then
distributed over the columns that follow, in proportion to the rows of the Cholesky factor of the inverse Hessian. Given
the factor, rows are independent, and so are experts and widths: one loop over columns processes all of them. On a GPU
that loop is inside a kernel (``gptq_kernel``).

Shapes: W widths, E experts, R rows, C columns, G group size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gemq.quant.grid import Quantized, nearest
from gemq.quant.widths import Width

LLOYD_ROUNDS = 6
"""Rounds of rounding to the grid and fitting the grid to the codes. More rounds make no measurable difference."""

WIDER = 1.04
"""Factor by which scales of 8 bits are widened before they are rounded. There a step that is too wide costs less than
clipped weights.
"""


def gptq(
    weight: Tensor, upper: Tensor, widths: tuple[Width, ...], group_size: int, soft_codes: Tensor | None = None
) -> Quantized:
    """Quantize matrices at several widths with error feedback.

    Args:
        weight: [E, R, C], any float dtype.
        upper: [E, C, C] float32, from ``hessian.factorize``.
        widths: W widths.
        group_size: Divides C.
        soft_codes: [W, E, R, C], overwritten by each weight in units of codes before rounding. Training starts there.

    Returns:
        Codes [W, E, R, C] uint8 with scales and offsets [W, E, R, C / G] float32.
    """
    return _gptq(weight, upper, max_codes(widths, weight.device).unsqueeze(1), group_size, soft_codes)


def gptq_mixed(
    weight: Tensor, upper: Tensor, widths: Sequence[Width], group_size: int, soft_codes: Tensor | None = None
) -> Quantized:
    """Quantize matrices with error feedback, each at its own width.

    As ``gptq``, with one width for each expert and without the leading dimension of widths.
    """
    limits = max_codes(widths, weight.device).unsqueeze(0)
    q = _gptq(weight, upper, limits, group_size, None if soft_codes is None else soft_codes.unsqueeze(0))
    return q.select(0)


def _gptq(weight: Tensor, upper: Tensor, max_code: Tensor, group_size: int, soft_codes: Tensor | None) -> Quantized:
    """Run the column loop of the device. ``max_code`` [W or 1, E or 1] is that of each matrix."""
    if weight.is_cuda:
        from gemq.quant.gptq_kernel import quantize  # needs triton, which comes with torch for CUDA

        return quantize(weight, upper, max_code.expand(len(max_code), len(weight)), group_size, soft_codes)
    with _one_thread(weight.device):
        return _column_loop(weight, upper, max_code.unsqueeze(2), group_size, soft_codes)


def _column_loop(
    weight: Tensor, upper: Tensor, max_code: Tensor, group_size: int, soft_codes: Tensor | None
) -> Quantized:
    """Quantize column by column. Used on CPUs, and as the reference of ``gptq_kernel``.

    Args:
        weight: [E, R, C].
        upper: [E, C, C].
        max_code: [W, E or 1, 1].
        group_size: Divides C.
        soft_codes: As in ``gptq``.
    """
    experts, rows, columns = weight.shape
    zero = max_code.new_zeros(())
    w = weight.float().expand(len(max_code), experts, rows, columns).clone()
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    scales = torch.empty(*w.shape[:3], columns // group_size, device=w.device)
    offsets = torch.empty_like(scales)
    for start in range(0, columns, group_size):
        stop = start + group_size
        block = w[..., start:stop].clone()
        triangle = upper[:, start:stop, start:stop]
        pivots = triangle.diagonal(dim1=-2, dim2=-1)  # [E, G]
        # A column's rounding error costs (error / pivot)^2, so the grid should fit these columns best. Relative to the
        # largest, since squares of pivots overflow where activations are tiny.
        importance = (pivots.amin(-1, keepdim=True) / pivots).square().unsqueeze(1)  # [E, 1, G]
        scale, offset = fit_grid(block, max_code.unsqueeze(3), importance)
        scales[..., start // group_size], offsets[..., start // group_size] = scale, offset
        errors = torch.empty_like(block)
        for j in range(group_size):
            column = block[..., j]
            soft_code = (column - offset) / scale
            code = soft_code.round().clamp_(zero, max_code)
            codes[..., start + j] = code.to(torch.uint8)
            if soft_codes is not None:
                soft_codes[..., start + j] = soft_code
            error = (column - torch.addcmul(offset, code, scale)) / pivots[:, j].unsqueeze(-1)
            errors[..., j] = error
            if j + 1 < group_size:
                block[..., j + 1 :] -= error.unsqueeze(-1) * triangle[:, None, j, j + 1 :]
        if stop < columns:
            w[..., stop:] -= errors @ upper[:, start:stop, stop:]
    return Quantized(codes, scales, offsets)


def round_to_nearest(weight: Tensor, widths: tuple[Width, ...], group_size: int) -> Quantized:
    """Round matrices [E, R, C] to grids that are fitted to the weights alone. Returns what ``gptq`` returns."""
    max_code = max_codes(widths, weight.device).view(-1, 1, 1, 1, 1)
    w = weight.float().unflatten(-1, (-1, group_size)).expand(len(widths), -1, -1, -1, -1)
    scale, offset = fit_grid(w, max_code, None)
    codes = ((w - offset.unsqueeze(-1)) / scale.unsqueeze(-1)).round_().clamp_(max_code.new_zeros(()), max_code)
    return Quantized(codes.to(torch.uint8).reshape(len(widths), *weight.shape), scale, offset)


def fit_grid(w: Tensor, max_code: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Fit a scale and an offset to each group of weights.

    Starts from the smallest and the largest weight, then alternates rounding with a weighted least-squares fit of the
    line through (code, weight) pairs. With two levels this is k-means with two free centers.

    Args:
        w: [..., G].
        max_code: Largest code, broadcasts.
        importance: Weights of the fit, broadcast. None weights all columns equally.

    Returns:
        Scale and offset, both [...] float32, with values that bytes can represent.
    """
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    scale, offset = (high - low) / max_code, low
    if importance is None:
        weights = torch.ones_like(w[..., :1]) / w.shape[-1]
    else:
        weights = importance / importance.sum(-1, keepdim=True)
    mean_w = (weights * w).sum(-1, keepdim=True)
    for _ in range(LLOYD_ROUNDS):
        step = torch.where(scale > 0, scale, torch.ones_like(scale))
        code = ((w - offset) / step).round_().clamp_(max_code.new_zeros(()), max_code)
        mean_code = (weights * code).sum(-1, keepdim=True)
        spread = code - mean_code
        variance = (weights * spread.square()).sum(-1, keepdim=True)
        slope = (weights * spread * w).sum(-1, keepdim=True) / variance.clamp_min(1e-20)
        # a group whose codes are all equal has no slope: it keeps its scale
        scale = torch.where((variance > 1e-12) & (slope > 0), slope, scale)
        offset = mean_w - scale * mean_code
    # round the scale first, then take the offset that fits it best, unless the offset is what made the scale that wide
    stored_scale, _ = nearest(torch.where(max_code > 15, scale * WIDER, scale), offset, max_code)
    fitted_offset = mean_w + (offset - mean_w) * (stored_scale / scale)
    offset = torch.where(stored_scale < 1.2 * scale, fitted_offset, offset)
    scale, offset = nearest(stored_scale, offset, max_code)
    return scale.squeeze(-1), offset.squeeze(-1)


def max_codes(widths: Sequence[Width], device: torch.device) -> Tensor:
    """Return the largest code of each width: [len(widths)] float32."""
    return torch.tensor([width.max_code for width in widths], dtype=torch.float32, device=device)


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Use a single thread on a CPU.

    The column loop consists of thousands of small steps. Waiting for a second thread after each costs more than it
    gains, and 150 times more where another process keeps that core busy.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if device.type == "cpu":
            torch.set_num_threads(threads)
