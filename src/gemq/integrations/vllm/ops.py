"""The two operators that vLLM's compiled graphs call. They are opaque, so that the compiler does not trace the kernels.

A graph can contain tensors and strings but no modules, so packed modules are looked up by name. Names are the same in
every process and at every start, as vLLM's cache of compiled graphs requires.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

_modules: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()


def name_module(prefix: str, module: nn.Module) -> str:
    """Register ``module`` for the operators, as long as it exists, and return its name.

    The name is ``prefix``, with a number if two models of one process (speculative decoding) have the same layers.
    """
    name, number = prefix, 1
    while name in _modules:
        number += 1
        name = f"{prefix}#{number}"
    _modules[name] = module
    return name


@torch.library.custom_op("gemq::experts", mutates_args=())
def experts(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, module: str) -> Tensor:
    """Apply routed experts: [T, H] hidden states, [T, K] indices and weights -> [T, H]."""
    output: Tensor = _modules[module](hidden, top_k_index, top_k_weights)
    return output


@experts.register_fake
def _(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, module: str) -> Tensor:
    """Return a tensor of the same shape as the result of ``experts``."""
    return torch.empty_like(hidden)


@torch.library.custom_op("gemq::linear", mutates_args=())
def linear(x: Tensor, rows: int, module: str) -> Tensor:
    """Apply a packed linear without bias: [..., columns] -> [..., rows]."""
    output: Tensor = _modules[module](x)
    return output


@linear.register_fake
def _(x: Tensor, rows: int, module: str) -> Tensor:
    """Return a tensor of the same shape as the result of ``linear``."""
    return x.new_empty((*x.shape[:-1], rows))
