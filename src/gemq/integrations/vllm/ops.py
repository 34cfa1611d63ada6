"""The two operations that vLLM's compiled graphs call. Each is opaque to the compiler: no tracing into kernels.

A graph can hold tensors and strings but no modules, so packed modules are looked up by name. Names are the same in
every process and at every start, as vLLM's cache of compiled graphs needs.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from gemq.kernels import dispatch

_modules: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()


def name_module(prefix: str, module: nn.Module) -> str:
    """The name under which the operations find ``module``, as long as somebody keeps it: ``prefix``, or the next
    that is free where two models of one process (speculative decoding) have the same layers."""
    name, number = prefix, 1
    while name in _modules:
        number += 1
        name = f"{prefix}#{number}"
    _modules[name] = module
    return name


@torch.library.custom_op("gemq::experts", mutates_args=())
def experts(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, module: str) -> Tensor:
    """Routed experts: [T, H] hidden states, [T, K] indices and weights -> [T, H]."""
    return dispatch.experts_forward(_modules[module], hidden, top_k_index, top_k_weights)  # type: ignore[arg-type]


@experts.register_fake
def _(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, module: str) -> Tensor:
    return torch.empty_like(hidden)


@torch.library.custom_op("gemq::linear", mutates_args=())
def linear(x: Tensor, rows: int, module: str) -> Tensor:
    """[..., columns] -> [..., rows], without bias."""
    return dispatch.linear_forward(_modules[module], x)  # type: ignore[arg-type]


@linear.register_fake
def _(x: Tensor, rows: int, module: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))
