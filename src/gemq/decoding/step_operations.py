"""Operations of a decode step around the model, which may be compiled: the visible positions and the next token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemq.decoding.static_cache import ALL_LAYERS

MAX_ARGMAX_CHUNKS = 64
"""Upper bound for the number of chunks of the vocabulary in ``argmax``."""


def advance(token: Tensor, position: Tensor, choose: Callable[[Tensor], Tensor], logits: Tensor) -> None:
    """Writes the next token and position into the buffers."""
    token.copy_(choose(logits))
    position.add_(1)


def argmax(logits: Tensor) -> Tensor:
    """Returns the argmax of logits [batch, V] as [batch, 1].

    Reduces chunks of a row first, which occupies more of a GPU than one reduction per row.
    """
    num_chunks = math.gcd(logits.shape[1], MAX_ARGMAX_CHUNKS)
    chunk_size = logits.shape[1] // num_chunks
    values, indices = logits.view(logits.shape[0], num_chunks, -1).max(-1)
    chunk = values.argmax(-1, keepdim=True)
    return chunk * chunk_size + indices.gather(-1, chunk)


def visible_ranges(position: Tensor, windows: dict[str, int | None]) -> Any:
    """Returns the first visible position and the end of the visible positions, as ``step_attention`` takes them.

    Args:
        position: of the step, int64 [1]
        windows: sliding windows, see ``attention_windows``

    Returns:
        int32 [1, 1, 1, 2], in the form of ``Decoder._additive_masks``.
    """
    end = position.to(torch.int32) + 1
    ranges = {}
    for layer_type, window in windows.items():
        start = torch.zeros_like(end) if window is None else (end - window).clamp(min=0)
        ranges[layer_type] = torch.cat([start, end]).view(1, 1, 1, 2)
    return ranges.get(ALL_LAYERS, ranges)
