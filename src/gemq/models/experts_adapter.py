"""Adapts experts modules without Transformers' experts interface, by setting the attributes of that interface.

A few families hold the same fused 3-D weights and compute the same function without the interface's decorator. This is
verified before use: ``models.arithmetic_check`` compares it with the module's own forward.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from torch import Tensor, nn

from gemq.runtime.compat import transformers_private


def adopt_experts(model: nn.Module) -> None:
    """Sets ``is_transposed``, ``has_gate`` and similar attributes on experts modules of ``model`` that lack them.

    Such a module owns ``gate_up_proj`` and ``down_proj``. It is called as ``experts(hidden, index, weights)``, or as
    ``experts(rows)`` with a row of every token for every expert, sorted by expert (``batched_rows``). With
    ``passes_on``, indices past the last expert stand for experts that return their input, not for unused slots.
    """
    for module in model.modules():
        if not hasattr(module, "is_transposed") and not hasattr(module, "has_gate"):
            _adopt(module)


def _adopt(module: Any) -> None:
    """Sets the attributes on one module, if it is an experts module."""
    weights = dict(module.named_parameters(recurse=False))
    gate_up, down = weights.get("gate_up_proj"), weights.get("down_proj")
    num_arguments = len(inspect.signature(module.forward).parameters)
    if len(weights) != 2 or gate_up is None or down is None or num_arguments not in (1, 3):
        return
    is_transposed = _is_transposed(gate_up, down)
    if is_transposed is None or not callable(getattr(module, "act_fn", None)):
        return
    count = len(down)
    if len(gate_up) < count:
        return
    if len(gate_up) > count:  # rows of experts that only return their input, which no forward reads
        module.gate_up_proj = nn.Parameter(gate_up.detach()[:count], requires_grad=gate_up.requires_grad)
        module.passes_on = True
    module.is_transposed, module.has_gate, module.has_bias, module.is_concatenated = is_transposed, True, False, True
    module.batched_rows = num_arguments == 1
    transformers_private.set_default_gate(module, partial(_apply_gate, module.act_fn))


def _is_transposed(gate_up: Tensor, down: Tensor) -> bool | None:
    """Returns whether weights are stored as inputs by outputs. None if their shapes do not fit each other."""
    if gate_up.dim() != 3 or down.dim() != 3:
        return None
    _, rows, columns = down.shape
    if gate_up.shape[1:] == (2 * columns, rows):
        return False
    if gate_up.shape[1:] == (columns, 2 * rows):
        return True
    return None


def as_adopted(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Returns a stored tensor in the shape of the adopted model's parameter, without rows that no forward reads."""
    return tensor if tensor.shape == parameter.shape else tensor[: len(parameter)]


def _apply_gate(activation: Any, gate_up: Tensor) -> Tensor:
    """Computes activation(gate) * up, [P, 2 I] -> [P, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up
