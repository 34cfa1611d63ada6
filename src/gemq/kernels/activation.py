"""Recognition of the activation that an experts module applies between its two products.

Families implement their gate in many ways (``_apply_gate``, ``act_fn``, clamps, interleaved halves), so attribute names
are no reliable guide. Instead, the module's own function is evaluated once on probe values and compared with every form
that the kernels support. The module's float attributes serve as candidate limits and slopes. If no form matches, the
kernels leave the activation to the module.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gemq.runtime.compat import transformers_private

NONE, SILU, GELU, GELU_TANH, RELU, RELU_SQUARED = range(6)
"""Codes of the functions in the kernels' arguments."""

_FORMULAS: dict[int, Callable[[Tensor, float], Tensor]] = {
    NONE: lambda x, alpha: x,
    SILU: lambda x, alpha: x * torch.sigmoid(alpha * x),
    GELU: lambda x, alpha: F.gelu(x),
    GELU_TANH: lambda x, alpha: F.gelu(x, approximate="tanh"),
    RELU: lambda x, alpha: F.relu(x),
    RELU_SQUARED: lambda x, alpha: F.relu(x).square(),
}
NO_CLAMP, CLAMP_BEFORE, CLAMP_AFTER = range(3)

_QUICK_GELU_SLOPE = 1.702
"""Slope of the sigmoid that approximates GELU. Families write it as a literal, not as an attribute."""


class Activation(NamedTuple):
    """``function(gate) * (up + shift)`` with clamps, or ``function(y)`` without a gate.

    Attributes:
        function: code of the function
        gated: whether the rows hold a gate and an up projection
        interleaved: gate and up rows alternate; otherwise the gate is the first half
        clamp: whether the gate is limited to at most ``limit`` before or after ``function``; with either, up is
            clamped to -limit ... limit
        limit: bound of the clamps
        alpha: slope of SILU, x * sigmoid(alpha * x)
        shift: added to up
    """

    function: int
    gated: bool
    interleaved: bool = False
    clamp: int = NO_CLAMP
    limit: float = math.inf
    alpha: float = 1.0
    shift: float = 0.0

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> Activation:
        """Restore an activation from ``numbers()``."""
        function, gated, interleaved, clamp, limit, alpha, shift = numbers
        return cls(int(function), bool(gated), bool(interleaved), int(clamp), limit, alpha, shift)

    def numbers(self) -> list[float]:
        """Return the fields as numbers, since operators do not support tuples of mixed types."""
        return [float(field) for field in self]

    def __call__(self, y: Tensor) -> Tensor:
        """Apply the activation: [..., rows] -> [..., rows / 2] if gated, else [..., rows]."""
        formula = _FORMULAS[self.function]
        if not self.gated:
            return formula(y, self.alpha)
        gate, up = (y[..., ::2], y[..., 1::2]) if self.interleaved else y.chunk(2, -1)
        if self.clamp == CLAMP_BEFORE:
            gate = gate.clamp(max=self.limit)
        gate = formula(gate, self.alpha)
        if self.clamp == CLAMP_AFTER:
            gate = gate.clamp(max=self.limit)
        if self.clamp:
            up = up.clamp(-self.limit, self.limit)
        return gate * (up + self.shift)


RAW = Activation(NONE, gated=False)
"""No activation: products as they are."""


def activation_of(module: Any) -> Activation | None:
    """Return the activation of an experts module, or None if the kernels do not support it."""
    if "_gemq_activation" not in module.__dict__:
        module.__dict__["_gemq_activation"] = _recognize(module)
    return module.__dict__["_gemq_activation"]


def _recognize(module: Any) -> Activation | None:
    """Compare the module's own function with every supported form on probe values."""
    act_fn = getattr(module, "act_fn", None)
    if isinstance(act_fn, torch.nn.Module) and any(True for _ in act_fn.parameters()):
        return None  # learned: its values may change
    device = next(itertools.chain(module.parameters(), module.buffers())).device
    probe = _probe_values()
    function = transformers_private.expert_activation(module)
    with torch.no_grad():
        expected = function(probe.to(device)).cpu()
    for form in _candidate_forms(module.has_gate, _numeric_attributes(module)):
        if _is_same(form(probe), expected):
            return form
    return None


def _probe_values() -> Tensor:
    """Return values [8, 128] on both sides of any clamp, paired at random. float32, in which families compute."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.rand(512, generator=generator) * 60 - 30
    narrow = torch.randn(512, generator=generator)
    order = torch.randperm(1024, generator=generator)
    return torch.cat([wide, narrow])[order].reshape(8, 128)


def _numeric_attributes(module: Any) -> list[float]:
    """Return the module's attributes that may be limits or slopes: all floats, and integers with a telling name."""
    numbers = set()
    for name, value in vars(module).items():
        is_named_constant = any(word in name for word in ("limit", "alpha", "clamp"))
        if isinstance(value, float) or (isinstance(value, int) and is_named_constant):
            numbers.add(float(value))
    return sorted(numbers)


def _is_same(result: Tensor, expected: Tensor) -> bool:
    """Whether two results agree up to float32 rounding."""
    return result.shape == expected.shape and torch.allclose(result, expected, rtol=1e-5, atol=1e-5)


def _candidate_forms(gated: bool, numbers: list[float]) -> Iterator[Activation]:
    """Yield all supported activations with ``numbers`` as candidate limits and slopes."""
    functions = [(function, 1.0) for function in _FORMULAS]
    functions += [(SILU, alpha) for alpha in (_QUICK_GELU_SLOPE, *numbers)]
    if not gated:
        for function, alpha in functions:
            yield Activation(function, gated=False, alpha=alpha)
        return
    clamps = [(NO_CLAMP, math.inf), *itertools.product((CLAMP_BEFORE, CLAMP_AFTER), numbers)]
    for (clamp, limit), shift, interleaved, (function, alpha) in itertools.product(
        clamps, (0.0, 1.0), (False, True), functions
    ):
        yield Activation(function, True, interleaved, clamp, limit, alpha, shift)
