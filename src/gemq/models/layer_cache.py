"""Keeps decoder layers on the device: the current one, the next one, and as many others as memory has room for.

A layer is loaded when it is needed. A pass over the layers prefetches the next layer while the current one computes. A
changed layer is dropped with ``restore``, since the files always hold the full-precision model. Everything outside the
layers (embeddings, norms, head) is on the device all the time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gemq.models.equalization import Equalization
from gemq.models.layer_loader import LayerLoader, LayerSlot
from gemq.models.reader import LayerReader
from gemq.models.structure import Structure
from gemq.runtime.memory import MemoryBudget


def reserved_layer_bytes(sizes: Iterable[int]) -> int:
    """Returns the bytes that are reserved for the current and the next layer, from the bytes of each layer."""
    return sum(sorted(sizes)[-2:])


class LayerCache:
    """The decoder layers of one model.

    Memory for two layers is reserved for good: the current layer and the next one. Other layers are cached while memory
    has room for them, and are evicted when other parts of the job need it.

    Attributes:
        reader: reads the layers from the model's files
        memory: the job's memory budget
        equalization: scales the layers that are loaded
        outside_bytes: bytes of everything outside the layers
    """

    def __init__(self, model: Any, structure: Structure, reader: LayerReader, memory: MemoryBudget, dtype: torch.dtype):
        """
        Args:
            model: the model without its layers' contents, as ``Source.open`` returns it
            structure: of the model
            reader: reads its layers
            memory: must have at least ``least_bytes`` available
            dtype: of parameters on the device
        """
        self.reader, self.memory = reader, memory
        self.equalization = Equalization([f"{layer.path}." for layer in structure.layers], reader.types)
        self._slots: list[LayerSlot] = []
        for layer, names in zip(structure.layers, reader.names_by_layer, strict=True):
            types = {name: reader.loaded_types[name] for name in names}
            self._slots.append(LayerSlot(model, f"{layer.path}.", types, dtype))
        self._loader = LayerLoader(self._slots, reader, memory, self.equalization)
        self.outside_bytes = sum(t.numel() * t.element_size() for t in _unique_tensors(model) if not t.is_meta)
        self._current: int | None = None
        self._cached: set[int] = set()  # layers on the device in addition to the current one
        self._shares_weights = False  # each layer holds the weights of the first layer of its kind
        reserved = memory.try_reserve(self.least_bytes)
        assert reserved, "limits are checked before"
        memory.caches.append(self)

    @property
    def _reserved_bytes(self) -> int:
        """Bytes of the current and the next layer, at most."""
        return reserved_layer_bytes(slot.nbytes for slot in self._slots)

    @property
    def least_bytes(self) -> int:
        """Bytes that are on the device all the time: two layers, and everything outside the layers."""
        return self.outside_bytes + self._reserved_bytes

    def all_layers_fit(self, extra_bytes: int = 0) -> bool:
        """Returns whether the device has room for all layers and ``extra_bytes``."""
        return extra_bytes <= self.free_bytes_with_all_layers()

    def free_bytes_with_all_layers(self) -> int:
        """Returns the bytes that stay free with all layers on the device; negative if they do not fit."""
        additional_bytes = sum(slot.nbytes for slot in self._slots[:-1])  # the last layer is then the current one
        return self.memory.on_device.available + self.evictable_bytes() - additional_bytes

    def load(self, index: int) -> None:
        """Makes layer ``index`` the current one."""
        if index == self._current or self._shares_weights:
            return
        self._retire_current()
        self._current = index
        if index in self._cached:
            self._remove_from_cache(index)  # the current layer's memory is reserved for good
        else:
            self._slots[index].fill(self._loader.load(index))

    def walk(self, order: Sequence[int], prefetch: bool = True) -> Iterator[int]:
        """Yields the indices of ``order``, each while its layer is the current one.

        Args:
            order: indices of layers
            prefetch: whether the next layer is loaded meanwhile
        """
        for index, next_index in zip(order, [*order[1:], None], strict=True):
            self.load(index)
            if prefetch and next_index is not None and next_index != index and next_index not in self._cached:
                self._loader.prefetch(next_index)
            yield index

    def restore(self, index: int) -> None:
        """Drops a changed layer, so that it is read again when it is needed."""
        if index in self._cached:
            self._evict(index)
        elif index == self._current:
            self._current = None
            self._slots[index].clear()

    @contextmanager
    def all_layers(self) -> Iterator[None]:
        """Keeps every layer on the device. Call only if ``all_layers_fit``."""
        for _ in self.walk(range(len(self._slots))):
            pass
        assert len(self._cached) == len(self._slots) - 1
        yield

    def first_of_kind(self) -> list[int]:
        """Returns for each layer the index of the first layer with tensors of the same names, shapes and types."""
        index_by_kind: dict[Any, int] = {}
        return [index_by_kind.setdefault(slot.kind(), index) for index, slot in enumerate(self._slots)]

    @contextmanager
    def with_one_layer_per_kind(self) -> Iterator[None]:
        """Fills every layer with the weights of the first layer of its kind, so that the model runs and few are read.

        Layers are of one kind if they have tensors of the same names, shapes and types. May be nested.
        """
        if self._shares_weights:
            yield
            return
        tensors_by_kind: dict[int, dict[str, Tensor]] = {}  # by name inside the layer
        self._drop_all()
        for index, kind in enumerate(self.first_of_kind()):
            slot = self._slots[index]
            if kind == index:
                tensors = self._loader.load_now(index)
                tensors_by_kind[kind] = {name.removeprefix(slot.prefix): t for name, t in tensors.items()}
            slot.fill({slot.prefix + name: tensor for name, tensor in tensors_by_kind[kind].items()})
        self._shares_weights = True
        try:
            yield
        finally:
            self._shares_weights = False
            self._drop_all()

    def release_layers(self) -> None:
        """Drops every layer for good, and frees the memory reserved for two of them."""
        self._drop_all()
        self.memory.on_device.free(self._reserved_bytes)

    @contextmanager
    def released(self) -> Iterator[None]:
        """Drops every layer and lends their memory to another model. Reserves it again on exit."""
        self.release_layers()
        try:
            yield
        finally:
            reserved = self.memory.try_reserve(self._reserved_bytes)
            assert reserved, "the other model was freed"

    def covers(self, index: int, names: Collection[str]) -> bool:
        """Returns whether ``names`` include all of a layer's tensors, so that it runs without being read."""
        return self._slots[index].covered_by(names)

    def stored_layer(self, index: int, excluded: Collection[str]) -> dict[str, Tensor]:
        """Reads a layer's tensors except ``excluded`` to the CPU, in the types that the files store, equalized."""
        if not self.equalization.is_known(index):
            self._loader.load_now(index)
        return self.equalization.folded(index, self.reader.read(index, excluded))

    def read_layer(self, index: int, excluded: Collection[str]) -> dict[str, Tensor]:
        """Reads a layer's tensors except ``excluded`` to the device. The caller owns them."""
        return self._loader.load_without(index, excluded)

    def close(self) -> None:
        """Ends the thread that loads layers."""
        self._loader.close()

    def evictable_bytes(self) -> int:
        """Returns the bytes of cached layers, all of which can be evicted."""
        return sum(self._slots[index].nbytes for index in self._cached)

    def evict(self, count: int) -> None:
        """Evicts cached layers until ``count`` bytes are freed, the last layers first: passes begin at the front."""
        for index in sorted(self._cached, reverse=True):
            if count <= 0:
                return
            self._evict(index)
            count -= self._slots[index].nbytes

    def _retire_current(self) -> None:
        """Caches the current layer if memory has room for it, else drops it."""
        index, self._current = self._current, None
        if index is None:
            return
        if self.memory.on_device.reserve(self._slots[index].nbytes):
            self._cached.add(index)
        else:
            self._slots[index].clear()

    def _evict(self, index: int) -> None:
        """Drops a cached layer."""
        self._remove_from_cache(index)
        self._slots[index].clear()

    def _remove_from_cache(self, index: int) -> None:
        """Removes a layer from the cached ones, and frees the memory reserved for it there."""
        self._cached.discard(index)
        self.memory.on_device.free(self._slots[index].nbytes)

    def _drop_all(self) -> None:
        """Drops every layer, whether it was loaded or shares another layer's weights."""
        for index, slot in enumerate(self._slots):
            self.restore(index)
            slot.clear()


def _unique_tensors(model: nn.Module) -> list[Tensor]:
    """Returns every parameter and buffer once, tied ones included."""
    return list({id(t): t for t in (*model.parameters(), *model.buffers())}.values())
