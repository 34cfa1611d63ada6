"""``TrainableMatrices`` for a GPU: a step is one kernel, which leaves the weights that the next forward pass uses.

In float32 jobs everything is float32. Else latents are 16-bit parts of their range and moments bfloat16: 10 bytes a
weight with gradient and weight in use, and as few bytes to move. Knows no models and no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gemq.quant.grid import Quantized, dequantize_each, nearest
from gemq.quant.trainable import BETAS, MARGIN, TrainableMatrices

PARTS = 65535
"""Equal parts of a latent's range that int16 tells apart."""


class State(NamedTuple):
    """E matrices in training: everything a step reads and writes, [E, R, C] or, of groups, [E, R, C / G].

    weight:  in use, the compute type
    latents: float32, or int16 (see above)
    moments: first and second of the latents
    base:    scales and offsets where training started, float32
    changes: of scales and offsets, relative to the scales; float32
    grid_moments: first and second of both changes, float32
    """

    weight: Tensor
    latents: Tensor
    moments: tuple[Tensor, Tensor]
    base: tuple[Tensor, Tensor]
    changes: tuple[Tensor, Tensor]
    grid_moments: tuple[Tensor, Tensor, Tensor, Tensor]


class Steps(NamedTuple):
    """What differs from step to step, where kernels read it: they are launched alike, also from a CUDA graph.

    rates:  [N, 3] float32: each step's learning rates of codes and of grids, with Adam's correction of first moments,
            and what roots of second moments are multiplied by for theirs
    number: int64 scalar, steps taken
    """

    rates: Tensor
    number: Tensor

    @classmethod
    def of(cls, codes: float, grids: float, factors: Sequence[float], number: Tensor) -> Steps:
        """Learning rates ``codes`` and ``grids`` times each step's factor."""
        first, second = BETAS
        rows = []
        for step, factor in enumerate(factors, 1):
            rate = factor / (1 - first**step)
            rows.append((codes * rate, grids * rate, (1 - second**step) ** -0.5))
        return cls(torch.tensor(rows, device=number.device), number)


def latent_type(device: torch.device, compute: torch.dtype) -> torch.dtype:
    """The type in which latents wait for training and are trained: see above."""
    return torch.int16 if device.type == "cuda" and compute != torch.float32 else torch.float32


def trainable(
    q: Quantized,
    highest: Tensor,
    latents: Tensor,
    compute: torch.dtype,
    by_range: bool = False,
    numbers: Tensor | None = None,
) -> TrainableMatrices | FusedMatrices:
    """Matrices to train where ``latents`` lie (``latent_type``), as the device takes them. Owns the latents."""
    if latents.device.type == "cuda":
        return FusedMatrices(q, highest, latents, compute, by_range, numbers)
    return TrainableMatrices(q, highest, latents, by_range)


class FusedMatrices:
    """E matrices on their grids, trained in place. Arguments as of ``TrainableMatrices``; ``latents`` float32 or int16.

    compute: type of the weights in use
    numbers: int64 [E], what tells a matrix from all that are trained in other calls of one layer, so that it is rounded
             alike whichever of them are trained with it; by default its place
    """

    def __init__(
        self,
        q: Quantized,
        highest: Tensor,
        latents: Tensor,
        compute: torch.dtype,
        by_range: bool = False,
        numbers: Tensor | None = None,
    ):
        self.highest, self.by_range = highest, by_range
        self.numbers = torch.arange(len(highest), device=highest.device) if numbers is None else numbers
        fixed = latents.dtype == torch.int16
        if not fixed:
            latents = latents.clamp(-MARGIN, torch.inf)
            latents = torch.minimum(latents, highest.view(-1, 1, 1) + MARGIN)
        weight = dequantize_each(q, compute)
        self.leaf = weight.requires_grad_()
        moments = torch.bfloat16 if fixed else torch.float32

        def zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
            return torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)

        groups = [zeros(q.scales, torch.float32) for _ in range(6)]
        self.state = State(
            weight.detach(),
            latents.contiguous(),
            (zeros(latents, moments), zeros(latents, moments)),
            (q.scales.contiguous(), q.offsets.contiguous()),
            (groups[0], groups[1]),
            (groups[2], groups[3], groups[4], groups[5]),
        )

    def weight(self) -> Tensor:
        """[E, R, C] in the compute type, as a checkpoint with these codes would mean it. A leaf of autograd."""
        return self.leaf

    def leaves(self) -> list[Tensor]:
        """What has gradients."""
        return [self.leaf]

    def trained(self) -> list[Tensor]:
        """All numbers that training changes."""
        return [self.state.latents, *self.state.changes]

    def step(self, steps: Steps, seed: int = 0) -> None:
        """Takes the next of ``steps`` down the gradient that the leaf has, and drops it. Counting is the caller's."""
        from gemq.quant.step_kernel import step  # triton comes with torch for CUDA, not for CPUs

        gradient, self.leaf.grad = self.leaf.grad, None
        if gradient is not None:
            step(self.state, gradient, self.highest, self.numbers, steps, self.by_range, seed)

    def keep_in_range(self) -> None:
        """Nothing to do: a step does it."""

    @torch.no_grad()
    def result(self) -> Quantized:
        """What training arrived at."""
        codes = torch.empty(self.leaf.shape, dtype=torch.uint8, device=self.leaf.device)
        for one, latents, highest in zip(codes, self.state.latents, self.highest, strict=True):
            one.copy_(decoded(latents, highest).round_().clamp_(highest.new_zeros(()), highest))
        base_scale, base_offset = self.state.base
        scale = base_scale * (1 + self.state.changes[0])
        offset = base_offset + base_scale * self.state.changes[1]
        return Quantized(codes, *nearest(scale, offset, self.highest.view(-1, 1, 1)))


def encoded(latents: Tensor, highest: Tensor) -> Tensor:
    """Latents [..., R, C] float32 as int16; ``highest`` broadcasts."""
    parts = (latents + MARGIN) * (PARTS / (highest + 2 * MARGIN))
    return (parts.round().clamp(0, PARTS) - 32768).to(torch.int16)


def decoded(latents: Tensor, highest: Tensor) -> Tensor:
    """Latents as float32, of either type."""
    if latents.dtype != torch.int16:
        return latents.clone()
    return (latents.float() + 32768) * ((highest + 2 * MARGIN) / PARTS) - MARGIN
