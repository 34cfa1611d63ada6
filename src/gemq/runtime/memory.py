"""How much a job may hold at once, and where: on its device, in host memory, in files of the work directory.

The one place where that is decided. A job names its bounds (``--gpu-memory``, ``--host-memory``); everything large asks
here before it is made, and what is only kept to be quick (layers that can be read again) gives way. On a CPU the device
is the host: one bound counts for both. Knows bytes, no models.
"""

from __future__ import annotations

import enum
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gemq.errors import UserError, shown
from gemq.runtime.files import disk_errors

DEFAULT_SHARE = 0.9
"""Of what is free when a job starts: what it takes at most when it is told no bound."""

UNLIMITED = 1 << 62

WAITING = ".waiting-"
"""How names of files begin that hold what does not fit into memory. A job removes those that a killed one left."""

MOST_THREADS = 8
"""For files on their way to a GPU: enough for the bytes that memory gives, and the thread that launches is not kept
waiting by all processors of a large machine."""


class Place(enum.Enum):
    """Where a tensor waits until it is needed."""

    DEVICE = "device"
    HOST = "host memory"
    DISK = "disk"


@dataclass
class Bound:
    """Bytes that may be held in one place, and how many are."""

    limit: int
    used: int = 0
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)  # threads read layers

    @property
    def free(self) -> int:
        return self.limit - self.used

    def take(self, count: int) -> bool:
        """Takes ``count`` bytes if there are so many."""
        with self._lock:
            if count > self.free:
                return False
            self.used += count
            return True

    def give(self, count: int) -> None:
        with self._lock:
            self.used -= count


class Cache(Protocol):
    """What is held on the device only to be quick."""

    def held(self) -> int:
        """Bytes that it could let go of."""
        ...

    def give_way(self, count: int) -> None:
        """Lets go of ``count`` bytes, or of all that it holds."""
        ...


