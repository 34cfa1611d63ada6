"""One tensor per micro-batch, each where memory has room for it: on the device, in pinned host memory, in a file.

Reads like a list of tensors on the device. What is put off comes back when it is asked for; a place is found once and
kept, so that a pass that replaces every tensor moves no memory about. Knows no models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gemq.runtime.memory import Memory, Place

PASSED = "gemq_passed"
"""Attribute of a hidden state: what else its layer gave to the next (see ``models.replay``)."""


class Batches(Sequence[Tensor]):
    """Tensors of any shapes, one per micro-batch. Tensors that are put off lose their autograd history."""

    def __init__(self, memory: Memory, tensors: Iterable[Tensor] = ()):
        self.memory = memory
        self._slots: list[_Slot] = []
        for tensor in tensors:
            self.append(tensor)

    def append(self, tensor: Tensor) -> None:
        self._slots.append(_Slot(self.memory, tensor))

    def copy(self) -> Batches:
        return Batches(self.memory, self)

    def clear(self) -> None:
        """Lets go of all tensors and their places."""
        while self._slots:
            self._slots.pop().free()

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, index: Any) -> Any:
        """The tensor at a place (no slices), on the device."""
        return self._slots[index].get()

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        self._slots[index].set(tensor)

    def __iter__(self) -> Iterator[Tensor]:
        for slot in self._slots:
            yield slot.get()

    def __del__(self) -> None:
        self.clear()


class _Slot:
    """One tensor and its place."""

    def __init__(self, memory: Memory, tensor: Tensor):
        self.memory = memory
        self.path: Path | None = None
        self._put(tensor)

    def _put(self, tensor: Tensor) -> None:
        self.bytes = tensor.numel() * tensor.element_size()
        self.passed: dict[Any, Any] = {}
        self.place = self.memory.place(self.bytes)
        if self.place is Place.DEVICE:
            self.tensor = tensor.detach() if hasattr(tensor, PASSED) else tensor
        else:
            self.tensor = self._empty(tensor)
            self.tensor.copy_(tensor.detach(), non_blocking=self.place is Place.HOST)
        self._keep_passed(tensor)

    def _empty(self, like: Tensor) -> Tensor:
        if self.place is Place.HOST:
            return self.memory.pinned(like.shape, like.dtype)
        tensor, self.path = self.memory.mapped(like.shape, like.dtype)
        return tensor

    def get(self) -> Tensor:
        if self.place is Place.DEVICE and not self.passed:
            return self.tensor
        # pinned copies are queued behind the kernels before them: the order of one stream is all that is needed
        tensor = self.tensor.to(self.memory.device, non_blocking=self.place is Place.HOST)
        if self.place is not Place.DEVICE and tensor is self.tensor:
            tensor = tensor.clone()  # an operation in place must not reach what is kept
        if self.passed:
            tensor = tensor.view_as(tensor) if tensor is self.tensor else tensor
            passed = {k: v.get() if isinstance(v, _Slot) else v for k, v in self.passed.items()}
            setattr(tensor, PASSED, passed)
        return tensor

    def set(self, tensor: Tensor) -> None:
        same = tensor.shape == self.tensor.shape and tensor.dtype == self.tensor.dtype
        if not same:
            self.free()
            self._put(tensor)
            return
        if self.place is Place.DEVICE:
            self.tensor = tensor.detach() if hasattr(tensor, PASSED) else tensor
        else:
            self.tensor.copy_(tensor.detach(), non_blocking=self.place is Place.HOST)
        self._keep_passed(tensor)

    def _keep_passed(self, tensor: Tensor) -> None:
        """Keeps what belongs to a hidden state under the same bounds."""
        given = getattr(tensor, PASSED, {})
        for key, value in given.items():
            held = self.passed.get(key)
            if isinstance(held, _Slot) and isinstance(value, Tensor):
                held.set(value)
            else:
                self.passed[key] = _Slot(self.memory, value) if isinstance(value, Tensor) else value

    def free(self) -> None:
        self.memory.release(self.place, self.bytes)
        del self.tensor
        for value in self.passed.values():
            if isinstance(value, _Slot):
                value.free()
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            self.path = None
