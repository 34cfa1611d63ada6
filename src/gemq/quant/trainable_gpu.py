"""``TrainableMatrices`` for a GPU: one kernel takes a step and writes the weights of the next forward pass.

In float32 jobs everything is float32. Otherwise soft codes are 16-bit fractions of their range and Adam's moments are
bfloat16. With gradient and weight in use that is 10 bytes per weight to store and to move. Must not import models or
files.

Shapes: E matrices, R rows, C columns, G group size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gemq.quant.grid import Quantized, dequantize_each, nearest
from gemq.quant.trainable import BETAS, MARGIN, TrainableMatrices

INT16_STEPS = 65535
"""Equal parts of a soft code's range that int16 distinguishes."""


class TrainingState(NamedTuple):
    """Everything that a step reads and writes: [E, R, C] per weight, or [E, R, C / G] per group.

    Attributes:
        weight: Weights in use, in the compute dtype.
        soft_codes: float32 or int16.
        moments: Adam's first and second moment of the soft codes.
        base: Scales and offsets where training started, float32.
        changes: Of scales and offsets, relative to the scales; float32.
        grid_moments: First and second moment of the change of scales, then of offsets; float32.
    """

    weight: Tensor
    soft_codes: Tensor
    moments: tuple[Tensor, Tensor]
    base: tuple[Tensor, Tensor]
    changes: tuple[Tensor, Tensor]
    grid_moments: tuple[Tensor, Tensor, Tensor, Tensor]


class StepSchedule(NamedTuple):
    """What differs between steps, in device memory, so that all launches are equal and a CUDA graph can repeat them.

    Attributes:
        rates: [steps, 3] float32: learning rates of codes and of grids, both with Adam's bias correction of first
            moments, and the factor that corrects the root of second moments.
        step_index: int64 scalar, steps taken.
    """

    rates: Tensor
    step_index: Tensor

    @classmethod
    def create(cls, lr_codes: float, lr_grids: float, factors: Sequence[float], step_index: Tensor) -> StepSchedule:
        """Return the schedule of learning rates that are multiplied by ``factors``, one for each step."""
        beta1, beta2 = BETAS
        rows = []
        for step, factor in enumerate(factors, 1):
            corrected = factor / (1 - beta1**step)
            rows.append((lr_codes * corrected, lr_grids * corrected, (1 - beta2**step) ** -0.5))
        return cls(torch.tensor(rows, device=step_index.device), step_index)


def soft_code_dtype(device: torch.device, compute: torch.dtype) -> torch.dtype:
    """Return the dtype in which soft codes are kept and trained."""
    return torch.int16 if device.type == "cuda" and compute != torch.float32 else torch.float32


def trainable(
    q: Quantized,
    max_code: Tensor,
    soft_codes: Tensor,
    compute: torch.dtype,
    scale_by_max_code: bool = False,
    matrix_ids: Tensor | None = None,
) -> TrainableMatrices | FusedMatrices:
    """Return matrices to train on the device of ``soft_codes``. Arguments as of ``FusedMatrices``."""
    if soft_codes.device.type == "cuda":
        return FusedMatrices(q, max_code, soft_codes, compute, scale_by_max_code, matrix_ids)
    return TrainableMatrices(q, max_code, soft_codes, scale_by_max_code)


class FusedMatrices:
    """E matrices on their grids, trained in place by a fused step."""

    def __init__(
        self,
        q: Quantized,
        max_code: Tensor,
        soft_codes: Tensor,
        compute: torch.dtype,
        scale_by_max_code: bool = False,
        matrix_ids: Tensor | None = None,
    ):
        """
        Args:
            q: Where training starts.
            max_code: [E] float32, the largest code of each matrix.
            soft_codes: [E, R, C] float32 in codes, or int16. Taken over.
            compute: Dtype of the weights in use.
            scale_by_max_code: As for ``TrainableMatrices``.
            matrix_ids: int64 [E], seeds of the stochastic rounding: a matrix with the same id is rounded the same way
                whichever matrices it is trained with. By default its index.
        """
        self.max_code, self.scale_by_max_code = max_code, scale_by_max_code
        self.matrix_ids = torch.arange(len(max_code), device=max_code.device) if matrix_ids is None else matrix_ids
        is_int16 = soft_codes.dtype == torch.int16
        if not is_int16:
            soft_codes = soft_codes.clamp(-MARGIN, torch.inf)
            soft_codes = torch.minimum(soft_codes, max_code.view(-1, 1, 1) + MARGIN)
        weight = dequantize_each(q, compute)
        self.leaf = weight.requires_grad_()
        moments_dtype = torch.bfloat16 if is_int16 else torch.float32
        groups = [_contiguous_zeros(q.scales, torch.float32) for _ in range(6)]
        self.state = TrainingState(
            weight=weight.detach(),
            soft_codes=soft_codes.contiguous(),
            moments=(_contiguous_zeros(soft_codes, moments_dtype), _contiguous_zeros(soft_codes, moments_dtype)),
            base=(q.scales.contiguous(), q.offsets.contiguous()),
            changes=(groups[0], groups[1]),
            grid_moments=(groups[2], groups[3], groups[4], groups[5]),
        )

    def weight(self) -> Tensor:
        """Return the weights [E, R, C] that a checkpoint with these codes has, in the compute dtype: a leaf."""
        return self.leaf

    def leaves(self) -> list[Tensor]:
        """Return the tensors that have gradients."""
        return [self.leaf]

    def trained(self) -> list[Tensor]:
        """Return the tensors that training changes."""
        return [self.state.soft_codes, *self.state.changes]

    def step(self, schedule: StepSchedule, seed: int = 0) -> None:
        """Take the next step with the leaf's gradient, which is dropped. The caller advances the schedule."""
        from gemq.quant.step_kernel import step  # needs triton, which CPU builds of torch lack

        gradient, self.leaf.grad = self.leaf.grad, None
        if gradient is not None:
            step(self.state, gradient, self.max_code, self.matrix_ids, schedule, self.scale_by_max_code, seed)

    def keep_in_range(self) -> None:
        """Do nothing: the step has clamped the soft codes."""

    @torch.no_grad()
    def result(self) -> Quantized:
        """Return the matrices as trained so far."""
        codes = torch.empty(self.leaf.shape, dtype=torch.uint8, device=self.leaf.device)
        for matrix_codes, soft_codes, max_code in zip(codes, self.state.soft_codes, self.max_code, strict=True):
            rounded = decode_soft_codes(soft_codes, max_code).round_()
            matrix_codes.copy_(rounded.clamp_(max_code.new_zeros(()), max_code))
        base_scale, base_offset = self.state.base
        scale_change, offset_change = self.state.changes
        scale = base_scale * (1 + scale_change)
        offset = base_offset + base_scale * offset_change
        scale, offset = nearest(scale, offset, self.max_code.view(-1, 1, 1))
        return Quantized(codes, scale, offset)


def decode_soft_codes(soft_codes: Tensor, max_code: Tensor) -> Tensor:
    """Return float32 or int16 soft codes as float32. ``max_code`` broadcasts."""
    if soft_codes.dtype != torch.int16:
        return soft_codes.clone()
    return (soft_codes.float() + 32768) * ((max_code + 2 * MARGIN) / INT16_STEPS) - MARGIN


def _contiguous_zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros of the shape and device of ``like``."""
    return torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)
