"""Tensors of any shape and dtype in one buffer of bytes, for an exchange between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gemq.runtime.integers import round_up

ALIGNMENT = 16
"""Tensors that share an exchange begin at multiples of this many bytes."""


class TensorLayout(NamedTuple):
    """Shape and dtype of a tensor that another rank holds."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> TensorLayout:
        """Return the layout of ``tensor``."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.nbytes)

    def view(self, buffer: Tensor, start: int) -> Tensor:
        """Return the tensor whose bytes begin at ``start`` of ``buffer`` (uint8)."""
        return buffer[start : start + self.bytes].view(self.dtype).view(self.shape)


def buffer_offsets(layouts: Sequence[TensorLayout | None]) -> list[int]:
    """Return where each tensor begins in a buffer that holds all of them, and the size of the buffer, in bytes."""
    offsets = [0]
    for layout in layouts:
        tensor_bytes = 0 if layout is None else layout.bytes
        offsets.append(offsets[-1] + round_up(tensor_bytes, ALIGNMENT))
    return offsets
