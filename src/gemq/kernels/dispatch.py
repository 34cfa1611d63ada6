"""Selects the implementation that computes with packed weights.

``reference`` is plain PyTorch. It runs on every device, and every kernel is tested against it. On CUDA, the kernels of
``decode`` serve up to ``MAX_DECODE_TOKENS`` tokens and those of ``grouped`` serve more. Experts with trellis codes have
kernels of their own in ``trellis``. On a CPU, ``cpu_int4`` serves a few tokens in bfloat16.

``GEMQ_KERNELS=reference`` forces the reference. ``GEMQ_KERNELS=triton`` forces the kernels; on a CPU they also need
``TRITON_INTERPRET=1``. Both variables are read on import.

Inputs that no kernel supports run on the reference. ``fallbacks`` counts them by reason, and each reason is reported
once as a warning.
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
from gemq.kernels.trellis.experts import TrellisMatrices
from gemq.runtime.fallbacks import first_line

if TYPE_CHECKING:
    from gemq.kernels.modules import PackedExperts, PackedLinear

MAX_DECODE_TOKENS = 16
"""Largest number of tokens for the ``decode`` kernels, which have 16 columns at most."""

MAX_OVERLAPPED_TOKENS = MAX_DECODE_TOKENS
"""Largest number of tokens for which codes of down projections arrive from host memory while gate and up are computed.
Only the ``decode`` kernels wait for them."""

mode = os.environ.get("GEMQ_KERNELS", "")
if mode not in ("", "reference", "triton"):
    raise UserError(f"GEMQ_KERNELS={mode} is not supported: set it to reference or triton, or unset it")

_MODULES = {
    "decode": "gemq.kernels.decode.operators",
    "grouped": "gemq.kernels.grouped.operators",
    "trellis decode": "gemq.kernels.trellis.operators",
    "trellis grouped": "gemq.kernels.trellis.grouped",
}

_loaded: dict[str, ModuleType | None] = {}

_failed: dict[Any, str] = {}
"""Error messages of kernels that failed, by compilation key. They are not retried: each attempt takes seconds."""


def experts_forward(module: PackedExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run a layer's routed experts.

    Differentiable in the hidden states, the routing weights and the module's parameters.

    Args:
        module: packed experts of one layer
        hidden: [T, H] hidden states
        top_k_index: [T, K] expert indices
        top_k_weights: [T, K] routing weights

    Returns:
        [T, H] weighted sum of the experts' outputs, in hidden's dtype.
    """
    is_trellis = isinstance(module.down_proj, TrellisMatrices)
    if not mode and not is_trellis and cpu_int4.covers(module, hidden):
        return cpu_int4.experts_forward(module, hidden, top_k_index, top_k_weights)
    kernel = _choose(hidden, hidden.shape[0], is_trellis)
    if kernel is reference:
        return reference.experts_forward(module, hidden, top_k_index, top_k_weights)
    forward = partial(_run_or_fall_back, kernel, "experts_forward")
    if torch.is_grad_enabled() and _needs_grad(module, hidden, top_k_weights):
        if hasattr(module, "fetch_table"):
            raise UserError("a model with experts in host memory cannot be trained: load it without gpu_memory")
        from gemq.kernels.training.autograd import experts_with_grad

        return experts_with_grad(forward, module, hidden, top_k_index, top_k_weights)
    return forward(module, hidden, top_k_index, top_k_weights)


