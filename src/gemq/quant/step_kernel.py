"""One training step of quantized matrices, in a single pass over them.

From the gradient of the weights in use, the kernel computes the gradients of soft codes, scales and offsets (straight
through the rounding), applies AdamW to all three, clamps the soft codes and writes the next weights in use. A group of
weights belongs to one program, so that nothing is read or written twice. The reference is
``trainable.TrainableMatrices`` under torch's AdamW.

Soft codes are float32, or int16 in equal steps over the range where they may lie. int16 is rounded stochastically, so
that updates smaller than a step count on average. Adam's moments have any float dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemq.quant.grid_kernel import change_grid, nearest_code
from gemq.quant.trainable import BETAS, EPS, MARGIN
from gemq.quant.trainable_gpu import INT16_STEPS, StepSchedule, TrainingState

_MARGIN, _EPS = tl.constexpr(MARGIN), tl.constexpr(EPS)
_BETA1, _BETA2 = tl.constexpr(BETAS[0]), tl.constexpr(BETAS[1])
_INT16_STEPS = tl.constexpr(float(INT16_STEPS))

BLOCK_WEIGHTS = 1024
"""Weights of one program: 8 in each of 128 threads. With 16, register pressure makes a step a quarter slower."""


@triton.jit
def encode(soft_code, max_code, noise):
    """Round soft codes to int16. ``noise`` is in [0, 1): 0.5 rounds to nearest."""
    position = (soft_code + _MARGIN) * (_INT16_STEPS / (max_code + 2 * _MARGIN)) - 32768.0
    return tl.minimum(tl.maximum(tl.floor(position + noise), -32768.0), 32767.0).to(tl.int16)


@triton.jit
def decode(stored, max_code):
    """Return int16 soft codes as float32."""
    return (stored.to(tl.float32) + 32768.0) * ((max_code + 2 * _MARGIN) / _INT16_STEPS) - _MARGIN


@triton.jit
def _adam(first_moments, second_moments, index, mask, gradient, rate, correction):
    """Update both moments and return the step to take. Uses one division: more would make the kernel compute-bound."""
    m = tl.load(first_moments + index, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(second_moments + index, mask=mask, other=0.0).to(tl.float32)
    m += (1 - _BETA1) * (gradient - m)
    v = _BETA2 * v + (1 - _BETA2) * gradient * gradient
    tl.store(first_moments + index, m.to(first_moments.dtype.element_ty), mask=mask)
    tl.store(second_moments + index, v.to(second_moments.dtype.element_ty), mask=mask)
    return rate * m / (tl.sqrt(v) * correction + _EPS)


@triton.jit
def _noise(position, seed):
    """Return uniform numbers in [0, 1), a function of the weight's position and the seed."""
    bits = (position.to(tl.uint32) ^ seed.to(tl.uint32)) * 2654435769
    bits = (bits ^ (bits >> 15)) * 2246822507
    bits = (bits ^ (bits >> 13)) * 3266489909
    return (bits >> 16).to(tl.float32) * (1.0 / 65536)


