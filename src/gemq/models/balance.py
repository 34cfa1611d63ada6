"""Powers of two moved from one of an expert's matrices to the other, where scales would not reach one of them.

A packed weight's scale lies between 2^-24 and 240. What an expert computes does not change when the rows that it
multiplies with the gate become 2^k times as large and its down matrix 2^-k times; nor does a bit of it, since floats
hold powers of two exactly. Experts within reach stay as they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gemq.quant.grid import largest_weights

LEAST, MOST = 2.0**-14, 2.0**6
"""Within these bounds of a matrix's largest weight, scales reach all of its groups at every width."""


def balance(module: Any, first: Tensor, down: Tensor) -> bool:
    """Balances an experts module's matrices in place, those of experts that are beyond reach.

    Waits once for the device. Returns whether there were any.

    Args:
        module: of the family; it applies the gate.
        first: gate and up of all experts, [E, 2 I, H], or [E, H, 2 I] if the module is transposed.
        down: [E, H, I], or [E, I, H].
    """
    if not module.has_gate or module.has_bias:
        return False
    sizes = torch.stack([largest_weights(_up(module, first)), largest_weights(down)]).tolist()
    exponents = [_exponent(up, other) for up, other in zip(*sizes, strict=True)]
    if not any(exponents) or not _scales_with_up(module):
        return False
    factors = torch.tensor([2.0**k for k in exponents], dtype=first.dtype, device=first.device).view(-1, 1, 1)
    _up(module, first).mul_(factors)
    down.div_(factors)
    return True


def _exponent(up: float, down: float) -> int:
    """What brings the largest weights of both matrices to one size; 0 where both are within reach, or one is zero."""
    if not (up and down) or (LEAST <= up <= MOST and LEAST <= down <= MOST):
        return 0
    return round((math.log2(down) - math.log2(up)) / 2)


def _up(module: Any, first: Tensor) -> Tensor:
    """A view of the rows (columns if transposed) of ``first`` that are multiplied with the gate."""
    dim = -1 if module.is_transposed else -2
    size = first.shape[dim] // 2
    if getattr(module, "is_concatenated", True):
        return first.narrow(dim, size, size)
    return first[..., 1::2] if module.is_transposed else first[..., 1::2, :]


def _scales_with_up(module: Any) -> bool:
    """Whether the gate's result is exactly 2^k times as large when its second factor is: no clamp, nothing added."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(4, 64, generator=generator) * torch.logspace(-3, 3, 4).unsqueeze(1)
    scaled = whole.clone()
    second = slice(32, None) if getattr(module, "is_concatenated", True) else slice(1, None, 2)
    scaled[:, second] *= 2.0**10
    try:
        return torch.equal(module._apply_gate(scaled), module._apply_gate(whole) * 2.0**10)
    except (RuntimeError, NotImplementedError):  # an activation with parameters of its own, on another device
        return False
