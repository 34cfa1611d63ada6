"""Torch's grouped product: which devices and sizes it takes, and when packed experts are worth decoding for it.

Shapes: P pairs of token and expert, E experts, R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNMENT = 8
"""Rows and columns must be multiples of this, which is 16 bytes."""

MIN_PAIRS = 512
"""Mean pairs of an expert from which packed matrices are decoded once, and a dense product follows. Kernels that decode
in registers do so again for each tile of pairs. On an H200 and at OLMoE's sizes both take the same time here."""

MAX_DECODED_BYTES = 2 << 30
"""Upper bound for one projection of a layer's experts in bfloat16. Larger ones are decoded in registers."""


def is_supported(device: torch.device, dtype: torch.dtype, sizes: Iterable[int]) -> bool:
    """Return whether matrices with rows and columns of these sizes can be multiplied."""
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and not any(size % ALIGNMENT for size in sizes)
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def never_waits(device: torch.device) -> bool:
    """Return whether the host never waits for the device, which a CUDA graph requires: on Hopper and GB200's Blackwell.

    Torch 2.11 loops over experts on other devices, and reads the number of pairs for that.
    """
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply pairs with the matrix of their expert.

    Args:
        x: [P, C], sorted by expert
        weights: [E, R, C]
        ends: [E] int32, the end of each expert's pairs; rows past the last one are undefined

    Returns:
        [P, R].
    """
    return F.grouped_mm(x, weights.mT, offs=ends)


def decodes_first(pairs: int, experts: int, hidden: int, up_rows: int) -> bool:
    """Return whether matrices of this size should be decoded before they multiply ``pairs`` pairs.

    Args:
        pairs: of all experts
        experts: E
        hidden: hidden size
        up_rows: rows of gate and up, or of up alone. Down is not larger
    """
    decoded_bytes = experts * hidden * up_rows * torch.bfloat16.itemsize
    return pairs >= MIN_PAIRS * experts and decoded_bytes <= MAX_DECODED_BYTES
