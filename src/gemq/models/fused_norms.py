"""Norms and rotary positions in one or two kernels where families write them in eight and ten.

They are small, and a layer has up to four norms: on a GPU their kernels are two of five that a layer launches, forward
as backward. Taken over is what computes the same, which is tried out for each kind; all others stay the family's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gemq.models.structure import is_norm
from gemq.runtime.fallbacks import optional

LARGEST_DIFFERENCE = 1e-3
"""Relative, in bfloat16, whose roundings are 4e-3: a kind of norm that rounds elsewhere differs by 2e-3."""

ROTARY = "apply_rotary_pos_emb"
"""What the families' modules call the function that turns queries and keys."""

Norm = Callable[[Any, Tensor], Tensor]
Turn = Callable[[Tensor, Tensor, Tensor], Tensor]


def use_fused_kernels(model: nn.Module, device: torch.device) -> None:
    """Makes a model on a GPU, and its family in this process, compute norms and rotary positions in few kernels."""
    with optional("norms_not_fused"):
        use_fused_norms(model, device)
    with optional("rotary_not_fused"):
        from gemq.kernels.training.rotary import rotary, usable  # triton comes with torch for CUDA, not for CPUs

        use_fused_rotary(model, rotary, usable)


# Norms


def _rounded_before_weight(norm: Any, hidden: Tensor) -> Tensor:
    return norm.weight * F.rms_norm(hidden, hidden.shape[-1:], None, _eps(norm))


def _rounded_once(norm: Any, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, hidden.shape[-1:], norm.weight, _eps(norm))


_NORMS: tuple[Norm, ...] = (_rounded_before_weight, _rounded_once)


def _eps(norm: Any) -> float | None:
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return found if isinstance(found, float) else None


@torch.no_grad()
def use_fused_norms(model: nn.Module, device: torch.device) -> int:
    """Makes a model's norms compute as ``torch.nn.functional.rms_norm`` does. Returns how many do.

    Of norms of one class and size one is tried on ``device``, on random numbers; weights are not looked at.
    """
    known: dict[tuple[type, int, float | None], Norm | None] = {}
    count = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not is_norm(module) or not isinstance(weight, Tensor) or weight.dim() != 1:
            continue
        kind = (type(module), len(weight), _eps(module))
        if kind not in known:
            known[kind] = next((own for own in _NORMS if _same_norm(own, module, device)), None)
        if (own := known[kind]) is not None:
            module.forward = MethodType(own, module)
            count += 1
    return count


def _same_norm(own: Norm, norm: Any, device: torch.device) -> bool:
    """Whether a norm computes what ``own`` does."""
    if list(norm.state_dict()) != ["weight"] or _eps(norm) is None:
        return False
    generator = torch.Generator().manual_seed(0)
    size = len(norm.weight)
    hidden, weight = (torch.randn(n, size, generator=generator).to(device, torch.bfloat16) for n in (64, 1))
    try:
        expected = functional_call(norm, {"weight": weight[0]}, (hidden,)).float()
    except Exception:  # noqa: BLE001 - model code: it wants more than hidden states, or something else
        return False
    found = own(SimpleNamespace(weight=weight[0], eps=_eps(norm)), hidden).float()
    return float((found - expected).norm() / expected.norm()) < LARGEST_DIFFERENCE


# Rotary positions


def use_fused_rotary(model: nn.Module, turn: Turn, usable: Callable[[Tensor, Tensor, Tensor], bool]) -> int:
    """Puts ``turn`` in place of what a family's module calls ``apply_rotary_pos_emb``. Returns in how many modules.

    usable: whether it takes a call's tensors, if they are on a GPU; what it does not take goes the family's own way
    """
    count = 0
    for name in sorted({type(module).__module__ for module in model.modules()}):
        code = sys.modules[name]
        own = getattr(code, ROTARY, None)
        if own is None or hasattr(own, "gemq_fused") or not _same_rotary(own):
            continue
        setattr(code, ROTARY, _either(own, turn, usable))
        count += 1
    return count


def _either(own: Any, turn: Turn, usable: Callable[[Tensor, Tensor, Tensor], bool]) -> Any:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **more: Any) -> Any:
        plain = not rest and not more and q.is_cuda and not torch.compiler.is_compiling()
        if plain and usable(q, cos, sin) and usable(k, cos, sin):
            return turn(q, cos, sin), turn(k, cos, sin)
        return own(q, k, cos, sin, *rest, **more)

    apply_rotary_pos_emb.gemq_fused = True  # type: ignore[attr-defined]
    return apply_rotary_pos_emb


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What is tried for: x [B, N, S, D] turned by cos and sin [B, S, D], the second half of D with the first."""
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)


def _same_rotary(own: Any) -> bool:
    """Whether a family's function is that of ``plain_rotary``, for queries and keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(2, *n, 5, 16, generator=generator).bfloat16() for n in ((3,), (1,), (), ()))
    try:
        found = own(q, k, cos, sin)
        return all(torch.equal(x, plain_rotary(y, cos, sin)) for x, y in zip(found, (q, k), strict=True))
    except Exception:  # noqa: BLE001 - model code: it takes something else
        return False
