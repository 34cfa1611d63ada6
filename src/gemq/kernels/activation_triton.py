"""The formulas of ``activation`` as Triton device functions, and the kernel arguments that select one."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from gemq.kernels import activation
from gemq.kernels.activation import Activation
from gemq.kernels.triton_types import Scalar, Tile

NONE = tl.constexpr(activation.NONE)
SILU = tl.constexpr(activation.SILU)
GELU = tl.constexpr(activation.GELU)
GELU_TANH = tl.constexpr(activation.GELU_TANH)
RELU = tl.constexpr(activation.RELU)
RELU_SQUARED = tl.constexpr(activation.RELU_SQUARED)
CLAMP_BEFORE = tl.constexpr(activation.CLAMP_BEFORE)
CLAMP_AFTER = tl.constexpr(activation.CLAMP_AFTER)


def kernel_arguments(form: Activation) -> tuple[tuple[float, float, float], dict[str, Any]]:
    """Return the run-time arguments (limit, alpha, shift) of a kernel, and its compile-time constants."""
    limit = form.limit if math.isfinite(form.limit) else 0.0
    constants = {
        "GATED": form.gated,
        "INTERLEAVED": form.interleaved,
        "ACTIVATION": form.function,
        "CLAMP": form.clamp,
    }
    return (limit, form.alpha, form.shift), constants


@triton.jit
def _apply_function(x: Tile, alpha: Scalar, ACTIVATION: tl.constexpr):
    """Apply a function without clamps, in float32."""
    if ACTIVATION == SILU:
        return x * tl.sigmoid(alpha * x)
    elif ACTIVATION == GELU:
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:
        # 1 + tanh(z) = 2 sigmoid(2 z)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == RELU:
        return tl.maximum(x, 0.0)
    elif ACTIVATION == RELU_SQUARED:
        positive = tl.maximum(x, 0.0)
        return positive * positive
    else:
        return x


@triton.jit
def activated(x: Tile, limit: Scalar, alpha: Scalar, ACTIVATION: tl.constexpr, CLAMP: tl.constexpr):
    """Activate a gate, or rows of a module without a gate, in float32."""
    if CLAMP == CLAMP_BEFORE:
        x = tl.minimum(x, limit)
    x = _apply_function(x, alpha, ACTIVATION)
    if CLAMP == CLAMP_AFTER:
        x = tl.minimum(x, limit)
    return x


@triton.jit
def gated(
    gate: Tile, up: Tile, limit: Scalar, alpha: Scalar, shift: Scalar, ACTIVATION: tl.constexpr, CLAMP: tl.constexpr
):
    """Multiply the activated gate with up, in float32."""
    if CLAMP != 0:
        up = tl.minimum(tl.maximum(up, -limit), limit)
    return activated(gate, limit, alpha, ACTIVATION, CLAMP) * (up + shift)
