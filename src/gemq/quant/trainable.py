"""Training of codes, scales and offsets by gradients, with a straight-through estimator for the rounding.

Every weight has a soft code, a real number in units of codes. The weight in use is ``scale * round(soft_code) +
offset``, and the gradient passes the rounding unchanged (Bengio et al., arXiv:1308.3432). Scales and offsets are
trained as relative changes. The result is again codes, scales and offsets, so that a checkpoint shows nothing of this.

Matrices of different widths train in one batch, since a width is only the largest code. Must not import models or
files.

Shapes: E matrices, R rows, C columns, G groups a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemq.quant.grid import Quantized, nearest, nearest_scales

MARGIN = 0.4
"""How far a soft code may lie outside the codes: less than half a code, so that it can always return."""


BETAS, EPS = (0.9, 0.95), 1e-8
"""Parameters of AdamW, used everywhere."""


class TrainableMatrices:
    """E trainable matrices on their grids.

    Attributes:
        soft_codes: [E, R, C] float32, times ``unit``; None if the codes are fixed.
        unit: [E, 1, 1], units of ``soft_codes`` in one code.
        max_code: [E, 1, 1] float32.
        base_scale: [E, R, G], where training starts.
        base_offset: Likewise.
        scale_change: [E, R, G], trained change of the scales, relative to them.
        offset_change: [E, R, G], trained change of the offsets, in units of the scales.
    """

    def __init__(self, q: Quantized, max_code: Tensor, soft_codes: Tensor | None, scale_by_max_code: bool = False):
        """
        Args:
            q: Where training starts. Without ``soft_codes``, its codes stay.
            max_code: [E] float32, the largest code of each matrix.
            soft_codes: [E, R, C], in codes. None trains scales and offsets only.
            scale_by_max_code: Train the soft code times the largest code. A step of Adam, whose size is the learning
                rate, is then the same share of the weights' range at every width.
        """
        self.max_code = max_code.view(-1, 1, 1)
        self.unit = self.max_code if scale_by_max_code else torch.ones_like(self.max_code)
        self.codes = q.codes
        self.base_scale, self.base_offset = q.scales, q.offsets
        self.soft_codes = None
        if soft_codes is not None:
            self.soft_codes = soft_codes.float() * self.unit
            self.keep_in_range()
            self.soft_codes.requires_grad_()
        self.scale_change = torch.zeros_like(self.base_scale, requires_grad=True)
        self.offset_change = torch.zeros_like(self.base_offset, requires_grad=True)

    def grids(self) -> list[Tensor]:
        """Return the trainable changes of scales and offsets."""
        return [self.scale_change, self.offset_change]

    def leaves(self) -> list[Tensor]:
        """Return the tensors that have gradients."""
        return self.grids() if self.soft_codes is None else [self.soft_codes, *self.grids()]

    def trained(self) -> list[Tensor]:
        """Return the tensors that training changes."""
        return self.leaves()

    def weight(self) -> Tensor:
        """Return the weights [E, R, C] float32 that a checkpoint with these codes has; differentiable."""
        scale, offset = self.grid()
        if self.soft_codes is None:
            codes = self.codes.float()
        else:
            codes = _straight_through(self.soft_codes / self.unit, self._rounded())
        groups = codes.unflatten(-1, (scale.shape[-1], -1))
        return torch.addcmul(offset.unsqueeze(-1), groups, scale.unsqueeze(-1)).flatten(-2)

    @torch.no_grad()
    def keep_in_range(self) -> None:
        """Clamp soft codes to the range where they can return. Call after every step of the optimizer."""
        if self.soft_codes is not None:
            self.soft_codes.clamp_(-MARGIN * self.unit, (self.max_code + MARGIN) * self.unit)

    @torch.no_grad()
    def result(self) -> Quantized:
        """Return the matrices as trained so far."""
        scale, offset = self.grid()
        codes = self.codes if self.soft_codes is None else self._rounded().to(torch.uint8)
        return Quantized(codes, scale, offset)

    def _rounded(self) -> Tensor:
        """Return the codes as floats, outside autograd."""
        assert self.soft_codes is not None
        soft_codes = self.soft_codes.detach() / self.unit
        return soft_codes.round_().clamp_(self.soft_codes.new_zeros(()), self.max_code)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return scales and offsets [E, R, G] float32 as they are stored; differentiable."""
        return _StoredGrid.apply(
            self.scale_change, self.offset_change, self.base_scale, self.base_offset, self.max_code
        )


class _StoredGrid(torch.autograd.Function):
    """Scales and offsets as they are stored, from relative changes. Gradients ignore the rounding."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Round changed scales and offsets to what bytes can represent."""
        scale_change, offset_change, base_scale, base_offset, max_code = tensors
        ctx.save_for_backward(base_scale)
        if scale_change.is_cuda:
            from gemq.quant.grid_kernel import changed  # needs triton, which comes with torch for CUDA

            return changed(scale_change, offset_change, base_scale, base_offset, max_code)
        return nearest(base_scale * (1 + scale_change), base_offset + base_scale * offset_change, max_code)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_scale: Tensor, grad_offset: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of the two changes."""
        (base_scale,) = ctx.saved_tensors
        return grad_scale * base_scale, grad_offset * base_scale, None, None, None


def rounded_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round ``x`` to the values of ``dtype``, with gradients that ignore the rounding."""
    return _straight_through(x, x.detach().to(dtype).to(x.dtype))


def rounded_to_scales(scales: Tensor) -> Tensor:
    """Round scales to the values that a byte can represent, with gradients that ignore the rounding."""
    return _straight_through(scales, nearest_scales(scales.detach()))


def _straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` with the gradient of ``x``."""
    return value + (x - x.detach())


def cosine_with_warmup(step: int, steps: int, warmup: float = 0.05) -> float:
    """Return the factor of the learning rate at ``step`` of ``steps``: linear to 1, then along a cosine to 0."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return (step + 1) / ramp
    progress = (step - ramp) / max(1, steps - ramp)
    return float(0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item()))


def cosine_factors(steps: int) -> list[float]:
    """Return ``cosine_with_warmup`` of every step."""
    return [cosine_with_warmup(step, steps) for step in range(steps)]


def epochs(count: int, times: int, seed: int) -> Iterator[int]:
    """Yield 0 .. count - 1 in a new seeded order for each of ``times`` epochs."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(times):
        yield from torch.randperm(count, generator=generator).tolist()
