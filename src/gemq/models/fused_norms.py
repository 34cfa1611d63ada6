"""Fused kernels for the norms and rotary positions of a model on a GPU.

Families compute a norm in about eight kernels and rotary positions in ten. The kernels are small, and a layer has up to
four norms, so they are two fifths of the launches of a layer in both directions. One or two kernels replace them where
these compute the same, which is tested for each kind. Only modules of the given model change. Others of the same family
keep the family's code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gemq.models.structure import is_norm
from gemq.runtime.fallbacks import optional

if TYPE_CHECKING:
    from gemq.kernels.decode.norms import NormWeight

MAX_DIFFERENCE = 1e-3
"""Relative difference of bfloat16 results up to which norms are equal. A roundoff is 4e-3, and norms that round at
another step differ by 2e-3."""

ROTARY = "apply_rotary_pos_emb"
"""Name of the function in the families' code that rotates queries and keys."""

NormForward = Callable[[Any, Tensor], Tensor]
RotaryFunction = Callable[..., Any]


def use_fused_kernels(model: nn.Module, device: torch.device) -> None:
    """Makes a model on a GPU compute norms and rotary positions with fused kernels, where these compute the same."""
    with optional("norms_not_fused"):
        use_fused_norms(model, device)
    with optional("rotary_not_fused"):
        use_fused_rotary(model)


# Norms


def _rms_norm_rounded_twice(norm: Any, hidden: Tensor) -> Tensor:
    """RMS norm whose result is rounded before the multiplication with the weight."""
    return norm.weight * F.rms_norm(hidden, hidden.shape[-1:], None, _eps(norm))


def _rms_norm_rounded_once(norm: Any, hidden: Tensor) -> Tensor:
    """RMS norm that is multiplied with the weight before it is rounded."""
    return F.rms_norm(hidden, hidden.shape[-1:], norm.weight, _eps(norm))


def _eps(norm: Any) -> float | None:
    """Returns what a norm adds to the variance, or None if it is not known."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return eps if isinstance(eps, float) else None


@torch.no_grad()
def use_fused_norms(model: nn.Module, device: torch.device) -> int:
    """Makes norms compute with ``torch.nn.functional.rms_norm``, where it computes the same.

    Args:
        model: may be on the meta device
        device: on which one norm of each class and size is tested, with random numbers

    Returns:
        The number of norms that were changed.
    """
    forwards: dict[Any, NormForward | None] = {}
    count = 0
    for module in model.modules():
        forward = _norm_forward(module, device, forwards) if is_norm(module) else None
        if forward is not None:
            module.forward = MethodType(forward, module)
            count += 1
    return count


class NormKind(NamedTuple):
    """What an RMS norm computes.

    Attributes:
        rounds_twice: whether the normalized row is rounded before it is multiplied with the weight
    """

    rounds_twice: bool

    def of(self, norm: Any) -> NormWeight:
        """Returns a norm of this kind as a kernel takes it."""
        from gemq.kernels.decode.norms import NormWeight  # triton is not installed with torch for CPUs

        eps = _eps(norm)
        assert eps is not None
        return NormWeight(norm.weight, eps, self.rounds_twice)


@torch.no_grad()
def norm_kind(norm: nn.Module, device: torch.device, forwards: dict[Any, NormForward | None]) -> NormKind | None:
    """Returns what a norm computes, or None for a norm of another kind.

    Args:
        norm: the module
        device: on which one norm of each class and size is tested
        forwards: results of earlier tests, which this call extends
    """
    forward = _norm_forward(norm, device, forwards)
    return None if forward is None else NormKind(forward is _rms_norm_rounded_twice)


def _norm_forward(norm: Any, device: torch.device, forwards: dict[Any, NormForward | None]) -> NormForward | None:
    """Returns the fused forward of a norm, or None if there is none. Tests one norm of each class and size."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    key = (type(norm), len(weight), _eps(norm))
    if key not in forwards:
        forwards[key] = _equal_norm_forward(norm, device)
    return forwards[key]


def _equal_norm_forward(norm: Any, device: torch.device) -> NormForward | None:
    """Returns the fused forward that computes the same as a norm, or None if there is none."""
    if list(norm.state_dict()) != ["weight"] or _eps(norm) is None:
        return None
    size = len(norm.weight)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, size, generator=generator).to(device, torch.bfloat16)
    weight = torch.randn(size, generator=generator).to(device, torch.bfloat16)
    try:
        expected = functional_call(norm, {"weight": weight}, (hidden,)).float()
    except Exception:  # noqa: BLE001 - model code, which may require other arguments
        return None
    for forward in (_rms_norm_rounded_twice, _rms_norm_rounded_once):
        result = forward(SimpleNamespace(weight=weight, eps=_eps(norm)), hidden).float()
        if float((result - expected).norm() / expected.norm()) < MAX_DIFFERENCE:
            return forward
    return None


