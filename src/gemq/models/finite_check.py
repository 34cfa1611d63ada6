"""Checks that weights are finite numbers, once for every tensor that is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def largest_finite(*dtypes: torch.dtype) -> float:
    """Returns the largest number that all of these floating-point dtypes can represent."""
    return min(torch.finfo(dtype).max for dtype in dtypes)


def not_finite(tensors: Mapping[str, Tensor], limits: Mapping[str, float] | None = None) -> list[str]:
    """Returns the names of floating-point tensors that contain NaN, infinity or a number beyond their limit.

    Synchronizes with the device once for all tensors.

    Args:
        tensors: by name, all on one device
        limits: largest absolute value by name; by default the largest number of the tensor's dtype
    """
    names = []
    is_finite = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            limit = (limits or {}).get(name, largest_finite(tensor.dtype))
            low, high = torch.aminmax(tensor.detach())  # both are NaN if a value is, and comparisons are false then
            is_finite.append((low.double() >= -limit) & (high.double() <= limit))
            names.append(name)
    if not names:
        return []
    flags = torch.stack(is_finite).tolist()
    return [name for name, flag in zip(names, flags, strict=True) if not flag]
