"""Captures the calls that a model makes to its decoder layers, by replacing the layers' forwards for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemq.models.module_forwards import replaced_forwards

MAX_SHARED_TENSORS = 8
"""Tensors of one shape and type that later ones are compared with. Each comparison waits for the device."""


@dataclass(frozen=True)
class Call:
    """The arguments that a model passes to one decoder layer, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class ExtraOutput:
    """Placeholder for an extra output of a layer while calls are captured. ``index``: in the tuple it returns."""

    index: int


class HiddenStatesChanged(Exception):
    """The model changed hidden states between two layers. Holds the index of the second one."""


@contextmanager
def replaced_layers(
    layers: Sequence[nn.Module], function: Callable[[Tensor, Call], Tensor], tuple_size: int
) -> Iterator[None]:
    """Replaces the forward of every layer. The layers stay in the model, with the attributes that it reads.

    Args:
        layers: the decoder layers
        function: maps a layer's input and its other arguments to the layer's output
        tuple_size: number of values in the tuple that a layer returns: the output and placeholders for extra outputs.
            0: a layer returns a tensor

    Raises:
        HiddenStatesChanged: the model passes something else than a tensor in place of hidden states
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, call = args[0], Call(args[1:], kwargs)
        else:
            hidden = kwargs["hidden_states"]
            call = Call((), {name: value for name, value in kwargs.items() if name != "hidden_states"})
        if not isinstance(hidden, Tensor):
            raise HiddenStatesChanged(0)
        output = function(hidden, call)
        if not tuple_size:
            return output
        return (output, *(ExtraOutput(index) for index in range(1, tuple_size)))

    with replaced_forwards(dict.fromkeys(layers, forward)):
        yield


class SharedTensors:
    """Replaces tensors by equal earlier ones: masks and positions are equal in nearly all micro-batches."""

    def __init__(self) -> None:
        self._tensors_by_kind: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def share(self, value: Any, replaced: dict[int, tuple[Tensor, Tensor]]) -> Any:
        """Returns ``value`` with its tensors replaced, those inside tuples, lists and dictionaries included.

        Args:
            value: an argument of a layer
            replaced: tensors of the same forward pass by ``id``, each with its replacement. Most layers receive the
                same tensors, so few of them need to be compared
        """
        if isinstance(value, Tensor):
            if id(value) not in replaced:
                replaced[id(value)] = value, self._earlier(value)
            return replaced[id(value)][1]
        if isinstance(value, tuple | list):
            items = [self.share(item, replaced) for item in value]
            is_named = hasattr(value, "_fields")  # a NamedTuple takes its items as arguments
            return type(value)(*items) if is_named else type(value)(items)
        if isinstance(value, dict):
            return {key: self.share(item, replaced) for key, item in value.items()}
        return value

    def _earlier(self, tensor: Tensor) -> Tensor:
        """Returns an equal earlier tensor; ``tensor`` itself if there is none."""
        candidates = self._tensors_by_kind.setdefault((tensor.shape, tensor.dtype), [])
        for candidate in candidates:
            if candidate is tensor or torch.equal(candidate, tensor):
                return candidate
        if len(candidates) < MAX_SHARED_TENSORS:
            candidates.append(tensor)
        return tensor