# Rotary positions


def use_fused_rotary(model: nn.Module) -> int:
    """Makes attention modules compute rotary positions with one kernel, where it computes the same.

    The family's code calls its rotary function by a global name. Each changed module replaces this global only while
    its ``forward`` runs.

    Returns:
        The number of modules that were changed.
    """
    functions: dict[RotaryFunction, RotaryFunction | None] = {}
    count = 0
    for module in model.modules():
        original = rotary_function(module)
        fused = None if original is None else fused_rotary(original, functions)
        if fused is not None:
            module.forward = MethodType(_forward_with_rotary(type(module), fused), module)
            count += 1
    return count


def fused_rotary(
    original: RotaryFunction, functions: dict[RotaryFunction, RotaryFunction | None]
) -> RotaryFunction | None:
    """Returns a function that calls the kernel in place of a family's rotary function, or None if that differs.

    Args:
        original: the family's function
        functions: results of earlier calls, which this one extends
    """
    from gemq.kernels.training.rotary import rotary, usable  # triton is not installed with torch for CPUs

    if original not in functions:
        is_equal = _is_plain_rotary(original)
        functions[original] = _fuse_rotary(original, rotary, usable) if is_equal else None
    return functions[original]


def _fuse_rotary(
    original: RotaryFunction,
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor],
    usable: Callable[[Tensor, Tensor, Tensor], bool],
) -> RotaryFunction:
    """Returns a function that calls the kernel, or ``original`` for arguments that the kernel does not support.

    Args:
        original: the family's function
        rotary: the kernel, for queries or keys, cosines and sines
        usable: whether the kernel supports these
    """

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        has_options = bool(args or kwargs)
        if not has_options and q.is_cuda and usable(q, cos, sin) and usable(k, cos, sin):
            return rotary(q, cos, sin), rotary(k, cos, sin)
        return original(q, k, cos, sin, *args, **kwargs)

    return apply_rotary_pos_emb


def rotary_function(module: nn.Module) -> RotaryFunction | None:
    """Returns the rotary function that the ``forward`` of an attention module calls, or None if it calls none."""
    forward = inspect.unwrap(type(module).forward)
    if ROTARY not in forward.__code__.co_names:
        return None
    function: RotaryFunction | None = forward.__globals__.get(ROTARY)
    return function


@contextmanager
def replaced_rotary(module_class: type, function: RotaryFunction) -> Iterator[None]:
    """Makes modules of a class call ``function`` in place of the family's rotary function."""
    class_forward: Any = module_class.forward  # type: ignore[attr-defined]
    namespace = inspect.unwrap(class_forward).__globals__
    original = namespace[ROTARY]
    namespace[ROTARY] = function
    try:
        yield
    finally:
        namespace[ROTARY] = original


def _forward_with_rotary(module_class: type, fused: RotaryFunction) -> Callable[..., Any]:
    """Returns a ``forward`` for modules of a class that calls ``fused`` in place of the family's rotary function."""
    class_forward: Any = module_class.forward  # type: ignore[attr-defined]

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # Inductor fuses the family's function by itself
            return class_forward(module, *args, **kwargs)
        with replaced_rotary(module_class, fused):
            return class_forward(module, *args, **kwargs)

    return forward


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Reference implementation of the kernel: rotates the first half of D with the second.

    Args:
        x: queries or keys, [B, N, S, D]
        cos: cosines, [B, S, D]
        sin: sines, [B, S, D]
    """
    first_half, second_half = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-second_half, first_half), -1) * sin.unsqueeze(1)


def _is_plain_rotary(function: RotaryFunction) -> bool:
    """Whether a family's function computes ``plain_rotary`` of queries and keys."""
    generator = torch.Generator().manual_seed(0)
    batch, tokens, size = 2, 5, 16
    q = torch.randn(batch, 3, tokens, size, generator=generator).bfloat16()
    k = torch.randn(batch, 1, tokens, size, generator=generator).bfloat16()
    cos = torch.randn(batch, tokens, size, generator=generator).bfloat16()
    sin = torch.randn(batch, tokens, size, generator=generator).bfloat16()
    try:
        rotated_q, rotated_k = function(q, k, cos, sin)
        return torch.equal(rotated_q, plain_rotary(q, cos, sin)) and torch.equal(rotated_k, plain_rotary(k, cos, sin))
    except Exception:  # noqa: BLE001 - model code, which may require other arguments
        return False
