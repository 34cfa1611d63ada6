"""Routers that a kernel computes: the softmax of all logits, and its largest values.

As norms (``fused_norms``), routers are recognized by what they compute, not by name. Others run the family's code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

TOKENS = 16
"""Tokens of the test."""

MAX_DIFFERENCE = 0.01
"""Relative difference of bfloat16 scores up to which two routers are equal. A roundoff is 4e-3."""


class RouterKind(NamedTuple):
    """What a router computes besides the softmax.

    Attributes:
        top_k: experts of a token
        is_normalized: whether a token's scores are divided by their sum
        has_float_scores: whether scores are float32, otherwise they have the dtype of the logits
    """

    top_k: int
    is_normalized: bool
    has_float_scores: bool


@torch.no_grad()
def router_kind(module: nn.Module, device: torch.device, kinds: dict[Any, Any]) -> RouterKind | None:
    """Returns what a router computes, or None for other routers and for modules that are none.

    Args:
        module: any module
        device: on which one router of each class and size is tested
        kinds: results of earlier tests, which this call extends
    """
    weight, top_k = getattr(module, "weight", None), getattr(module, "top_k", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or not isinstance(top_k, int):
        return None
    key = (type(module), weight.shape, top_k)
    if key not in kinds:
        kinds[key] = _tested_kind(module, weight.shape, top_k, device)
    kind: RouterKind | None = kinds[key]
    return kind


def _tested_kind(router: nn.Module, shape: torch.Size, top_k: int, device: torch.device) -> RouterKind | None:
    """Compares a router with the softmax on random numbers."""
    if list(router.state_dict()) != ["weight"]:
        return None
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, shape[1], generator=generator).to(device, torch.bfloat16)
    weight = (torch.randn(shape, generator=generator) * shape[1] ** -0.5).to(device, torch.bfloat16)
    try:
        logits, scores, index = functional_call(router, {"weight": weight}, (hidden,))
        plain_logits = F.linear(hidden, weight)
        top = plain_logits.softmax(-1, torch.float32).topk(top_k).values
        is_softmax = _is_close(logits, plain_logits) and _is_close(logits.gather(1, index), plain_logits.topk(top_k)[0])
    except Exception:  # noqa: BLE001 - model code, which may require other arguments
        return None
    for is_normalized in (False, True):
        expected = top / top.sum(-1, keepdim=True) if is_normalized else top
        if is_softmax and _is_close(scores, expected):
            return RouterKind(top_k, is_normalized, scores.dtype == torch.float32)
    return None


def _is_close(result: Tensor, expected: Tensor) -> bool:
    """Whether two tensors have the same shape and values."""
    if result.shape != expected.shape:
        return False
    difference = (result.float() - expected.float()).abs()
    return bool((difference <= MAX_DIFFERENCE * expected.float().abs().clamp(min=1e-3)).all())


def fused_route(router: Any, kind: RouterKind, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a router in two kernels.

    Returns:
        Logits [T, E], scores [T, K] and indices [T, K].
    """
    from gemq.kernels.decode.router import route  # triton is not installed with torch for CPUs

    dtype = torch.float32 if kind.has_float_scores else hidden.dtype
    return route(hidden, router.weight, kind.top_k, kind.is_normalized, dtype)
