"""Whether weights are finite numbers: every tensor is looked at once, as it is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def largest_finite(*dtypes: torch.dtype) -> float:
    """The largest number that all of these floating-point types hold."""
    return min(torch.finfo(dtype).max for dtype in dtypes)


def not_finite(tensors: Mapping[str, Tensor], limits: Mapping[str, float] | None = None) -> list[str]:
    """Names of the floating-point tensors that hold NaN, infinity or a number beyond their limit.

    Waits once for the device, not once a tensor.

    Args:
        tensors: by name, all on one device.
        limits: largest absolute value by name; without it that of the tensor's own type.
    """
    names, inside = [], []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            limit = (limits or {}).get(name, largest_finite(tensor.dtype))
            low, high = torch.aminmax(tensor.detach())  # NaN if there is one: no comparison holds
            inside.append((low.double() >= -limit) & (high.double() <= limit))
            names.append(name)
    if not names:
        return []
    return [name for name, ok in zip(names, torch.stack(inside).tolist(), strict=True) if not ok]
