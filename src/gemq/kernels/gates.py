"""Which activation an experts module uses, found by asking it; and the same functions inside kernels.

``act(min(gate, limit)) * (clamp(up, -limit, limit) + shift)`` covers what Transformers' families compute between
their projections. The module's own function is evaluated on a few numbers on the CPU and compared with the
candidates: a family that overrides it, or a later release that changes it, is never taken for something else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from gemq.kernels.packed import PackedExperts

NONE, SILU, GELU, GELU_TANH, RELU_SQUARED = range(5)
"""Kinds. NONE is no activation: the module's own function is applied to what the kernel wrote."""

_KNOWN_ALPHAS = (1.0, 1.702)
_SILU, _GELU, _GELU_TANH = tl.constexpr(SILU), tl.constexpr(GELU), tl.constexpr(GELU_TANH)


class Gate(NamedTuple):
    """Activation between an expert's projections, as kernels take it."""

    kind: int
    gated: bool = True  # False: act(up) alone, no gate
    interleaved: bool = False  # rows gate0 up0 gate1 up1 ... instead of all gates first
    alpha: float = 1.0  # SILU: x * sigmoid(alpha * x)
    limit: float = math.inf
    shift: float = 0.0


UNKNOWN = Gate(NONE)


def apply(gate: Gate, y: Tensor) -> Tensor:
    """The activation in plain PyTorch: [..., 2 I], or [..., I] where not gated -> [..., I]."""
    if not gate.gated:
        return _act(gate, y)
    g, u = (y[..., ::2], y[..., 1::2]) if gate.interleaved else y.chunk(2, dim=-1)
    return _act(gate, g.clamp(max=gate.limit)) * (u.clamp(-gate.limit, gate.limit) + gate.shift)


def _act(gate: Gate, x: Tensor) -> Tensor:
    if gate.kind == SILU:
        return x * torch.sigmoid(gate.alpha * x)
    if gate.kind == RELU_SQUARED:
        return F.relu(x).square()
    return F.gelu(x, approximate="none" if gate.kind == GELU else "tanh")


def _candidates(module: PackedExperts) -> Iterator[Gate]:
    kinds = (SILU, GELU, GELU_TANH, RELU_SQUARED)
    if not module.has_gate:
        yield from (Gate(kind, gated=False) for kind in kinds)
        yield from (Gate(SILU, gated=False, alpha=alpha) for alpha in _KNOWN_ALPHAS[1:])
        return
    # Families name these attributes with and without a prefix.
    found = {
        name: value
        for name in ("limit", "alpha")
        for attribute in (name, f"swiglu_{name}")
        if isinstance(value := getattr(module, attribute, None), int | float)
    }
    limits = [math.inf] + ([float(found["limit"])] if "limit" in found else [])
    alphas = [*_KNOWN_ALPHAS] + ([float(found["alpha"])] if "alpha" in found else [])
    for limit in limits:
        for interleaved in (False, True):
            for shift in (0.0, 1.0):
                for kind in kinds:
                    for alpha in alphas if kind == SILU else (1.0,):
                        yield Gate(kind, True, interleaved, alpha, limit, shift)


def gate_of(module: PackedExperts) -> Gate:
    """The activation of an experts module, or UNKNOWN. Remembered on the module after the first call."""
    gate = module.__dict__.get("_kernel_gate")
    if gate is None:
        gate = module.__dict__["_kernel_gate"] = _find(module)
    return gate


def _find(module: PackedExperts) -> Gate:
    # Small values tell activations apart, large ones the clamps; gate and up must not follow one another.
    small = torch.linspace(-4, 4, 64)
    probe = torch.cat([small, small * 1000]).unsqueeze(-1) * torch.tensor([1.0, -0.7, 0.4, 1.3])
    try:
        with torch.no_grad():
            expected = module._apply_gate(probe) if module.has_gate else module.act_fn(probe)
    except Exception:  # noqa: BLE001 - anything may be in there; the unfused path is always right
        return UNKNOWN
    for gate in _candidates(module):
        y = apply(gate, probe)
        if y.shape == expected.shape and torch.allclose(y, expected, rtol=1e-5, atol=2e-5):
            return gate
    return UNKNOWN


@triton.jit
def act(x, alpha, KIND: tl.constexpr):
    """An activation by its kind, in float32."""
    if KIND == _SILU:
        return x / (1.0 + tl.exp(-alpha * x))
    elif KIND == _GELU:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == _GELU_TANH:  # 1 + tanh(z) = 2 sigmoid(2 z)
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        positive = tl.maximum(x, 0.0)
        return positive * positive


@triton.jit
def gated(gate, up, alpha, limit, shift, KIND: tl.constexpr):
    """``Gate`` with a gate, in float32."""
    return act(tl.minimum(gate, limit), alpha, KIND) * (tl.clamp(up, -limit, limit) + shift)
