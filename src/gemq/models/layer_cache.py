"""Who holds which decoder layer: read from its files when it is needed, kept while memory has room for it.

While one layer computes, a thread reads the next one and brings it to the device through pinned memory on a stream of
its own. A layer that was changed is forgotten with ``restore``: the files always hold the full-precision model. What
lies outside the layers (embeddings, norms, head) is held all the time. Knows layers as named tensors, nothing of what
they compute.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemq.models.balance import balance
from gemq.models.experts_adapter import as_adopted
from gemq.models.reader import LayerReader
from gemq.models.structure import Structure
from gemq.runtime.fallbacks import optional
from gemq.runtime.memory import Memory


@dataclass
class _Ready:
    """A layer's tensors on the device. ``copied`` (a CUDA event) tells when they have arrived; None: they have."""

    tensors: dict[str, Tensor]
    copied: Any = None


class Residency:
    """The decoder layers of one model.

    bytes: of each layer's tensors on the device
    outside_bytes: of everything else
    """

    def __init__(self, model: Any, structure: Structure, reader: LayerReader, memory: Memory, dtype: torch.dtype):
        """model: without its layers' contents, as ``Source.open`` gives it

        dtype: of parameters on the device
        The memory must have room for ``least_bytes`` (see ``footprint``).
        """
        self.model, self.reader, self.memory, self._dtype = model, reader, memory, dtype
        self._prefixes = [f"{layer.path}." for layer in structure.layers]
        self._experts = [layer.experts for layer in structure.layers]
        self._within_reach: set[int] = set()  # layers whose experts are known to need no balance
        self._places = [{name: self._find(name) for name in names} for names in reader.given]
        self._empty = [{name: self._placeholder(name, *at) for name, at in x.items()} for x in self._places]
        self.bytes = [sum(t.numel() * t.element_size() for t in tensors.values()) for tensors in self._empty]
        self.outside_bytes = sum(t.numel() * t.element_size() for t in _distinct(model) if not t.is_meta)
        self._current: int | None = None
        self._kept: set[int] = set()  # beside the current one, where memory had room
        self._standing_in = False  # each layer holds another's tensors
        self._coming: dict[int, Future[_Ready]] = {}
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="gemq-layers")
        self._stream = torch.cuda.Stream(memory.device) if memory.device.type == "cuda" else None
        room = memory.room(self.least_bytes)
        assert room, "bounds are checked before"
        memory.caches.append(self)

    @property
    def _two(self) -> int:
        """The current layer and the next."""
        return sum(sorted(self.bytes)[-2:])

    @property
    def least_bytes(self) -> int:
        """What is held at any time: two layers, and what lies outside them."""
        return self.outside_bytes + self._two

    def fits(self, beside: int = 0) -> bool:
        """Whether all layers can be held at once with ``beside`` bytes more."""
        return beside <= self.room_beside_all()

    def room_beside_all(self) -> int:
        """Bytes that are free if all layers are held at once; negative if they do not fit."""
        kept = sum(self.bytes[:-1])  # the last one stays where the current layer is
        return self.memory.on_device.free + self.held() - kept

    def need(self, index: int) -> None:
        """Makes the model hold layer ``index``."""
        if index == self._current or self._standing_in:
            return
        self._retire()
        self._current = index
        if index in self._kept:
            self._leave(index)  # the current layer has room of its own
            return
        ready = self._fetch(index).result()
        del self._coming[index]
        if ready.copied is not None:
            now = torch.cuda.current_stream(self.memory.device)
            now.wait_event(ready.copied)
            for tensor in ready.tensors.values():
                tensor.record_stream(now)
        self._place(index, ready.tensors)

    def walk(self, order: Sequence[int], ahead: bool = True) -> Iterator[int]:
        """Gives the layers of ``order`` one after the other, each in the model while it is looked at.

        ahead: read the next one meanwhile, into the room that is set aside for it
        """
        for index, following in zip(order, [*order[1:], None], strict=True):
            self.need(index)
            if ahead and following is not None and following != index and following not in self._kept:
                self._fetch(following)
            yield index

    def restore(self, index: int) -> None:
        """Forgets what was written into a layer: the next time it is read anew."""
        if index in self._kept:
            self._leave(index)
        elif index != self._current:
            return
        if index == self._current:
            self._current = None
        self._place(index, self._empty[index])

    @contextmanager
    def all(self) -> Iterator[None]:
        """Holds every layer at once. Ask ``fits`` before."""
        for _ in self.walk(range(len(self.bytes))):
            pass
        assert len(self._kept) == len(self.bytes) - 1
        yield

    @contextmanager
    def alike(self) -> Iterator[None]:
        """Lets all layers of one kind hold the tensors of its first: the whole model runs, and few layers are read.

        A kind is what has tensors of the same names, shapes and types.
        """
        first: dict[Any, tuple[str, dict[str, Tensor]]] = {}
        self._forget()
        for index, (prefix, empty) in enumerate(zip(self._prefixes, self._empty, strict=True)):
            names = sorted((n.removeprefix(prefix), tuple(t.shape), str(t.dtype)) for n, t in empty.items())
            if tuple(names) not in first:
                ready = self._read(index)
                if ready.copied is not None:
                    ready.copied.synchronize()
                first[tuple(names)] = prefix, ready.tensors
            other, tensors = first[tuple(names)]
            self._place(index, {prefix + n.removeprefix(other): t for n, t in tensors.items()})
        self._standing_in = True
        try:
            yield
        finally:
            self._standing_in = False
            self._forget()

    def _forget(self) -> None:
        """Lets go of every layer."""
        for index in range(len(self.bytes)):
            self.restore(index)
            self._place(index, self._empty[index])

    def release_layers(self) -> None:
        """Lets go of every layer for good, and of the room that two of them always have."""
        self._forget()
        self.memory.on_device.give(self._two)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Lets go of every layer, and of the room that two of them always have, for another model to run in it."""
        self.release_layers()
        try:
            yield
        finally:
            room = self.memory.room(self._two)
            assert room, "what ran in between is gone"

    def covered(self, index: int, names: Collection[str]) -> bool:
        """Whether ``names`` hold all that the files have of a layer, so that it runs without being read."""
        return self._places[index].keys() <= set(names)

    def rest(self, index: int, without: Collection[str]) -> dict[str, Tensor]:
        """A layer's tensors but those named, on the device in their types there. They are not held."""
        return {n: self._moved(index, n, t) for n, t in self.reader.read(index, without).items()}

    def close(self) -> None:
        """Ends the thread that reads."""
        self._reading.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, index: int) -> Future[_Ready]:
        if index not in self._coming:
            for other in list(self._coming):  # a guess that came wrong
                self._coming.pop(other).cancel()
            self._coming[index] = self._reading.submit(self._read, index)
        return self._coming[index]

    def _read(self, index: int) -> _Ready:
        if self._stream is None:
            return _Ready(self._arrived(index, self.reader.read(index)))
        with torch.cuda.stream(self._stream):
            # the first of a kind is put together on the GPU where that has room for its parts, too
            beside = 0 if self.reader.known(index) else 2 * self.bytes[index]
            on_device = self.reader.plain and self.memory.on_device.take(beside)
            found: dict[str, Tensor] | None = None
            try:
                if on_device:
                    with optional("layers_read_through_host"):
                        found = self.reader.read_to(self.memory.device, index)
                if found is None:
                    found = self.reader.read(index)
                    if self.reader.plain and not on_device:
                        with optional("layers_read_through_host"):
                            self.reader.learn(index, found)
            finally:
                self.memory.on_device.give(beside if on_device else 0)
            ready = _Ready(self._arrived(index, found), torch.cuda.Event())
            ready.copied.record(self._stream)
        return ready

    def _arrived(self, index: int, read: dict[str, Tensor]) -> dict[str, Tensor]:
        """A layer as it was read, on the device and balanced. Uses up ``read``."""
        tensors = {name: self._moved(index, name, read.pop(name)) for name in list(read)}
        experts = self._experts[index]
        if experts is not None and index not in self._within_reach:
            first, down = (tensors[f"{experts.path}.{matrix.name}"] for matrix in experts.matrices)
            if not balance(self.model.get_submodule(experts.path), first, down):
                self._within_reach.add(index)
        return tensors

    def _moved(self, index: int, name: str, tensor: Tensor) -> Tensor:
        """A copy on the device, through pinned memory: what was read may be the mapped file itself."""
        empty = self._empty[index][name]
        tensor, kind = as_adopted(tensor, empty), empty.dtype
        if tensor.is_cuda:
            return tensor.to(kind)
        if self.memory.device.type != "cuda":
            return tensor.to(self.memory.device, kind, copy=True)
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
        return pinned.to(self.memory.device, non_blocking=True).to(kind)

    def _retire(self) -> None:
        """Keeps the current layer where there is room, else lets go of it."""
        index, self._current = self._current, None
        if index is None:
            return
        if self.memory.on_device.take(self.bytes[index]):
            self._kept.add(index)
        else:
            self._place(index, self._empty[index])

    def _leave(self, index: int) -> None:
        self._kept.discard(index)
        self.memory.on_device.give(self.bytes[index])

    def held(self) -> int:
        """Bytes of the layers that are kept beside the current one."""
        return sum(self.bytes[i] for i in self._kept)

    def give_way(self, count: int) -> None:
        """Lets go of kept layers until ``count`` bytes are free: those of the end, as passes begin at the front."""
        for index in sorted(self._kept, reverse=True):
            if count <= 0:
                return
            self._leave(index)
            self._place(index, self._empty[index])
            count -= self.bytes[index]

    def _place(self, index: int, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            owner, leaf = self._places[index][name]
            if isinstance(self._empty[index][name], nn.Parameter) and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            owner[leaf] = tensor

    def _find(self, name: str) -> tuple[dict[str, Any], str]:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        return (module._parameters if leaf in module._parameters else module._buffers), leaf

    def _placeholder(self, name: str, owner: dict[str, Any], leaf: str) -> Tensor:
        """What stands for a tensor that is not there: its shape, and its type on the device.

        That is the compute type for parameters; buffers keep their own.
        """
        found = owner[leaf]
        if not isinstance(found, nn.Parameter):
            return found.to(self.reader.loaded[name])
        kind = self._dtype if found.is_floating_point() else found.dtype
        owner[leaf] = nn.Parameter(torch.empty(found.shape, dtype=kind, device="meta"), requires_grad=False)
        return owner[leaf]


def _distinct(model: nn.Module) -> list[Tensor]:
    """Every parameter and buffer once, tied ones included."""
    return list({id(t): t for t in (*model.parameters(), *model.buffers())}.values())
