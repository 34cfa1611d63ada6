"""In-model names of tensors <-> the names that a family uses on the hub.

Transformers knows both: its loading converts one into the other, and ``revert_weight_conversion`` goes
back. Packed tensors are stored under in-model names, everything else under hub names, so that other readers
find it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What reverting raises where a family's conversion needs tensors that are packed. The operations differ by
# family, hence the breadth.
_CANNOT_REVERT = (RuntimeError, ValueError, LookupError, TypeError, AttributeError)


def hub_state(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` (in-model name -> tensor) under hub names, experts split as the family does on the hub.

    Tensors of one layer must come together. Where the conversion cannot be reverted they keep their
    in-model names, which Transformers loads as well. ``model`` only gives the conversion and may be on the
    meta device.
    """
    try:
        converted = revert_weight_conversion(model, dict(tensors))
    except _CANNOT_REVERT:
        return dict(tensors)
    # A conversion that dropped or repeated something for want of a packed tensor must not pass.
    if sum(t.numel() for t in converted.values()) != sum(t.numel() for t in tensors.values()):
        return dict(tensors)
    return converted


def saved_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The names (as values) that ``model.save_pretrained`` gives to packed tensors (keys: in-model names).

    They differ from the in-model ones in families that rename a module on the hub, such as Mixtral.
    """
    probes = {name: torch.empty(0, device="meta") for name in names}
    origin = {id(probe): name for name, probe in probes.items()}
    return {origin[id(tensor)]: name for name, tensor in revert_weight_conversion(model, probes).items()}
