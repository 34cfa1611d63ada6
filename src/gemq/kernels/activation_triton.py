"""Activations inside kernels: the formulas of ``activation`` as device functions, and how kernels are told them."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from gemq.kernels import activation
from gemq.kernels.activation import Activation

NONE, SILU, GELU, GELU_TANH, RELU, RELU_SQUARED, CLAMP_BEFORE, CLAMP_AFTER = (
    tl.constexpr(number)
    for number in (
        activation.NONE,
        activation.SILU,
        activation.GELU,
        activation.GELU_TANH,
        activation.RELU,
        activation.RELU_SQUARED,
        activation.CLAMP_BEFORE,
        activation.CLAMP_AFTER,
    )
)


def kernel_arguments(form: Activation) -> tuple[tuple[float, float, float], dict[str, Any]]:
    """(limit, alpha, shift), and constants."""
    limit = form.limit if math.isfinite(form.limit) else 0.0
    constants = {
        "GATED": form.gated,
        "INTERLEAVED": form.interleaved,
        "ACTIVATION": form.function,
        "CLAMP": form.clamp,
    }
    return (limit, form.alpha, form.shift), constants


@triton.jit
def _function(x, alpha, ACTIVATION: tl.constexpr):
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
def activated(x, limit, alpha, ACTIVATION: tl.constexpr, CLAMP: tl.constexpr):
    """Of a gate, or of rows without one; float32."""
    if CLAMP == CLAMP_BEFORE:
        x = tl.minimum(x, limit)
    x = _function(x, alpha, ACTIVATION)
    if CLAMP == CLAMP_AFTER:
        x = tl.minimum(x, limit)
    return x


@triton.jit
def gated(gate, up, limit, alpha, shift, ACTIVATION: tl.constexpr, CLAMP: tl.constexpr):
    if CLAMP != 0:
        up = tl.minimum(tl.maximum(up, -limit), limit)
    return activated(gate, limit, alpha, ACTIVATION, CLAMP) * (up + shift)
