"""Moves powers of two between the matrices of an expert whose weights are outside the range of scales.

The scale of a packed weight lies between 2^-24 and 240. An expert computes the same if the rows that are multiplied
with the gate grow by 2^k and the down matrix shrinks by 2^k. The result is identical to the bit, since floating-point
numbers represent powers of two exactly. Experts inside the range are not changed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gemq.quant.grid import largest_weights
from gemq.runtime.compat import transformers_private

MIN_LARGEST_WEIGHT = 2.0**-14
MAX_LARGEST_WEIGHT = 2.0**6
"""If the largest weight of a matrix is between these bounds, scales can represent all of its groups at every width."""

TEST_FACTOR = 2.0**10


def balance(module: Any, gate_up: Tensor, down: Tensor) -> bool:
    """Balances the matrices of experts outside the range of scales in place.

    Synchronizes with the device once.

    Args:
        module: the family's experts module, which applies the gate
        gate_up: gate and up of all experts, [E, 2 I, H], or [E, H, 2 I] if the module is transposed
        down: [E, H, I], or [E, I, H]

    Returns:
        Whether an expert was changed.
    """
    if not module.has_gate or module.has_bias:
        return False
    up = _up_view(module, gate_up)
    up_sizes, down_sizes = torch.stack([largest_weights(up), largest_weights(down)]).tolist()
    exponents = [_exponent(*sizes) for sizes in zip(up_sizes, down_sizes, strict=True)]
    if not any(exponents) or not _scales_with_up(module):
        return False
    factors = torch.tensor([2.0**k for k in exponents], dtype=gate_up.dtype, device=gate_up.device).view(-1, 1, 1)
    up.mul_(factors)
    down.div_(factors)
    return True


def _exponent(up: float, down: float) -> int:
    """Returns the power of two that makes the largest weights of both matrices equal.

    It is 0 if both matrices are in range, or one is zero.
    """
    if not (up and down):
        return 0
    if all(MIN_LARGEST_WEIGHT <= weight <= MAX_LARGEST_WEIGHT for weight in (up, down)):
        return 0
    return round((math.log2(down) - math.log2(up)) / 2)


def _up_view(module: Any, gate_up: Tensor) -> Tensor:
    """Returns a view of the rows (columns if transposed) of ``gate_up`` that are multiplied with the gate."""
    dim = -1 if module.is_transposed else -2
    size = gate_up.shape[dim] // 2
    if getattr(module, "is_concatenated", True):
        return gate_up.narrow(dim, size, size)
    return gate_up[..., 1::2] if module.is_transposed else gate_up[..., 1::2, :]


def _scales_with_up(module: Any) -> bool:
    """Whether the gate's result is linear in its second factor. It is not if the family clamps it or adds to it."""
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(4, 64, generator=generator) * torch.logspace(-3, 3, 4).unsqueeze(1)
    up_columns = slice(32, None) if getattr(module, "is_concatenated", True) else slice(1, None, 2)
    scaled = gate_up.clone()
    scaled[:, up_columns] *= TEST_FACTOR
    try:
        gate = transformers_private.expert_activation(module)
        return torch.equal(gate(scaled), gate(gate_up) * TEST_FACTOR)
    except (RuntimeError, NotImplementedError):  # an activation with parameters on another device
        return False
