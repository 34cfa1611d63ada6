"""Routers that take the softmax of all logits and then the largest ones: logits in one launch, choice in another.

Legend: T tokens, E experts, K experts per token, H hidden size.

From Hopper on a kernel starts while the previous one ends.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemq.kernels.decode import launch
from gemq.kernels.triton_types import Pointer, Scalar

MAX_TOKENS = 16
"""Up to this many tokens, logits have a kernel. A vendor's product takes longer than reading the weights."""

MAX_EXPERTS = 1024

BLOCK_EXPERTS = 4
"""Experts of a program: few, so that many programs share the weights."""

BLOCK_COLUMNS = 2048


@triton.jit
def _logits_kernel(
    x: Pointer,  # [T, H]
    weight: Pointer,  # [E, H]
    logits: Pointer,  # [T, E]
    experts: Scalar,
    SIZE: tl.constexpr,  # H
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid [blocks of experts, T]."""
    token = tl.program_id(1)
    expert = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)
    is_expert = (expert < experts)[:, None]
    rows = weight + expert[:, None] * SIZE + column[None, :]
    w = tl.load(rows, mask=is_expert & (column < SIZE)[None, :], other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x += token * SIZE + column
    total = w * tl.load(x, mask=column < SIZE, other=0.0).to(tl.float32)[None, :]
    for start in range(COLUMNS, SIZE, COLUMNS):
        inside = start + column < SIZE
        w = tl.load(rows + start, mask=is_expert & inside[None, :], other=0.0).to(tl.float32)
        total += w * tl.load(x + start, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(logits + token * experts + expert, tl.sum(total, 1).to(logits.dtype.element_ty), mask=expert < experts)


@triton.jit
def _choose_kernel(
    logits: Pointer,  # [T, E]
    scores: Pointer,  # [T, K]
    index: Pointer,  # [T, K] int64
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,  # EXPERTS, rounded up
    K: tl.constexpr,
    SLOTS: tl.constexpr,  # K, rounded up
    NORMALIZED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid [T]. Of equal logits the first is chosen."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    x = tl.load(logits + token * EXPERTS + expert, mask=expert < EXPERTS, other=float("-inf")).to(tl.float32)
    largest = tl.max(x, 0)
    total = tl.sum(tl.exp(x - largest), 0)
    slot = tl.arange(0, SLOTS)
    chosen = tl.full([SLOTS], float("-inf"), tl.float32)
    numbers = tl.zeros([SLOTS], tl.int32)
    for k in tl.static_range(K):
        value = tl.max(x, 0)
        number = tl.min(tl.where(x == value, expert, BLOCK), 0)
        chosen = tl.where(slot == k, value, chosen)
        numbers = tl.where(slot == k, number, numbers)
        x = tl.where(expert == number, float("-inf"), x)
    probability = tl.exp(chosen - largest) / total
    if NORMALIZED:
        probability = probability / tl.sum(probability, 0)
    target = token * K + slot
    tl.store(scores + target, probability.to(scores.dtype.element_ty), mask=slot < K)
    tl.store(index + target, numbers.to(tl.int64), mask=slot < K)


def usable(x: Tensor, weight: Tensor) -> bool:
    """Whether ``route`` supports hidden states x [.., H] and a router's weight [E, H]."""
    return x.dtype == weight.dtype and len(weight) <= MAX_EXPERTS and weight.is_contiguous()


def route(
    x: Tensor, weight: Tensor, top_k: int, normalized: bool, scores_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose experts.

    Args:
        x: [.., H] hidden states
        weight: [E, H]
        top_k: K
        normalized: whether a token's scores are divided by their sum
        scores_dtype: of the scores

    Returns:
        Logits [T, E] in x's dtype, scores [T, K], and indices [T, K] int64, the largest score first.
    """
    x = x.reshape(-1, x.shape[-1])
    tokens, experts = len(x), len(weight)
    pdl = launch.supports_pdl(x.device)
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    scores = torch.empty(tokens, top_k, dtype=scores_dtype, device=x.device)
    index = torch.empty(tokens, top_k, dtype=torch.int64, device=x.device)
    with launch.device_of(x):
        if tokens <= MAX_TOKENS:
            logits = torch.empty(tokens, experts, dtype=x.dtype, device=x.device)
            grid = (triton.cdiv(experts, BLOCK_EXPERTS), tokens)
            columns = min(BLOCK_COLUMNS, triton.next_power_of_2(x.shape[1]))
            sizes = (experts, x.shape[1], BLOCK_EXPERTS, columns, pdl)
            _logits_kernel[grid](x.contiguous(), weight, logits, *sizes, num_warps=4, **options)
        else:
            logits = F.linear(x, weight)
        block, slots = triton.next_power_of_2(experts), triton.next_power_of_2(top_k)
        constants = (experts, block, top_k, slots, normalized, pdl)
        _choose_kernel[(tokens,)](logits, scores, index, *constants, num_warps=1 if block <= 256 else 4, **options)
    return logits, scores, index
