"""Which closed form an experts module applies between its two products, found by trying it.

Families write their gate as they like (``_apply_gate``, ``act_fn``, clamps, interleaved halves), so names say
little. The module's own function is evaluated once on probe values and compared with every form that the
kernels have; its own float attributes are the limits and slopes that are tried. None of them: the kernels
then leave the activation to the module. Knows nothing of kernels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NONE, SILU, GELU, GELU_TANH, RELU, RELU_SQUARED = range(6)
"""Numbers that the kernels know."""

_FORMULAS: dict[int, Callable[[Tensor, float], Tensor]] = {
    NONE: lambda x, alpha: x,
    SILU: lambda x, alpha: x * torch.sigmoid(alpha * x),
    GELU: lambda x, alpha: F.gelu(x),
    GELU_TANH: lambda x, alpha: F.gelu(x, approximate="tanh"),
    RELU: lambda x, alpha: F.relu(x),
    RELU_SQUARED: lambda x, alpha: F.relu(x).square(),
}
NO_CLAMP, CLAMP_BEFORE, CLAMP_AFTER = range(3)


class Activation(NamedTuple):
    """``act(gate) * (up + shift)`` with clamps, or ``act(y)`` where there is no gate.

    clamp: gate at most ``limit`` before or after ``function``, up within -limit ... limit
    alpha: of SILU, x * sigmoid(alpha * x)
    """

    function: int
    gated: bool
    interleaved: bool = False  # gate and up rows alternate; else gate is the first half
    clamp: int = NO_CLAMP
    limit: float = math.inf
    alpha: float = 1.0
    shift: float = 0.0

    def __call__(self, y: Tensor) -> Tensor:
        """[..., rows] -> [..., rows / 2] if gated."""
        if not self.gated:
            return _FORMULAS[self.function](y, self.alpha)
        gate, up = (y[..., ::2], y[..., 1::2]) if self.interleaved else y.chunk(2, -1)
        if self.clamp == CLAMP_BEFORE:
            gate = gate.clamp(max=self.limit)
        gate = _FORMULAS[self.function](gate, self.alpha)
        if self.clamp == CLAMP_AFTER:
            gate = gate.clamp(max=self.limit)
        if self.clamp:
            up = up.clamp(-self.limit, self.limit)
        return gate * (up + self.shift)


RAW = Activation(NONE, gated=False)
"""Products as they are."""


def activation_of(module: Any) -> Activation | None:
    """The form of an experts module's activation; None when it is none that the kernels have."""
    if "_gemq_activation" not in module.__dict__:
        module.__dict__["_gemq_activation"] = _recognise(module)
    return module.__dict__["_gemq_activation"]


def _recognise(module: Any) -> Activation | None:
    function = module._apply_gate if module.has_gate else module.act_fn
    if isinstance(act := getattr(module, "act_fn", None), torch.nn.Module) and any(True for _ in act.parameters()):
        return None  # learned, so not fixed by its values today
    numbers = {name: v for name, v in vars(module).items() if isinstance(v, float) or _says_number(name, v)}
    # Values on both sides of any clamp, paired at random; float32, in which families compute.
    generator = torch.Generator().manual_seed(0)
    probe = torch.cat([torch.rand(512, generator=generator) * 60 - 30, torch.randn(512, generator=generator)])
    probe = probe[torch.randperm(1024, generator=generator)].reshape(8, 128)
    device = next(itertools.chain(module.parameters(), module.buffers())).device
    with torch.no_grad():
        wanted = function(probe.to(device)).cpu()
    forms = _forms(module.has_gate, sorted({float(v) for v in numbers.values()}))
    return next((form for form in forms if _same(form(probe), wanted)), None)


def _says_number(name: str, value: Any) -> bool:
    return isinstance(value, int) and any(word in name for word in ("limit", "alpha", "clamp"))


def _same(mine: Tensor, wanted: Tensor) -> bool:
    return mine.shape == wanted.shape and torch.allclose(mine, wanted, rtol=1e-5, atol=1e-5)


def _forms(gated: bool, numbers: list[float]) -> Iterator[Activation]:
    functions = [(f, 1.0) for f in _FORMULAS] + [(SILU, alpha) for alpha in (1.702, *numbers)]
    if not gated:
        yield from (Activation(f, gated=False, alpha=alpha) for f, alpha in functions)
        return
    clamps = [(NO_CLAMP, math.inf), *itertools.product((CLAMP_BEFORE, CLAMP_AFTER), numbers)]
    for (clamp, limit), shift, interleaved, (f, alpha) in itertools.product(
        clamps, (0.0, 1.0), (False, True), functions
    ):
        yield Activation(f, True, interleaved, clamp, limit, alpha, shift)
