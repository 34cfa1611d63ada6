"""A list of activations, one tensor per micro-batch, offloaded to host memory or to files when memory is short.

Reads like a list of tensors on the device: offloaded tensors are copied back when they are read. Each entry keeps its
reservation when its tensor is replaced, so a pass that replaces every tensor moves no reservation. Must not import
models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gemq.runtime.compat import torch_private
from gemq.runtime.memory import MemoryBudget, MemoryTier


class HiddenStates(Tensor):
    """Hidden states [B, S, H] with the extra outputs of the layer that computed them.

    Only a few families have extra outputs, such as the positions that sparse attention chose. They belong to the
    hidden states, so both are stored and loaded together. Operations on this type return plain tensors, as those on
    ``nn.Parameter`` do.

    Attributes:
        extras: the extra outputs by their index in the tuple that the layer returned. They carry no gradient.
    """

    extras: dict[int, Any]
    __torch_function__ = torch_private.disabled_torch_function  # type: ignore[assignment]

    @classmethod
    def with_extras(cls, hidden: Tensor, extras: dict[int, Any]) -> HiddenStates:
        """Returns an alias of ``hidden`` that holds ``extras``."""
        states = hidden.as_subclass(cls)
        states.extras = extras
        return states


class ActivationStore(Sequence[Tensor]):
    """Tensors of any shapes, one per micro-batch. Offloaded tensors lose their autograd history."""

    def __init__(self, memory: MemoryBudget, tensors: Iterable[Tensor] = ()):
        """Stores ``tensors`` within the limits of ``memory``."""
        self.memory = memory
        self._entries: list[_Entry] = []
        for tensor in tensors:
            self.append(tensor)

    def append(self, tensor: Tensor) -> None:
        """Adds the tensor of the next micro-batch."""
        self._entries.append(_Entry(self.memory, tensor))

    def copy(self) -> ActivationStore:
        """Returns a second store with the same contents."""
        return ActivationStore(self.memory, self)

    def clear(self) -> None:
        """Removes all tensors and frees their memory."""
        while self._entries:
            self._entries.pop().free()

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        """Returns the tensor of micro-batch ``index`` on the device. Slices are not supported."""
        return self._entries[index].load()

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        self._entries[index].replace(tensor)

    def __iter__(self) -> Iterator[Tensor]:
        for entry in self._entries:
            yield entry.load()

    def __del__(self) -> None:
        self.clear()


class _Entry:
    """The tensor of one micro-batch, with its extra outputs if it has any."""

    def __init__(self, memory: MemoryBudget, tensor: Tensor):
        self._memory = memory
        self._tensor = _StoredTensor(memory, tensor)
        self._extras: dict[int, Any] = {}
        self._store_extras(tensor)

    def load(self) -> Tensor:
        """Returns the tensor on the device, as ``HiddenStates`` if it has extra outputs."""
        tensor = self._tensor.load()
        if not self._extras:
            return tensor
        extras = {}
        for index, value in self._extras.items():
            extras[index] = value.load() if isinstance(value, _StoredTensor) else value
        return HiddenStates.with_extras(tensor, extras)

    def replace(self, tensor: Tensor) -> None:
        """Stores another tensor in place of this one."""
        self._tensor.replace(tensor)
        self._store_extras(tensor)

    def _store_extras(self, tensor: Tensor) -> None:
        """Stores the extra outputs that ``tensor`` has, under the same memory limits."""
        if not isinstance(tensor, HiddenStates):
            return
        for index, value in tensor.extras.items():
            stored = self._extras.get(index)
            if not isinstance(value, Tensor):
                self._extras[index] = value
            elif isinstance(stored, _StoredTensor):
                stored.replace(value)
            else:
                self._extras[index] = _StoredTensor(self._memory, value)

    def free(self) -> None:
        """Frees the memory of the tensor and of its extra outputs."""
        self._tensor.free()
        for value in self._extras.values():
            if isinstance(value, _StoredTensor):
                value.free()


class _StoredTensor:
    """One tensor, stored wherever memory has room for it."""

    def __init__(self, memory: MemoryBudget, tensor: Tensor):
        self._memory = memory
        self._file: Path | None = None
        self._store(tensor)

    def _store(self, tensor: Tensor) -> None:
        """Reserves memory for ``tensor`` and stores it there."""
        self._bytes = tensor.numel() * tensor.element_size()
        self.location = self._memory.reserve(self._bytes)
        if self.location is not MemoryTier.DEVICE:
            self._tensor = self._allocate(tensor)
        self._write(tensor)

    def _allocate(self, like: Tensor) -> Tensor:
        """Returns an empty tensor in pinned host memory or in a new file."""
        if self.location is MemoryTier.HOST:
            return self._memory.empty_pinned(like.shape, like.dtype)
        tensor, self._file = self._memory.empty_mapped(like.shape, like.dtype)
        return tensor

    def _write(self, tensor: Tensor) -> None:
        """Writes ``tensor`` to the memory that is reserved for it."""
        if self.location is not MemoryTier.DEVICE:
            self._tensor.copy_(tensor.detach(), non_blocking=self.location is MemoryTier.HOST)
        elif isinstance(tensor, HiddenStates):
            self._tensor = tensor.detach()  # a plain tensor: the entry stores the extra outputs
        else:
            self._tensor = tensor

    def load(self) -> Tensor:
        """Returns the tensor on the device."""
        if self.location is MemoryTier.DEVICE:
            return self._tensor
        # pinned copies are queued after the kernels that were launched earlier: one stream keeps the order
        tensor = self._tensor.to(self._memory.device, non_blocking=self.location is MemoryTier.HOST)
        if tensor is self._tensor:
            tensor = tensor.clone()  # an operation in place must not change the stored tensor
        return tensor

    def replace(self, tensor: Tensor) -> None:
        """Stores another tensor, in the same memory if shape and type are equal."""
        if tensor.shape == self._tensor.shape and tensor.dtype == self._tensor.dtype:
            self._write(tensor)
            return
        self.free()
        self._store(tensor)

    def free(self) -> None:
        """Drops the tensor and frees its memory."""
        self._memory.free(self.location, self._bytes)
        del self._tensor
        if self._file is not None:
            self._file.unlink(missing_ok=True)
            self._file = None