def expert_shares(module: PackedExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor | None:
    """Return the terms of the sum that ``experts_forward`` returns, float32 [T, S, H], for up to 16 tokens.

    Returns None where the sum is not one of equal terms, for more tokens, and for experts in host memory. No gradients,
    no fallbacks.
    """
    if hasattr(module, "fetch_table"):
        return None
    kernel = _choose(hidden, hidden.shape[0], isinstance(module.down_proj, TrellisMatrices))
    if kernel is reference or hidden.shape[0] > MAX_DECODE_TOKENS:
        return None
    shares: Tensor | None = kernel.expert_shares(module, hidden, top_k_index, top_k_weights)
    return shares


def linear_forward(module: PackedLinear, x: Tensor) -> Tensor:
    """Run a packed linear: [..., columns] -> [..., rows]. Differentiable in x and the bias."""
    if not mode and cpu_int4.covers(module, x):
        return cpu_int4.linear_forward(module, x)
    kernel = _choose(x, x.numel() // x.shape[-1])
    if kernel is reference:
        return reference.linear_forward(module, x)
    forward = partial(_run_or_fall_back, kernel, "linear_forward")
    if torch.is_grad_enabled() and _needs_grad(module, x):
        from gemq.kernels.training.autograd import linear_with_grad

        return linear_with_grad(forward, module, x)
    return forward(module, x)


def _choose(x: Tensor, tokens: int, is_trellis: bool = False) -> Any:
    """Return the module that serves ``tokens`` rows on x's device and in its dtype."""
    on_kernels = x.device.type == "cuda" or mode == "triton"
    if mode == "reference" or not on_kernels or tokens == 0:
        return reference
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return _fall_back(f"no kernel computes in {x.dtype}")
    name = "decode" if tokens <= MAX_DECODE_TOKENS else "grouped"
    name = f"trellis {name}" if is_trellis else name
    kernel = _loaded[name] if name in _loaded else _load(name)
    if kernel is None:
        return _fall_back(f"the {name} kernels are not available (is triton installed?)")
    return kernel


def _load(name: str) -> ModuleType | None:
    """Import the kernels ``name`` of _MODULES on first use. Returns None if triton is not installed."""
    if name not in _loaded:
        try:
            _loaded[name] = importlib.import_module(_MODULES[name])
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "triton":
                raise
            _loaded[name] = None
    return _loaded[name]


def _run(kernel: ModuleType, operation: str, module: Any, x: Tensor, *routing: Tensor) -> Tensor:
    """Run ``kernel.operation``. Codes in host memory are fetched first."""
    if hasattr(module, "fetch_table"):
        from gemq.kernels.fetch import fetch_codes

        index, weights = routing
        overlap = x.shape[0] <= MAX_OVERLAPPED_TOKENS
        routing = fetch_codes(index, module.fetch_table, module.down_proj.codes, overlap), weights
    result: Tensor = getattr(kernel, operation)(module, x, *routing)
    return result


def _run_or_fall_back(kernel: ModuleType, operation: str, module: Any, x: Tensor, *routing: Tensor) -> Tensor:
    """Run ``kernel.operation``, or the reference if the kernel, or the one that fetches, fails to compile or launch.

    Errors of the device are always raised, since nothing else would run after them. All errors are raised if
    ``GEMQ_KERNELS`` is set, and inside ``torch.compile``, where the caller runs the layer uncompiled instead.

    Args:
        kernel: module with the kernels' entry points
        operation: ``experts_forward`` or ``linear_forward``
        module: packed experts or linear
        x: its input
        routing: expert indices and weights, for experts
    """
    if mode or torch.compiler.is_compiling():
        return _run(kernel, operation, module, x, *routing)
    key = (kernel.__name__, operation, x.dtype, *module.kernel_sizes())
    if key not in _failed:
        try:
            return _run(kernel, operation, module, x, *routing)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # noqa: BLE001 - the exception types of Triton differ between its versions
            _failed[key] = first_line(error)
    fallback = _fall_back(f"a kernel for {x.dtype} failed ({_failed[key]})")
    return getattr(fallback, operation)(module, x, *routing)


def _fall_back(reason: str) -> Any:
    """Count ``reason``, warn if it is new, and return the reference."""
    fallbacks[reason] += 1
    if fallbacks[reason] == 1:
        warnings.warn(f"{reason}; using the slow reference instead", stacklevel=4)
    return reference


def _needs_grad(module: nn.Module, *inputs: Tensor) -> bool:
    """Whether any input or parameter of the module requires a gradient."""
    return any(x.requires_grad for x in inputs) or any(p.requires_grad for p in module.parameters())
