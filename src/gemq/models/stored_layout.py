"""Where a layer's stored tensors lie inside the model's: learned from one layer, so that others are read into place.

Transformers stacks experts and joins their matrices in memory of its own, layer by layer. What it did to one layer is
found by looking for each stored tensor in what was made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FIRST = 64
"""Numbers by which a stored tensor is looked for; then all are compared."""


class Part(NamedTuple):
    """A part of a layer.

    stored: which of the layer's stored tensors it is
    target: which of the layer's tensors inside the model it belongs to
    start:  where it begins there, in numbers
    """

    stored: int
    target: int
    start: int


def learned(stored: Sequence[Tensor], targets: Sequence[int], made: Sequence[Tensor]) -> list[Part] | None:
    """Where ``stored`` tensors lie in those that were ``made`` of them; ``targets``: in which of these each one is.

    None if that was more than laying them one behind the other, or if two of them are not to be told apart.
    """
    parts: list[Part] = []
    for target, whole in enumerate(made):
        own = [number for number, of in enumerate(targets) if of == target]
        sources = [stored[number].reshape(-1) for number in own]
        sizes = {len(source) for source in sources}
        if len(sizes) != 1 or sum(map(len, sources)) != whole.numel() or not whole.is_contiguous():
            return None
        if any(source.dtype != whole.dtype for source in sources):
            return None
        places = whole.reshape(len(sources), -1)
        first = torch.stack([source[:FIRST] for source in sources])
        alike = (places[:, None, :FIRST] == first[None]).all(-1)  # [places, sources]
        if not bool((alike.sum(0) == 1).all() and (alike.sum(1) == 1).all()):
            return None
        where = alike.int().argmax(0).tolist()
        if not all(torch.equal(places[at], source) for at, source in zip(where, sources, strict=True)):
            return None
        size = sizes.pop()
        parts += [Part(number, target, at * size) for number, at in zip(own, where, strict=True)]
    return parts
