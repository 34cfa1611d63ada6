"""Root-mean-square norms in one or two kernels where a family writes them in eight.

A norm is small, and a layer has up to four: on a GPU their kernels are a third of what a layer launches, forward as
backward. Taken over is what computes the same, which is measured for each kind; all others stay the family's own.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gemq.models.structure import is_norm

LARGEST_DIFFERENCE = 1e-3
"""Relative, in bfloat16, whose roundings are 4e-3: a kind that rounds elsewhere differs by 2e-3."""


def _rounded_before_weight(norm: Any, hidden: Tensor) -> Tensor:
    return norm.weight * F.rms_norm(hidden, hidden.shape[-1:], None, _eps(norm))


def _rounded_once(norm: Any, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, hidden.shape[-1:], norm.weight, _eps(norm))


_KINDS: tuple[Callable[[Any, Tensor], Tensor], ...] = (_rounded_before_weight, _rounded_once)


def _eps(norm: Any) -> float | None:
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return found if isinstance(found, float) else None


@torch.no_grad()
def use_fused_norms(model: nn.Module, device: torch.device) -> int:
    """Makes a model's norms compute on ``device`` as ``torch.nn.functional.rms_norm`` does. Returns how many do.

    Of norms of one class and size one is tried, on random numbers; weights are not looked at.
    """
    known: dict[tuple[type, int, float | None], Callable[[Any, Tensor], Tensor] | None] = {}
    count = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not is_norm(module) or not isinstance(weight, Tensor) or weight.dim() != 1:
            continue
        kind = (type(module), len(weight), _eps(module))
        if kind not in known:
            known[kind] = next((own for own in _KINDS if _same(own, module, device)), None)
        if (own := known[kind]) is not None:
            module.forward = MethodType(own, module)
            count += 1
    return count


def _same(own: Callable[[Any, Tensor], Tensor], norm: Any, device: torch.device) -> bool:
    """Whether a norm computes what ``own`` does."""
    if list(norm.state_dict()) != ["weight"] or _eps(norm) is None:
        return False
    generator = torch.Generator().manual_seed(0)
    size = len(norm.weight)
    hidden, weight = (torch.randn(n, size, generator=generator).to(device, torch.bfloat16) for n in (64, 1))
    try:
        expected = functional_call(norm, {"weight": weight[0]}, (hidden,)).float()
    except (AttributeError, RuntimeError, TypeError):  # it wants more than hidden states
        return False
    found = own(SimpleNamespace(weight=weight[0], eps=_eps(norm)), hidden).float()
    return float((found - expected).norm() / expected.norm()) < LARGEST_DIFFERENCE
