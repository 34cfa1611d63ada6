"""In-model names of tensors <-> the names that a family uses on the hub.

Transformers knows both: its loading converts one into the other, and ``revert_weight_conversion`` goes
back. Packed tensors are stored under in-model names, everything else under hub names, so that other readers
find it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What reverting raises where a family's conversion needs tensors that are packed. The operations differ by
# family, hence the breadth.
_CANNOT_REVERT = (RuntimeError, ValueError, LookupError, TypeError, AttributeError)


def hub_state(model: PreTrainedModel, tensors: Mapping[str, Tensor], packed: Collection[str] = ()) -> dict[str, Tensor]:
    """``tensors`` (in-model name -> tensor) under hub names, experts split as the family does on the hub.

    Tensors of one layer must come together. Where the conversion cannot be reverted they keep their in-model names,
    which Transformers loads as well: so do those that the family joins with a tensor that is packed.

    Args:
        model: only gives the conversion; may be on the meta device
        packed: in-model names of tensors that are stored in another form
    """
    try:
        converted = revert_weight_conversion(model, dict(tensors))
    except _CANNOT_REVERT:
        return dict(tensors)
    # A conversion that dropped or repeated something for want of a packed tensor must not pass.
    if sum(t.numel() for t in converted.values()) != sum(t.numel() for t in tensors.values()):
        return dict(tensors)
    if len(converted) == len(tensors) or not packed:
        return converted
    joined = _joined_with(model, tensors, converted, packed)
    return (
        {**hub_state(model, {n: t for n, t in tensors.items() if n not in joined}), **joined} if joined else converted
    )


def _joined_with(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], converted: Mapping[str, Tensor], packed: Collection[str]
) -> dict[str, Tensor]:
    """Those of ``tensors`` that the conversion joins with ``packed`` ones: what they give alone has another shape."""
    matrices = {name: p for name, p in model.named_parameters() if name in packed and p.dim() == 2}
    whole = {name: torch.empty(t.shape, device="meta") for name, t in {**tensors, **matrices}.items()}
    try:
        shapes = {name: tensor.shape for name, tensor in revert_weight_conversion(model, whole).items()}
    except _CANNOT_REVERT:
        shapes = {}
    wrong = {name for name, tensor in converted.items() if shapes.get(name) != tensor.shape}
    if not wrong:
        return {}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if wrong & revert_weight_conversion(model, {name: tensor}).keys()
    }


def saved_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The names (as values) that ``model.save_pretrained`` gives to packed tensors (keys: in-model names).

    They differ from the in-model ones in families that rename a module on the hub, such as Mixtral.
    """
    probes = {name: torch.empty(0, device="meta") for name in names}
    origin = {id(probe): name for name, probe in probes.items()}
    return {origin[id(tensor)]: name for name, tensor in revert_weight_conversion(model, probes).items()}
