"""The end of a greedy decode step in two launches: the most likely tokens, and the next position.

Legend: B sequences, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemq.kernels.decode import launch
from gemq.kernels.triton_types import Pointer, Scalar

CHUNK = 1024
"""Logits of a program."""


@triton.jit
def _chunk_kernel(
    logits: Pointer,  # [B, V]
    values: Pointer,  # float32 [B, chunks]
    indices: Pointer,  # int32 [B, chunks]
    row_stride: Scalar,
    vocabulary: Scalar,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid [B, chunks]. Of equal logits the first is chosen."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row, chunk = tl.program_id(0), tl.program_id(1)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row.to(tl.int64) * row_stride + index, mask=index < vocabulary, other=float("-inf"))
    x = x.to(tl.float32)
    largest = tl.max(x, 0)
    target = row * tl.num_programs(1) + chunk
    tl.store(values + target, largest)
    tl.store(indices + target, tl.min(tl.where(x == largest, index, vocabulary - 1), 0))


@triton.jit
def _advance_kernel(
    values: Pointer,  # float32 [B, chunks]
    indices: Pointer,  # int32 [B, chunks]
    token: Pointer,  # int64 [B]
    position: Pointer,  # int64 [1]
    chunks: Scalar,
    BLOCK: tl.constexpr,  # chunks, rounded up
    PDL: tl.constexpr,
):
    """Grid [B]."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    chunk = tl.arange(0, BLOCK)
    value = tl.load(values + row * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
    index = tl.load(indices + row * chunks + chunk, mask=chunk < chunks, other=2147483647)
    largest = tl.max(value, 0)
    tl.store(token + row, tl.min(tl.where(value == largest, index, 2147483647), 0).to(tl.int64))
    if row == 0:
        tl.store(position, tl.load(position) + 1)


def advance(logits: Tensor, token: Tensor, position: Tensor) -> None:
    """Choose the next tokens, and advance the position.

    Args:
        logits: [B, V], rows contiguous
        token: int64 [B, 1], written
        position: int64 [1], incremented
    """
    batch, vocabulary = logits.shape
    chunks = triton.cdiv(vocabulary, CHUNK)
    values = torch.empty(batch, chunks, dtype=torch.float32, device=logits.device)
    indices = torch.empty(batch, chunks, dtype=torch.int32, device=logits.device)
    pdl = launch.supports_pdl(logits.device)
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    with launch.device_of(logits):
        _chunk_kernel[(batch, chunks)](
            logits, values, indices, logits.stride(0), vocabulary, CHUNK, pdl, num_warps=4, **options
        )
        _advance_kernel[(batch,)](
            values, indices, token, position, chunks, triton.next_power_of_2(chunks), pdl, num_warps=4, **options
        )
