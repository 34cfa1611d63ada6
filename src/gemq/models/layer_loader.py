"""Reads decoder layers to the device in a background thread.

On a GPU a layer is read straight to the device where its layout is known, otherwise through pinned host memory. Both
run on a stream of their own, while the current layer computes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemq.models.equalization import Equalization
from gemq.models.experts_adapter import as_adopted
from gemq.models.reader import LayerReader
from gemq.runtime.compat import torch_private
from gemq.runtime.fallbacks import optional
from gemq.runtime.memory import MemoryBudget


class LayerSlot:
    """The place of one decoder layer's tensors inside the model.

    Attributes:
        prefix: path of the layer inside the model, with a dot at its end
        placeholders: meta tensors by name inside the model, with the shapes and types that the device holds
        nbytes: size of the layer on the device
    """

    def __init__(self, model: nn.Module, prefix: str, types: dict[str, torch.dtype], dtype: torch.dtype):
        """Replaces the layer's parameters by placeholders.

        Args:
            model: holds the layer on the meta device
            prefix: path of the layer inside the model, with a dot at its end
            types: the layer's tensors that the files store, by name inside the model, with the types that Transformers
                loads them in
            dtype: of floating-point parameters on the device; buffers keep the types that Transformers loads them in
        """
        self.prefix = prefix
        self.placeholders: dict[str, Tensor] = {}
        self._owners: dict[str, dict[str, Any]] = {}
        for name, loaded_type in types.items():
            owner, key = _owner_of(model, name)
            tensor = owner[key]
            if isinstance(tensor, nn.Parameter):
                kind = dtype if tensor.is_floating_point() else tensor.dtype
                empty = torch.empty(tensor.shape, dtype=kind, device="meta")
                owner[key] = self.placeholders[name] = nn.Parameter(empty, requires_grad=False)
            else:
                self.placeholders[name] = tensor.to(loaded_type)
            self._owners[name] = owner
        self.nbytes = sum(t.numel() * t.element_size() for t in self.placeholders.values())

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Puts tensors into the model, by their names there."""
        for name, tensor in tensors.items():
            if isinstance(self.placeholders[name], nn.Parameter) and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            self._owners[name][name.rpartition(".")[2]] = tensor

    def clear(self) -> None:
        """Removes the layer's contents from the model."""
        self.fill(self.placeholders)

    def covered_by(self, names: Collection[str]) -> bool:
        """Returns whether ``names`` include every tensor of the layer."""
        return self.placeholders.keys() <= set(names)

    def kind(self) -> tuple[tuple[str, tuple[int, ...], str], ...]:
        """Names, shapes and types of the layer's tensors: equal for layers that can exchange weights."""
        rows = []
        for name, tensor in self.placeholders.items():
            rows.append((name.removeprefix(self.prefix), tuple(tensor.shape), str(tensor.dtype)))
        return tuple(sorted(rows))


def _owner_of(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Returns the dictionary of parameters or buffers that holds a tensor, and the tensor's key there."""
    path, _, key = name.rpartition(".")
    return torch_private.tensor_dict(model.get_submodule(path), key), key


@dataclass
class _LoadedLayer:
    """A layer's tensors on the device. ``copied``: a CUDA event that ends their copies; None if there is none."""

    tensors: dict[str, Tensor]
    copied: Any = None


class LayerLoader:
    """Loads the layers of one model to the device, at most one ahead of its use."""

    def __init__(
        self,
        slots: Sequence[LayerSlot],
        reader: LayerReader,
        memory: MemoryBudget,
        equalization: Equalization,
    ):
        """
        Args:
            slots: where each layer's tensors live inside the model
            reader: reads the layers from the model's files
            memory: names the device, and limits what is read straight to a GPU
            equalization: scales every layer that is loaded
        """
        self._reader, self._memory, self._equalization = reader, memory, equalization
        self._slots = slots
        self._pending: tuple[int, Future[_LoadedLayer]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gemq-layers")
        self._stream = torch.cuda.Stream(memory.device) if memory.device.type == "cuda" else None

    def prefetch(self, index: int) -> Future[_LoadedLayer]:
        """Starts to load a layer, and cancels the load of any other one."""
        if self._pending is not None:
            pending_index, future = self._pending
            if pending_index == index:
                return future
            future.cancel()
        future = self._thread.submit(self._load, index)
        self._pending = index, future
        return future

    def load(self, index: int) -> dict[str, Tensor]:
        """Returns a layer's tensors by name, ready for kernels on the current stream."""
        loaded = self.prefetch(index).result()
        self._pending = None
        if loaded.copied is not None:
            stream = torch.cuda.current_stream(self._memory.device)
            stream.wait_event(loaded.copied)
            for tensor in loaded.tensors.values():
                tensor.record_stream(stream)
        return loaded.tensors

    def load_now(self, index: int) -> dict[str, Tensor]:
        """Loads a layer in the calling thread, without touching the layer that is being prefetched."""
        loaded = self._load(index)
        if loaded.copied is not None:
            loaded.copied.synchronize()
        return loaded.tensors

    def load_without(self, index: int, excluded: Collection[str]) -> dict[str, Tensor]:
        """Reads a layer's tensors except ``excluded`` to the device."""
        if not self._equalization.is_known(index):
            self.load_now(index)
        return self._prepare(index, self._reader.read(index, excluded))

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _load(self, index: int) -> _LoadedLayer:
        """Reads a layer to the device, on the loader's stream if there is one."""
        if self._stream is None:
            return _LoadedLayer(self._prepare(index, self._reader.read(index)))
        with torch.cuda.stream(self._stream):
            tensors = self._prepare(index, self._read_for_gpu(index))
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return _LoadedLayer(tensors, copied)

    def _read_for_gpu(self, index: int) -> dict[str, Tensor]:
        """Reads a layer straight to the GPU where that is possible, else to the host."""
        reader, on_device = self._reader, self._memory.on_device
        # the first layer of a kind is converted on the GPU, which takes memory for its stored parts as well
        extra_bytes = 0 if reader.knows_layout(index) else 2 * self._slots[index].nbytes
        direct = reader.has_uniform_type and on_device.reserve(extra_bytes)
        try:
            if direct:
                with optional("layers_read_through_host"):
                    return reader.read_to_device(self._memory.device, index)
            tensors = reader.read(index)
            if reader.has_uniform_type and not direct:
                with optional("layers_read_through_host"):
                    reader.learn_layout(index, tensors)
            return tensors
        finally:
            if direct:
                on_device.free(extra_bytes)

    def _prepare(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Moves tensors to the device and scales them. Empties ``tensors``, to free them one by one."""
        prepared = {name: self._to_device(index, name, tensors.pop(name)) for name in list(tensors)}
        self._equalization.equalize_(index, prepared)
        return prepared

    def _to_device(self, index: int, name: str, tensor: Tensor) -> Tensor:
        """Copies a tensor to the device, in its type there. Always a copy: ``tensor`` may be a mapped file."""
        placeholder = self._slots[index].placeholders[name]
        tensor, kind = as_adopted(tensor, placeholder), placeholder.dtype
        if tensor.is_cuda:
            return tensor.to(kind)
        if self._memory.device.type != "cuda":
            return tensor.to(self._memory.device, kind, copy=True)
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
        return pinned.to(self._memory.device, non_blocking=True).to(kind)
