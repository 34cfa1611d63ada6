"""Conversion between tensor names in the Transformers model and the names that a family uses on the hub.

Loading in Transformers converts hub names to model names, and ``revert_conversion`` converts back. Packed
tensors are stored under model names. All others are stored under hub names, so that other programs find them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemq.runtime.compat.transformers_private import revert_conversion

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REVERT_ERRORS = (RuntimeError, ValueError, LookupError, TypeError, AttributeError)
"""What ``revert_conversion`` raises if a conversion needs packed tensors. Its operations differ by family."""


def hub_state(model: PreTrainedModel, tensors: Mapping[str, Tensor], packed: Collection[str] = ()) -> dict[str, Tensor]:
    """Renames tensors to hub names, with experts split as the family does on the hub.

    Tensors whose conversion cannot be reverted keep their names in the model, which Transformers loads as well. So do
    tensors that the family fuses with a packed one.

    Args:
        model: provides the conversion; may be on the meta device
        tensors: by name in the model; those of one layer must be in the same call
        packed: names in the model of tensors that are stored in packed form

    Returns:
        The tensors by name in the files.
    """
    try:
        converted = revert_conversion(model, tensors)
    except _REVERT_ERRORS:
        return dict(tensors)
    # If a packed tensor is missing, a conversion may drop or repeat others.
    if _num_elements(converted) != _num_elements(tensors):
        return dict(tensors)
    if len(converted) == len(tensors) or not packed:
        return converted
    fused = _fused_with_packed(model, tensors, converted, packed)
    if not fused:
        return converted
    separate = {name: tensor for name, tensor in tensors.items() if name not in fused}
    return {**hub_state(model, separate), **fused}


def _num_elements(tensors: Mapping[str, Tensor]) -> int:
    """Returns the number of elements of all tensors."""
    return sum(tensor.numel() for tensor in tensors.values())


def _fused_with_packed(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], converted: Mapping[str, Tensor], packed: Collection[str]
) -> dict[str, Tensor]:
    """Returns those of ``tensors`` that the conversion fuses with packed ones.

    Such a tensor has another shape in ``converted`` than in a conversion that includes the packed tensors.
    """
    matrices = {name: p for name, p in model.named_parameters() if name in packed and p.dim() == 2}
    complete = {name: torch.empty(t.shape, device="meta") for name, t in {**tensors, **matrices}.items()}
    try:
        shapes = {name: tensor.shape for name, tensor in revert_conversion(model, complete).items()}
    except _REVERT_ERRORS:
        shapes = {}
    differing = {name for name, tensor in converted.items() if shapes.get(name) != tensor.shape}
    if not differing:
        return {}
    fused = {}
    for name, tensor in tensors.items():
        hub_names = revert_conversion(model, {name: tensor}).keys()
        if differing & hub_names:
            fused[name] = tensor
    return fused


def stored_names(model: PreTrainedModel, packed: Collection[str], stored: Collection[str]) -> dict[str, str]:
    """Maps the names by which gemq reads tensors to their names in the files.

    gemq stores packed tensors by name in the model. ``model.save_pretrained`` gives them hub names, which differ in
    families that rename a module on the hub, such as Mixtral.

    Args:
        model: provides the conversion; may be on the meta device
        packed: names in the model of packed tensors
        stored: names of all tensors in the files

    Returns:
        The name in the files of each tensor, by name in the model for packed tensors.
    """
    if set(packed) <= set(stored):
        return {name: name for name in stored}
    probes = {name: torch.empty(0, device="meta") for name in packed}
    name_by_probe = {id(probe): name for name, probe in probes.items()}
    model_names = {}
    for hub_name, probe in revert_conversion(model, probes).items():
        model_names[hub_name] = name_by_probe[id(probe)]
    return {model_names.get(name, name): name for name in stored}