@triton.jit(do_not_specialize=["seed"])
def _step_kernel(
    weight,  # [E, R, C], like all per-weight tensors; see ``TrainingState``
    gradient,
    soft_codes,
    first_moments,
    second_moments,
    base_scales,  # [E, R, C / G], like all per-group tensors
    base_offsets,
    scale_changes,
    offset_changes,
    scale_first_moments,
    scale_second_moments,
    offset_first_moments,
    offset_second_moments,
    max_codes,  # [E] float32
    matrix_ids,  # [E] int64, see ``FusedMatrices``
    num_groups,  # of all matrices
    groups_per_matrix,
    rates,  # [steps, 3] float32, see ``StepSchedule``
    step_index_pointer,
    seed,
    SCALE_BY_MAX_CODE: tl.constexpr,
    IS_INT16: tl.constexpr,
    BLOCK: tl.constexpr,
    G: tl.constexpr,
):
    """Take a step with ``BLOCK`` groups of ``G`` weights."""
    step_index = tl.load(step_index_pointer)
    lr_codes, lr_grids = tl.load(rates + step_index * 3), tl.load(rates + step_index * 3 + 1)
    correction = tl.load(rates + step_index * 3 + 2)
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    group_mask = group < num_groups
    mask = group_mask[:, None]
    index = group[:, None] * G + tl.arange(0, G)[None, :]
    group_max_code = tl.load(max_codes + group // groups_per_matrix, mask=group_mask, other=1.0)
    base_scale = tl.load(base_scales + group, mask=group_mask, other=0.0)
    base_offset = tl.load(base_offsets + group, mask=group_mask, other=0.0)
    scale_change = tl.load(scale_changes + group, mask=group_mask, other=0.0)
    offset_change = tl.load(offset_changes + group, mask=group_mask, other=0.0)
    scale, offset = change_grid(base_scale, base_offset, scale_change, offset_change, group_max_code)
    max_code = group_max_code[:, None]

    grad_weight = tl.load(gradient + index, mask=mask, other=0.0).to(tl.float32)
    stored = tl.load(soft_codes + index, mask=mask, other=0)
    soft_code = decode(stored, max_code) if IS_INT16 else stored
    code = nearest_code(soft_code, max_code)
    grad_scale = tl.sum(grad_weight * code, 1) * base_scale
    grad_offset = tl.sum(grad_weight, 1) * base_scale

    grad_code = grad_weight * scale[:, None]
    if SCALE_BY_MAX_CODE:  # Adam moves soft_code * max_code
        unit = 1.0 / max_code
        change = _adam(first_moments, second_moments, index, mask, grad_code * unit, lr_codes, correction) * unit
    else:
        change = _adam(first_moments, second_moments, index, mask, grad_code, lr_codes, correction)
    soft_code = tl.minimum(tl.maximum(soft_code - change, -_MARGIN), max_code + _MARGIN)
    if IS_INT16:
        step_seed = (seed * 1000003 + (step_index + 1) * 7919) & 0x7FFFFFFF
        matrix_id = tl.load(matrix_ids + group // groups_per_matrix, mask=group_mask, other=0)
        group_id = matrix_id * groups_per_matrix + group % groups_per_matrix
        position = group_id[:, None] * G + tl.arange(0, G)[None, :]
        stored = encode(soft_code, max_code, _noise(position, step_seed))
        soft_code = decode(stored, max_code)
        tl.store(soft_codes + index, stored, mask=mask)
    else:
        tl.store(soft_codes + index, soft_code, mask=mask)
    scale_change -= _adam(
        scale_first_moments, scale_second_moments, group, group_mask, grad_scale, lr_grids, correction
    )
    offset_change -= _adam(
        offset_first_moments, offset_second_moments, group, group_mask, grad_offset, lr_grids, correction
    )
    tl.store(scale_changes + group, scale_change, mask=group_mask)
    tl.store(offset_changes + group, offset_change, mask=group_mask)
    scale, offset = change_grid(base_scale, base_offset, scale_change, offset_change, group_max_code)
    code = nearest_code(soft_code, max_code)
    value = offset[:, None] + code * scale[:, None]
    tl.store(weight + index, value.to(weight.dtype.element_ty), mask=mask)


def step(
    state: TrainingState,
    gradient: Tensor,
    max_code: Tensor,
    matrix_ids: Tensor,
    schedule: StepSchedule,
    scale_by_max_code: bool,
    seed: int,
) -> None:
    """Take the next step and overwrite ``state``.

    Args:
        state: E matrices in training.
        gradient: [E, R, C], of the weights in use.
        max_code: [E] float32, the largest code of each matrix.
        matrix_ids: [E] int64, as in ``FusedMatrices``.
        schedule: Learning rates and the position in them.
        scale_by_max_code: As for ``TrainableMatrices``.
        seed: Of the stochastic rounding.
    """
    scales = state.base[0]
    num_groups, groups_per_matrix = scales.numel(), scales[0].numel()
    group_size = state.weight.shape[-1] // scales.shape[-1]
    block = max(1, BLOCK_WEIGHTS // group_size)
    _step_kernel[(triton.cdiv(num_groups, block),)](
        state.weight,
        gradient.contiguous(),
        state.soft_codes,
        *state.moments,
        *state.base,
        *state.changes,
        *state.grid_moments,
        max_code,
        matrix_ids,
        num_groups,
        groups_per_matrix,
        *schedule,
        seed,
        SCALE_BY_MAX_CODE=scale_by_max_code,
        IS_INT16=state.soft_codes.dtype == torch.int16,
        BLOCK=block,
        G=group_size,
        num_warps=4,
    )