@dataclass
class Memory:
    """The bounds of a job.

    device:    where it computes
    on_device: bytes there
    host:      bytes of host memory; the same object on a CPU
    directory: of files for what neither holds; None where nothing has to be put off
    caches:    what gives way on the device when room is wanted
    """

    device: torch.device
    on_device: Bound
    host: Bound
    directory: Path | None = None
    caches: list[Cache] = field(default_factory=list)
    spilled: dict[Place, int] = field(default_factory=lambda: {Place.HOST: 0, Place.DISK: 0})
    """Most bytes that were put off to each place: said in the summary."""
    _waiting: dict[Place, int] = field(default_factory=lambda: {Place.HOST: 0, Place.DISK: 0})

    @classmethod
    def unlimited(cls, device: torch.device) -> Memory:
        bound = Bound(UNLIMITED)
        return cls(device, bound, bound if device.type == "cpu" else Bound(UNLIMITED))

    @classmethod
    def bounded(
        cls,
        device: torch.device,
        gpu_bytes: int | None,
        host_bytes: int | None,
        directory: Path | None,
        processes: int = 1,
    ) -> Memory:
        """Bounds as asked for; without them, nine tenths of what is free now.

        processes: of the job on this machine, which share its host memory
        Raises UserError for bounds that the machine does not have.
        """
        for name, count in (("gpu_memory", gpu_bytes), ("host_memory", host_bytes)):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise UserError(f"{name} cannot be {shown(count)}: give a number of bytes, such as 20_000_000_000")
        free = free_host_bytes()
        if host_bytes is not None and host_bytes > (total := total_host_bytes()):
            raise UserError(f"--host-memory {gigabytes(host_bytes)} is more than this machine's {gigabytes(total)}")
        host = Bound((int(DEFAULT_SHARE * free) if host_bytes is None else host_bytes) // processes)
        if device.type != "cuda":
            if gpu_bytes is not None:
                raise UserError(f"--gpu-memory bounds a GPU and the job runs on {device}: give --host-memory")
            return cls(device, host, host, directory)
        free, total = torch.cuda.mem_get_info(device)
        if gpu_bytes is not None and gpu_bytes > total:
            raise UserError(f"--gpu-memory {gigabytes(gpu_bytes)} is more than the {gigabytes(total)} of {device}")
        return cls(device, Bound(int(DEFAULT_SHARE * free) if gpu_bytes is None else gpu_bytes), host, directory)

    def room(self, count: int) -> bool:
        """Takes ``count`` bytes on the device, from caches if need be. False when there are not so many."""
        if count > self.on_device.free:
            for cache in self.caches:
                cache.give_way(count - self.on_device.free)
        return self.on_device.take(count)

    @property
    def quick_bytes(self) -> int:
        """Room for what waits without going to the disk."""
        free = self.on_device.free + sum(cache.held() for cache in self.caches)
        return free if self.host is self.on_device else free + self.host.free

    def place(self, count: int) -> Place:
        """Takes ``count`` bytes where there is room for them, the quickest place first."""
        if self.room(count):
            return Place.DEVICE
        place = Place.DISK
        if self.host is not self.on_device and self.host.take(pinned_bytes(count)):
            place = Place.HOST
        elif self.directory is None:
            raise UserError(f"{gigabytes(count)} more do not fit into memory: give more with {self.flag}")
        self._waiting[place] += count
        self.spilled[place] = max(self.spilled[place], self._waiting[place])
        return place

    def release(self, place: Place, count: int) -> None:
        """Gives back what ``place`` took."""
        if place is Place.DEVICE:
            self.on_device.give(count)
            return
        self._waiting[place] -= count
        if place is Place.HOST:
            self.host.give(pinned_bytes(count))

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Limits the process to the device's bound, cached blocks included, and to a few threads next to a GPU.

        Memory that the process holds on entry, such as a caller's model, does not count towards the bound.

        Raises:
            UserError: A stage needs more memory than its estimate.
        """
        bounded = self.device.type == "cuda" and self.on_device.limit < UNLIMITED
        threads = torch.get_num_threads()
        if bounded:
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            total = torch.cuda.get_device_properties(index).total_memory
            torch.set_num_threads(min(MOST_THREADS, threads))
            torch.cuda.empty_cache()
            limit = torch.cuda.memory_reserved(index) + self.on_device.limit
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), index)
            _use_expandable_segments(True)
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{gigabytes(self.on_device.limit)} of memory did not do: give more with {self.flag}, or close what "
                "else runs there; gemq quantize then goes on with --resume"
            ) from error
        finally:
            if bounded:
                torch.set_num_threads(threads)
                _use_expandable_segments(False)
                torch.cuda.set_per_process_memory_fraction(1.0, index)

    @property
    def flag(self) -> str:
        """The flag that bounds the device."""
        return "--gpu-memory" if self.device.type == "cuda" else "--host-memory"

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in host memory that a GPU can copy from and to by itself."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=self.device.type == "cuda")

    def mapped(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Path]:
        """A tensor on the CPU whose contents are a new file of ``directory``, and that file.

        Its name is hidden, so that a job that goes on removes what a killed one left.
        """
        assert self.directory is not None
        count = max(1, math.prod(shape))
        with disk_errors(self.directory):
            descriptor, name = tempfile.mkstemp(prefix=WAITING, dir=self.directory)
        path = Path(name)
        with disk_errors(path), open(descriptor, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)  # a full disk is told now, not by a signal
        flat = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
        return flat[: math.prod(shape)].view(tuple(shape)), path


class Waiting:
    """Tensors that belong together and are on the device when they are needed: ``come``, then ``leave``.

    Where memory has room they stay there. Else their contents lie in pinned host memory, or in files, between two
    visits; the tensor objects stay the same.
    """

    def __init__(self, memory: Memory, tensors: Callable[[], tuple[list[Tensor], list[Tensor]]], more: int = 0):
        """tensors: gives those that never change, and those that may

        more: bytes that will be added later, such as an optimizer's state
        """
        self.memory, self.tensors = memory, tensors
        fixed, changing = tensors()
        self.bytes = sum(t.numel() * t.element_size() for t in (*fixed, *changing)) + more
        self.place = memory.place(self.bytes)
        self._away: dict[int, Tensor] = {}
        self._files: list[Path] = []
        self._here = True
        self.leave()

    def come(self) -> None:
        """Brings all tensors to the device."""
        if self._here or self.place is Place.DEVICE:
            return
        for tensor in chain(*self.tensors()):
            tensor.data = self._away[id(tensor)].to(self.memory.device, non_blocking=True)
        self._here = True

    def leave(self, changed: bool = False) -> None:
        """Lets them wait where their place is. ``changed``: with what was written into those that may change."""
        if not self._here or self.place is Place.DEVICE:
            return
        fixed, changing = self.tensors()
        for tensor, write in (*((t, False) for t in fixed), *((t, changed) for t in changing)):
            away = self._away.get(id(tensor))
            if away is None or away.shape != tensor.shape:
                away = self._away[id(tensor)] = self._empty(tensor)
                write = True
            if write:
                away.copy_(tensor.detach(), non_blocking=self.place is Place.HOST)
            tensor.data = away
        self._here = False

    def close(self) -> None:
        """Gives the place back. The tensors are not to be used any more."""
        self.memory.release(self.place, self.bytes)
        for path in self._files:
            path.unlink(missing_ok=True)

    def _empty(self, like: Tensor) -> Tensor:
        if self.place is Place.HOST:
            return self.memory.pinned(like.shape, like.dtype)
        tensor, path = self.memory.mapped(like.shape, like.dtype)
        self._files.append(path)
        return tensor


def _use_expandable_segments(used: bool) -> None:
    """Lets PyTorch's reserves grow and shrink by pages, where the user has not chosen for himself.

    Under a bound, pieces that are free but lie apart were seen to take a seventh of it.
    """
    chosen = [os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")]
    if not any("expandable_segments" in text for text in chosen):
        torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{used}")


def pinned_bytes(count: int) -> int:
    """What ``count`` bytes take in pinned memory: PyTorch rounds up to a power of two."""
    return 1 << max(0, count - 1).bit_length()


def gigabytes(count: int) -> str:
    """Bytes as the flags take them, rounded up: what is asked for would do."""
    unit, scale = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6)
    return f"{-(-count * 100 // scale) / 100:g}{unit}"


def total_host_bytes() -> int:
    """Memory of this machine, or of the container that it is bounded to."""
    total = _meminfo("MemTotal")
    limit, _ = _control_group()
    return total if limit is None else min(total, limit)


def free_host_bytes() -> int:
    """Memory that can be had without swapping."""
    free = _meminfo("MemAvailable")
    limit, used = _control_group()
    return free if limit is None else min(free, limit - used)


def _meminfo(key: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _control_group() -> tuple[int | None, int]:
    """A container's limit and what it uses of it, without the files that the kernel holds only to be quick."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        files = next(
            (
                int(line.split()[1])
                for line in (group / "memory.stat").read_text().splitlines()
                if line.startswith("file ")
            ),
            0,
        )
    except (OSError, ValueError):
        return None, 0
    return (None, 0) if limit == "max" else (int(limit), max(0, used - files))
