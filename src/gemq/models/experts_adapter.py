"""Gives experts modules without Transformers' experts interface the attributes of that interface.

A few families hold the same fused 3-D weights and compute the same thing, but are not decorated. What they compute is
not taken for granted: ``models.experts.check_arithmetic`` compares it with the module's own forward before it is used.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from torch import Tensor, nn


def adopt_experts(model: nn.Module) -> None:
    """Sets ``is_transposed``, ``has_gate`` and the like on every experts module of ``model`` that has none.

    Such a module owns ``gate_up_proj`` and ``down_proj`` and is called as ``experts(hidden, index, weights)``, or as
    ``experts(rows)`` with every token's row for every expert, one expert after the other (``batched_rows``). With
    ``passes_on``, indices past the last expert stand for experts that return their input, not for unused slots.
    """
    for module in model.modules():
        if not hasattr(module, "is_transposed") and not hasattr(module, "has_gate"):
            _adopt(module)


def _adopt(module: Any) -> None:
    own = dict(module.named_parameters(recurse=False))
    first, down = own.get("gate_up_proj"), own.get("down_proj")
    arguments = len(inspect.signature(module.forward).parameters)
    if len(own) != 2 or first is None or down is None or first.dim() != 3 or down.dim() != 3 or arguments not in (1, 3):
        return
    count, a, b = down.shape
    if first.shape[1:] == (2 * b, a):
        transposed = False
    elif first.shape[1:] == (b, 2 * a):
        transposed = True
    else:
        return
    if not callable(getattr(module, "act_fn", None)):
        return
    if first.shape[0] > count:  # rows for experts that only return their input, which no forward reads
        module.gate_up_proj = nn.Parameter(first.detach()[:count], requires_grad=first.requires_grad)
        module.passes_on = True
    elif first.shape[0] < count:
        return
    module.is_transposed, module.has_gate, module.has_bias, module.is_concatenated = transposed, True, False, True
    module.batched_rows = arguments == 1
    if not hasattr(module, "_apply_gate"):
        module._apply_gate = partial(_gate, module.act_fn)


def as_adopted(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor as it is stored in the shape of the adopted model's parameter: without rows that no forward reads."""
    return tensor if tensor.shape == parameter.shape else tensor[: len(parameter)]


def _gate(activation: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up
