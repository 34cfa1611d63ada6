"""Learns from one layer where its stored tensors lie inside the model's, so that other layers are read into place.

Transformers stacks experts and concatenates their matrices in new memory, layer by layer. What it did to one layer is
found by searching each stored tensor in the converted ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemq.runtime.upload import Span

PREFIX_LENGTH = 64
"""Leading numbers of a stored tensor by which it is searched. A match is then compared in full."""


@dataclass
class LayerNames:
    """Names of a layer's tensors.

    Attributes:
        prefix: path of the layer inside the model, with a dot at its end
        targets: names inside the model by stored name, including those that the model does not have
        available: names inside the model of the tensors that the files hold
    """

    prefix: str
    targets: dict[str, str] = field(default_factory=dict)
    available: frozenset[str] = frozenset()

    def in_order(self) -> tuple[list[str], list[str]]:
        """Returns stored names and names inside the model, each in an order that layers of a kind share."""
        return sorted(self.targets, key=self._without_number), sorted(self.available)

    def kind(self, spans: Mapping[str, Span]) -> Any:
        """Returns a key that is equal for layers with the same names and stored shapes."""
        stored_names, names = self.in_order()
        stored = []
        for name in stored_names:
            target = self._without_number(self.targets[name])
            stored.append((self._without_number(name), spans[name].shape, target))
        return tuple(stored), tuple(map(self._without_number, names))

    def _without_number(self, name: str) -> str:
        """Removes the layer's number from a name."""
        number = self.prefix.split(".")[-2]
        return name.replace(f".{number}.", ".*.", 1)


class SourceSpan(NamedTuple):
    """The position of a stored tensor inside a converted one.

    Attributes:
        stored: index of the stored tensor
        target: index of the converted tensor
        start: offset there, in numbers
    """

    stored: int
    target: int
    start: int


def find_layout(
    stored: Sequence[Tensor], targets: Sequence[int], converted: Sequence[Tensor]
) -> list[SourceSpan] | None:
    """Finds where stored tensors lie in converted ones.

    Args:
        stored: a layer's tensors as the files hold them
        targets: index of the converted tensor that each of them belongs to
        converted: the layer's tensors inside the model

    Returns:
        The layout. None if a conversion was more than a concatenation of equally large tensors, or if two stored
        tensors begin with the same numbers.
    """
    layout: list[SourceSpan] = []
    for target, tensor in enumerate(converted):
        indices = [index for index, target_of in enumerate(targets) if target_of == target]
        sources = [stored[index].reshape(-1) for index in indices]
        slots = _find_slots(sources, tensor)
        if slots is None:
            return None
        for index, source, slot in zip(indices, sources, slots, strict=True):
            layout.append(SourceSpan(index, target, slot * len(source)))
    return layout


def _find_slots(sources: Sequence[Tensor], tensor: Tensor) -> list[int] | None:
    """Returns the slot of each flat source in a tensor that concatenates them; None if it does not."""
    sizes = {len(source) for source in sources}
    if len(sizes) != 1 or sum(map(len, sources)) != tensor.numel() or not tensor.is_contiguous():
        return None
    if any(source.dtype != tensor.dtype for source in sources):
        return None
    contents = tensor.reshape(len(sources), -1)
    prefixes = torch.stack([source[:PREFIX_LENGTH] for source in sources])
    matches = (contents[:, None, :PREFIX_LENGTH] == prefixes[None]).all(-1)  # [slots, sources]
    is_one_to_one = bool((matches.sum(0) == 1).all() and (matches.sum(1) == 1).all())
    if not is_one_to_one:
        return None
    slots = matches.int().argmax(0).tolist()
    for slot, source in zip(slots, sources, strict=True):
        if not torch.equal(contents[slot], source):
            return None
    return slots
