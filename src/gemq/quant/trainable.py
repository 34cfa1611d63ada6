"""Codes, scales and offsets that gradients can train: the straight-through step.

Every weight has a latent, a real number in units of codes; the weight in use is ``scale * round(latent) + offset`` and
the gradient passes the rounding unchanged (Bengio et al., arXiv:1308.3432). Scales and offsets are trained as relative
changes. The result is again codes, scales and offsets: nothing of this is visible in a checkpoint.

Experts of different widths train side by side, since a width is only the highest code. Knows no models and no files.
Shapes: E experts, R rows, C columns, G groups a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemq.quant.grid import Quantized, nearest

MARGIN = 0.4
"""How far a latent may lie outside the codes: less than a rounding, so that it can always come back."""


BETAS, EPS = (0.9, 0.95), 1e-8
"""Of AdamW, everywhere."""


class TrainableMatrices:
    """E matrices on their grids, trainable.

    latents:  [E, R, C] float32, in codes; None fixes the codes and trains scales and offsets only
    q:        where training starts, with the codes that stay when ``latents`` is None
    highest:  [E] float32, the highest code of each matrix
    by_range: what the optimizer moves is the latent times the highest code, so that a step of Adam, whose size is the
              learning rate, is the same share of the weights' range at every width; else it is the latent itself
    """

    def __init__(self, q: Quantized, highest: Tensor, latents: Tensor | None, by_range: bool = False):
        self.highest = highest.view(-1, 1, 1)
        self.unit = self.highest if by_range else torch.ones_like(self.highest)
        self.codes = q.codes
        self.base_scale, self.base_offset = q.scales, q.offsets
        self.latents = None
        if latents is not None:
            self.latents = latents.float() * self.unit
            self.keep_in_range()
            self.latents.requires_grad_()
        self.scale_change = torch.zeros_like(self.base_scale, requires_grad=True)
        self.offset_change = torch.zeros_like(self.base_offset, requires_grad=True)

    def grids(self) -> list[Tensor]:
        """The trainable changes of scales and offsets."""
        return [self.scale_change, self.offset_change]

    def leaves(self) -> list[Tensor]:
        """What has gradients."""
        return [p for p in (self.latents, *self.grids()) if p is not None]

    def trained(self) -> list[Tensor]:
        """All numbers that training changes."""
        return self.leaves()

    def weight(self) -> Tensor:
        """[E, R, C] float32, as a checkpoint with these codes would mean it; differentiable."""
        scale, offset = self.grid()
        if self.latents is None:
            codes = self.codes.float()
        else:
            codes = _straight_through(self.latents / self.unit, self._rounded())
        groups = codes.unflatten(-1, (scale.shape[-1], -1))
        return torch.addcmul(offset.unsqueeze(-1), groups, scale.unsqueeze(-1)).flatten(-2)

    @torch.no_grad()
    def keep_in_range(self) -> None:
        """Brings latents back to where they still matter. Call after every step of the optimizer."""
        if self.latents is not None:
            self.latents.clamp_(-MARGIN * self.unit, (self.highest + MARGIN) * self.unit)

    @torch.no_grad()
    def result(self) -> Quantized:
        """What training arrived at."""
        scale, offset = self.grid()
        codes = self.codes if self.latents is None else self._rounded().to(torch.uint8)
        return Quantized(codes, scale, offset)

    def _rounded(self) -> Tensor:
        assert self.latents is not None
        return (self.latents.detach() / self.unit).round_().clamp_(self.latents.new_zeros(()), self.highest)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scales and offsets [E, R, G] float32, as they are stored; differentiable."""
        return _Stored.apply(self.scale_change, self.offset_change, self.base_scale, self.base_offset, self.highest)


class _Stored(torch.autograd.Function):
    """Scales and offsets as they are stored, from relative changes; gradients as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(tensors[2])
        if tensors[0].is_cuda:
            from gemq.quant.grid_kernel import changed  # needs triton, which comes with torch for CUDA

            return changed(*tensors)
        scale_change, offset_change, base_scale, base_offset, highest = tensors
        return nearest(base_scale * (1 + scale_change), base_offset + base_scale * offset_change, highest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_scale: Tensor, of_offset: Tensor) -> tuple[Tensor | None, ...]:
        (base_scale,) = ctx.saved_tensors
        return of_scale * base_scale, of_offset * base_scale, None, None, None


def rounded_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` with the values that ``dtype`` holds, gradients as if nothing had been rounded."""
    return _straight_through(x, x.detach().to(dtype).to(x.dtype))


def _straight_through(x: Tensor, value: Tensor) -> Tensor:
    return value + (x - x.detach())


def cosine_with_warmup(step: int, steps: int, warmup: float = 0.05) -> float:
    """Factor of the learning rate at ``step`` of ``steps``: linear to 1, then along a cosine to 0."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return (step + 1) / ramp
    progress = (step - ramp) / max(1, steps - ramp)
    return float(0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item()))


def cosine_factors(steps: int) -> list[float]:
    """``cosine_with_warmup`` of every step."""
    return [cosine_with_warmup(step, steps) for step in range(steps)]


def epochs(count: int, times: int, seed: int) -> Iterator[int]:
    """Numbers 0 .. count - 1 in a new seeded order for each of ``times`` epochs."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(times):
        yield from torch.randperm(count, generator=generator).tolist()
