"""Computing with packed weights. This is the one place that chooses a kernel.

``reference`` is plain PyTorch, runs everywhere and is the truth for tests. On CUDA, ``decode`` takes up to
``DECODE_TOKENS`` tokens and ``grouped`` more; on a CPU in bfloat16, ``cpu`` takes a few tokens. ``packed`` holds the
modules. None knows Transformers or how checkpoints come about. ``GEMQ_KERNELS=reference`` forces the reference,
``GEMQ_KERNELS=triton`` the kernels (on a CPU they need ``TRITON_INTERPRET=1``); both are read when this is imported.

What the kernels do not cover runs on the reference, is counted in ``fallbacks`` by reason and said once.
"""

from __future__ import annotations

import importlib
import os
import warnings
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gemq.errors import UserError
from gemq.kernels import cpu_int4, fallbacks, reference

if TYPE_CHECKING:
    from gemq.kernels.modules import PackedExperts, PackedLinear

DECODE_TOKENS = 16
"""Most tokens that ``decode`` takes (it has no more columns); above, ``grouped`` does."""

mode = os.environ.get("GEMQ_KERNELS", "")
if mode not in ("", "reference", "triton"):
    raise UserError(f"GEMQ_KERNELS={mode}: it can be reference or triton, or unset")

_MODULES = {"decode": "gemq.kernels.decode.operators", "grouped": "gemq.kernels.grouped.operators"}

_loaded: dict[str, ModuleType | None] = {}

_failed: dict[Any, str] = {}
"""Why a kernel failed, by what it was compiled for. It is not tried again: a failed compilation takes seconds."""


def experts_forward(module: PackedExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Routed experts: [T, H] hidden states, [T, K] expert indices and routing weights -> [T, H].

    Differentiable in hidden states, routing weights and the module's parameters.
    """
    if not mode and cpu_int4.covers(module, hidden):
        return cpu_int4.experts_forward(module, hidden, top_k_index, top_k_weights)
    kernel = _choose(hidden, hidden.shape[0])
    if kernel is reference:
        return reference.experts_forward(module, hidden, top_k_index, top_k_weights)
    forward = partial(_guarded, kernel, "experts_forward")
    if torch.is_grad_enabled() and _wants_grad(module, hidden, top_k_weights):
        from gemq.kernels.training.autograd import experts_with_grad

        return experts_with_grad(forward, module, hidden, top_k_index, top_k_weights)
    return forward(module, hidden, top_k_index, top_k_weights)


def linear_forward(module: PackedLinear, x: Tensor) -> Tensor:
    """[..., columns] -> [..., rows]. Differentiable in x and the bias."""
    if not mode and cpu_int4.covers(module, x):
        return cpu_int4.linear_forward(module, x)
    kernel = _choose(x, x.numel() // x.shape[-1])
    if kernel is reference:
        return reference.linear_forward(module, x)
    forward = partial(_guarded, kernel, "linear_forward")
    if torch.is_grad_enabled() and _wants_grad(module, x):
        from gemq.kernels.training.autograd import linear_with_grad

        return linear_with_grad(forward, module, x)
    return forward(module, x)


def prepare(model: nn.Module) -> None:
    """Recognises activations and loads the kernels, so that no forward pass has to, nor torch.compile see it."""
    from gemq.kernels.activation import activation_of
    from gemq.kernels.modules import PackedExperts

    for module in model.modules():
        if isinstance(module, PackedExperts):
            activation_of(module)
    if mode == "triton" or any(p.device.type == "cuda" for p in model.parameters()):
        _load("decode")
        _load("grouped")


def _choose(x: Tensor, tokens: int) -> Any:
    """The module that computes ``tokens`` rows of x's device and dtype."""
    if mode == "reference" or not (x.device.type == "cuda" or mode == "triton") or tokens == 0:
        return reference
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return _fall_back(f"no kernel computes in {x.dtype}")
    name = "decode" if tokens <= DECODE_TOKENS else "grouped"
    kernel = _loaded[name] if name in _loaded else _load(name)
    return kernel if kernel is not None else _fall_back(f"there are no {name} kernels here (is triton installed?)")


def _load(name: str) -> ModuleType | None:
    """``decode`` or ``grouped``, None when triton is missing. Imported only now: a CPU needs none of it."""
    if name not in _loaded:
        try:
            _loaded[name] = importlib.import_module(_MODULES[name])
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "triton" and error.name != _MODULES["grouped"]:
                raise
            _loaded[name] = None
    return _loaded[name]


def _guarded(kernel: ModuleType, operation: str, module: Any, x: Tensor, *arguments: Tensor) -> Tensor:
    """``kernel.operation(module, x, *arguments)``, or the reference where the kernel cannot be compiled or launched.

    Raises what the kernel raises when it was asked for by GEMQ_KERNELS, and inside ``torch.compile``, where the caller
    runs the layer uncompiled. Errors of the device are always raised: after them nothing else would run either.
    """
    forward = getattr(kernel, operation)
    if mode or torch.compiler.is_compiling():
        return forward(module, x, *arguments)
    key = (kernel.__name__, operation, x.dtype, *module.kernel_sizes())
    if key not in _failed:
        try:
            return forward(module, x, *arguments)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # noqa: BLE001 - Triton raises many types, and other versions of it others
            _failed[key] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
    fallback = _fall_back(f"a kernel for {x.dtype} cannot be used here ({_failed[key]})")
    return getattr(fallback, operation)(module, x, *arguments)


def _fall_back(reason: str) -> Any:
    fallbacks[reason] += 1
    if fallbacks[reason] == 1:
        warnings.warn(f"{reason}; the slow reference computes instead", stacklevel=4)
    return reference


def _wants_grad(module: nn.Module, *inputs: Tensor) -> bool:
    return any(x.requires_grad for x in inputs) or any(p.requires_grad for p in module.parameters())
