"""One step of training quantized matrices, in one pass over them.

From the gradient of the weights in use: the gradients of latents, scales and offsets (straight through the rounding),
AdamW on all three, latents kept in range, and the next weights in use. A group of weights belongs to one program, so
nothing is read or written twice. The reference is ``trainable.TrainableMatrices`` under torch's AdamW.

Latents are float32, or int16 in equal parts of the range where they may lie, rounded at random in proportion to what
is left, so that steps smaller than a part count on average. Moments have any float type.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemq.quant.grid_kernel import change_grid, nearest_code
from gemq.quant.trainable import BETAS, EPS, MARGIN
from gemq.quant.trainable_gpu import State, Steps

_MARGIN, _EPS = tl.constexpr(MARGIN), tl.constexpr(EPS)
_BETA1, _BETA2 = tl.constexpr(BETAS[0]), tl.constexpr(BETAS[1])
_PARTS = tl.constexpr(65535.0)


@triton.jit
def encode(latent, highest, noise):
    """Latents as int16; ``noise`` in [0, 1), 0.5 for the nearest."""
    part = (latent + _MARGIN) * (_PARTS / (highest + 2 * _MARGIN)) - 32768.0
    return tl.minimum(tl.maximum(tl.floor(part + noise), -32768.0), 32767.0).to(tl.int16)


@triton.jit
def decode(stored, highest):
    return (stored.to(tl.float32) + 32768.0) * ((highest + 2 * _MARGIN) / _PARTS) - _MARGIN


@triton.jit
def _adam(first, second, place, mask, gradient, rate, correction):
    """Updates both moments and returns the step to take. Divides once: there is no time for more."""
    m = tl.load(first + place, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(second + place, mask=mask, other=0.0).to(tl.float32)
    m += (1 - _BETA1) * (gradient - m)
    v = _BETA2 * v + (1 - _BETA2) * gradient * gradient
    tl.store(first + place, m.to(first.dtype.element_ty), mask=mask)
    tl.store(second + place, v.to(second.dtype.element_ty), mask=mask)
    return rate * m / (tl.sqrt(v) * correction + _EPS)


@triton.jit(do_not_specialize=["seed"])
def _step_kernel(
    weight,
    gradient,
    latents,
    first,
    second,
    base_scales,
    base_offsets,
    scale_changes,
    offset_changes,
    scale_first,
    scale_second,
    offset_first,
    offset_second,
    highest,  # [E] float32
    numbers,  # [E] int64, see ``FusedMatrices``
    groups,  # of all matrices
    per_matrix,  # groups
    rates,  # [steps, 3] float32, see ``Steps``
    number,
    seed,
    BY_RANGE: tl.constexpr,
    FIXED: tl.constexpr,
    BLOCK: tl.constexpr,
    G: tl.constexpr,
):
    taken = tl.load(number)
    rate_codes, rate_grids = tl.load(rates + taken * 3), tl.load(rates + taken * 3 + 1)
    correction = tl.load(rates + taken * 3 + 2)
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < groups
    mask = inside[:, None]
    place = group[:, None] * G + tl.arange(0, G)[None, :]
    high = tl.load(highest + group // per_matrix, mask=inside, other=1.0)
    base_scale = tl.load(base_scales + group, mask=inside, other=0.0)
    base_offset = tl.load(base_offsets + group, mask=inside, other=0.0)
    scale_change = tl.load(scale_changes + group, mask=inside, other=0.0)
    offset_change = tl.load(offset_changes + group, mask=inside, other=0.0)
    scale, offset = change_grid(base_scale, base_offset, scale_change, offset_change, high)
    of_group, high = high, high[:, None]

    slope = tl.load(gradient + place, mask=mask, other=0.0).to(tl.float32)
    stored = tl.load(latents + place, mask=mask, other=0)
    latent = decode(stored, high) if FIXED else stored
    code = nearest_code(latent, high)
    of_scale = tl.sum(slope * code, 1) * base_scale
    of_offset = tl.sum(slope, 1) * base_scale

    of_latent = slope * scale[:, None]
    if BY_RANGE:  # Adam moves latent * high
        unit = 1.0 / high
        change = _adam(first, second, place, mask, of_latent * unit, rate_codes, correction) * unit
    else:
        change = _adam(first, second, place, mask, of_latent, rate_codes, correction)
    latent = tl.minimum(tl.maximum(latent - change, -_MARGIN), high + _MARGIN)
    if FIXED:
        of_step = (seed * 1000003 + (taken + 1) * 7919) & 0x7FFFFFFF
        matrix = tl.load(numbers + group // per_matrix, mask=inside, other=0)
        among = (matrix * per_matrix + group % per_matrix)[:, None] * G + tl.arange(0, G)[None, :]
        bits = (among.to(tl.uint32) ^ of_step.to(tl.uint32)) * 2654435769
        bits = (bits ^ (bits >> 15)) * 2246822507
        bits = (bits ^ (bits >> 13)) * 3266489909
        stored = encode(latent, high, (bits >> 16).to(tl.float32) * (1.0 / 65536))
        latent = decode(stored, high)
        tl.store(latents + place, stored, mask=mask)
    else:
        tl.store(latents + place, latent, mask=mask)
    scale_change -= _adam(scale_first, scale_second, group, inside, of_scale, rate_grids, correction)
    offset_change -= _adam(offset_first, offset_second, group, inside, of_offset, rate_grids, correction)
    tl.store(scale_changes + group, scale_change, mask=inside)
    tl.store(offset_changes + group, offset_change, mask=inside)
    scale, offset = change_grid(base_scale, base_offset, scale_change, offset_change, of_group)
    code = nearest_code(latent, high)
    value = offset[:, None] + code * scale[:, None]
    tl.store(weight + place, value.to(weight.dtype.element_ty), mask=mask)


BLOCK_WEIGHTS = 1024
"""Weights of one program: 8 in each of 128 threads. 16 need so many registers that a step takes a quarter longer."""


def step(
    state: State, gradient: Tensor, highest: Tensor, numbers: Tensor, steps: Steps, by_range: bool, seed: int
) -> None:
    """Takes the next of ``steps`` down ``gradient`` [E, R, C], of the weights in use, and writes all of ``state``.

    highest: [E] float32, the highest code of each matrix; ``numbers`` as in ``FusedMatrices``
    """
    scales = state.base[0]
    groups, per_matrix = scales.numel(), scales[0].numel()
    size = state.weight.shape[-1] // scales.shape[-1]
    block = max(1, BLOCK_WEIGHTS // size)
    _step_kernel[(triton.cdiv(groups, block),)](
        state.weight,
        gradient.contiguous(),
        state.latents,
        *state.moments,
        *state.base,
        *state.changes,
        *state.grid_moments,
        highest,
        numbers,
        groups,
        per_matrix,
        *steps,
        seed,
        BY_RANGE=by_range,
        FIXED=state.latents.dtype == torch.int16,
        BLOCK=block,
        G=size,
        num_warps=4,
    )
