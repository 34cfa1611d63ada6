"""How many bytes a job may hold, and where: on its device, in host memory, in files of the work directory.

All large allocations of a job are reserved here first, within the bounds of ``--gpu-memory`` and ``--host-memory``.
Layers that are cached only for speed are evicted when the device has no room left. On a CPU the device is the host, and
one bound counts for both. Each rank has its own bounds and evicts only layers of its own cache. Must not import models.
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

import psutil
import torch
from torch import Tensor

from gemq.errors import UserError, short_repr
from gemq.runtime.compat import torch_private
from gemq.runtime.files import disk_errors

DEFAULT_FRACTION = 0.9
"""Default bound, as a fraction of the memory that is free when a job starts."""

UNLIMITED = 1 << 62

CONTEXT_BYTES = 600_000_000
"""What CUDA takes outside PyTorch's memory: the context of a process, and the code of all kernels."""

LIBRARY_BYTES = 100_000_000
"""Workspaces of matrix product libraries, and of the decode kernels."""

DEFAULT_CONTEXT = 8192
"""Tokens of a text that has to fit if none are given, or the model's maximum if that is less."""

SPILL_PREFIX = ".spilled-"
"""Prefix of the files that hold what does not fit into memory. A job removes those that a killed job left."""

MAX_HOST_THREADS = 8
"""PyTorch threads of a job on a GPU. They only read files for it, and more would delay the thread that launches."""


class MemoryTier(enum.Enum):
    """Where a tensor is stored while it is not in use, the fastest tier first."""

    DEVICE = "device"
    HOST = "host memory"
    DISK = "disk"


def _no_bytes() -> dict[MemoryTier, int]:
    """Return a count of 0 bytes for each tier outside the device."""
    return {MemoryTier.HOST: 0, MemoryTier.DISK: 0}


@dataclass
class ByteLimit:
    """A limit in bytes, and how many of them are used. Safe to use from several threads."""

    limit: int
    used: int = 0
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def available(self) -> int:
        """Bytes that are not used."""
        return self.limit - self.used

    def reserve(self, count: int) -> bool:
        """Reserve ``count`` bytes. Returns False, and reserves nothing, if fewer are available."""
        with self._lock:
            if count > self.available:
                return False
            self.used += count
            return True

    def free(self, count: int) -> None:
        """Free ``count`` reserved bytes."""
        with self._lock:
            self.used -= count


class Cache(Protocol):
    """Tensors that are on the device only for speed."""

    def evictable_bytes(self) -> int:
        """Return the bytes that could be evicted."""
        ...

    def evict(self, count: int) -> None:
        """Evict at least ``count`` bytes, or everything if there are fewer. The cache chooses which."""
        ...


@dataclass
class MemoryBudget:
    """The memory bounds of a job.

    Attributes:
        device: where the job computes
        on_device: limit of bytes there
        host: limit of bytes in host memory; the same object on a CPU
        directory: of files for what neither holds; None where files are not allowed
        caches: evicted when the device has no room left
        spilled: peak bytes that were stored in each tier outside the device, for the summary
    """

    device: torch.device
    on_device: ByteLimit
    host: ByteLimit
    directory: Path | None = None
    caches: list[Cache] = field(default_factory=list)
    spilled: dict[MemoryTier, int] = field(default_factory=_no_bytes)
    _offloaded: dict[MemoryTier, int] = field(default_factory=_no_bytes)

    @classmethod
    def unlimited(cls, device: torch.device) -> MemoryBudget:
        """Return a budget without limits."""
        bound = ByteLimit(UNLIMITED)
        return cls(device, bound, bound if device.type == "cpu" else ByteLimit(UNLIMITED))

    @classmethod
    def bounded(
        cls,
        device: torch.device,
        gpu_bytes: int | None,
        host_bytes: int | None,
        directory: Path | None,
        processes: int = 1,
    ) -> MemoryBudget:
        """Return a budget with the user's limits.

        Args:
            device: where the job computes
            gpu_bytes: bound of GPU memory; None: nine tenths of what is free
            host_bytes: bound of host memory; None: nine tenths of what is free
            directory: of files for what memory does not hold
            processes: of the job on this machine, which share its host memory

        Raises:
            UserError: the machine has less memory than a bound, or no GPU to bound.
        """
        for name, count in (("gpu_memory", gpu_bytes), ("host_memory", host_bytes)):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise UserError(f"{name} cannot be {short_repr(count)}: give a number of bytes, such as 20_000_000_000")
        if host_bytes is None:
            host_bytes = int(DEFAULT_FRACTION * free_host_bytes())
        elif host_bytes > total_host_bytes():
            limit = gigabytes(total_host_bytes())
            raise UserError(f"--host-memory {gigabytes(host_bytes)} is more than this machine's {limit}")
        host = ByteLimit(host_bytes // processes)
        if device.type != "cuda":
            if gpu_bytes is not None:
                raise UserError(f"--gpu-memory bounds a GPU and the job runs on {device}: give --host-memory")
            return cls(device, host, host, directory)
        free, total = torch.cuda.mem_get_info(device)
        if gpu_bytes is None:
            gpu_bytes = int(DEFAULT_FRACTION * free)
        elif gpu_bytes > total:
            raise UserError(f"--gpu-memory {gigabytes(gpu_bytes)} is more than the {gigabytes(total)} of {device}")
        return cls(device, ByteLimit(gpu_bytes), host, directory)

    def try_reserve(self, count: int) -> bool:
        """Reserve ``count`` bytes on the device, evicting caches if necessary.

        Returns False, and evicts nothing, if they do not fit even without caches.
        """
        if count > self.max_device_bytes:
            return False
        if count > self.on_device.available:
            for cache in self.caches:
                cache.evict(count - self.on_device.available)
        return self.on_device.reserve(count)

    @property
    def max_device_bytes(self) -> int:
        """Bytes that can be reserved on the device after all caches are evicted."""
        return self.on_device.available + sum(cache.evictable_bytes() for cache in self.caches)

    @property
    def fast_bytes(self) -> int:
        """Bytes that can be stored without going to the disk."""
        device_bytes = self.max_device_bytes
        return device_bytes if self.host is self.on_device else device_bytes + self.host.available

    def reserve(self, count: int) -> MemoryTier:
        """Reserve ``count`` bytes in the fastest tier that has room for them.

        Raises:
            UserError: they fit nowhere.
        """
        if self.try_reserve(count):
            return MemoryTier.DEVICE
        tier = MemoryTier.DISK
        if self.host is not self.on_device and self.host.reserve(pinned_bytes(count)):
            tier = MemoryTier.HOST
        elif self.directory is None:
            raise UserError(f"{gigabytes(count)} more are needed than memory has: give more with {self.flag}")
        self._offloaded[tier] += count
        self.spilled[tier] = max(self.spilled[tier], self._offloaded[tier])
        return tier

    def free(self, tier: MemoryTier, count: int) -> None:
        """Free ``count`` bytes that were reserved in ``tier``."""
        if tier is MemoryTier.DEVICE:
            self.on_device.free(count)
            return
        self._offloaded[tier] -= count
        if tier is MemoryTier.HOST:
            self.host.free(pinned_bytes(count))

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Limit PyTorch's allocator to the device's bound, and on a GPU also the number of threads.

        Memory that the process holds on entry, such as a caller's model, does not count towards the bound.

        Raises:
            UserError: a stage needs more memory than was estimated.
        """
        is_bounded_gpu = self.device.type == "cuda" and self.on_device.limit < UNLIMITED
        threads = torch.get_num_threads()
        if is_bounded_gpu:
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            total = torch.cuda.get_device_properties(index).total_memory
            torch.set_num_threads(min(MAX_HOST_THREADS, threads))
            torch.cuda.empty_cache()
            limit = torch.cuda.memory_reserved(index) + self.on_device.limit
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), index)
            _use_expandable_segments(True)
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{gigabytes(self.on_device.limit)} of memory were not enough: give more with {self.flag}, or end "
                "other programs on it; gemq quantize then continues with --resume"
            ) from error
        finally:
            if is_bounded_gpu:
                torch.set_num_threads(threads)
                _use_expandable_segments(False)
                torch.cuda.set_per_process_memory_fraction(1.0, index)

    @property
    def flag(self) -> str:
        """The flag that bounds the device."""
        return "--gpu-memory" if self.device.type == "cuda" else "--host-memory"

    def empty_pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor in host memory that a GPU can copy from and to asynchronously."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=self.device.type == "cuda")

    def empty_mapped(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Path]:
        """Return a tensor on the CPU that is mapped to a new file of ``directory``, and the path of that file."""
        assert self.directory is not None
        size = math.prod(shape)
        file_size = max(1, size)  # an empty file cannot be mapped
        with disk_errors(self.directory):
            descriptor, name = tempfile.mkstemp(prefix=SPILL_PREFIX, dir=self.directory)
        path = Path(name)
        with disk_errors(path), open(descriptor, "wb") as file:
            # a full disk is reported here; later, writing to the mapping would kill the process
            os.posix_fallocate(file.fileno(), 0, file_size * dtype.itemsize)
        flat = torch.from_file(str(path), shared=True, size=file_size, dtype=dtype)
        return flat[:size].view(tuple(shape)), path


class OffloadedTensors:
    """A group of tensors that is on the device only while it is used: ``load``, then ``offload``.

    Where memory has room for them, they stay on the device. Otherwise their contents are stored in pinned host memory
    or in files between two uses. The tensor objects stay the same, only their storage changes.
    """

    def __init__(
        self, memory: MemoryBudget, tensors: Callable[[], tuple[list[Tensor], list[Tensor]]], extra_bytes: int = 0
    ) -> None:
        """Reserve space for the tensors and offload them if they do not fit on the device.

        Args:
            memory: bounds of the job
            tensors: returns the tensors that never change, and those that may
            extra_bytes: bytes that will be added later, such as an optimizer's state
        """
        self.memory, self.tensors = memory, tensors
        constant, mutable = tensors()
        self.bytes = sum(tensor.nbytes for tensor in (*constant, *mutable)) + extra_bytes
        self.tier = memory.reserve(self.bytes)
        self._copies: dict[int, Tensor] = {}
        self._files: list[Path] = []
        self._is_loaded = True
        self.offload()

    def load(self) -> None:
        """Load all tensors to the device."""
        if self._is_loaded or self.tier is MemoryTier.DEVICE:
            return
        for tensor in chain(*self.tensors()):
            tensor.data = self._copies[id(tensor)].to(self.memory.device, non_blocking=True)
        self._is_loaded = True

    def offload(self, changed: bool = False) -> None:
        """Offload all tensors. ``changed``: those that may change were written to, and are copied again."""
        if not self._is_loaded or self.tier is MemoryTier.DEVICE:
            return
        constant, mutable = self.tensors()
        for tensor in constant:
            self._offload_tensor(tensor, changed=False)
        for tensor in mutable:
            self._offload_tensor(tensor, changed)
        self._is_loaded = False

    def _offload_tensor(self, tensor: Tensor, changed: bool) -> None:
        """Replace a tensor's storage by its copy outside the device, which is written if it is new or outdated."""
        copy = self._copies.get(id(tensor))
        if copy is None or copy.shape != tensor.shape:
            copy = self._copies[id(tensor)] = self._empty_like(tensor)
            changed = True
        if changed:
            copy.copy_(tensor.detach(), non_blocking=self.tier is MemoryTier.HOST)
        tensor.data = copy

    def close(self) -> None:
        """Free the reserved space. The tensors must not be used afterwards."""
        self.memory.free(self.tier, self.bytes)
        for path in self._files:
            path.unlink(missing_ok=True)

    def _empty_like(self, tensor: Tensor) -> Tensor:
        """Return an uninitialized tensor of the same shape and dtype in this group's tier."""
        if self.tier is MemoryTier.HOST:
            return self.memory.empty_pinned(tensor.shape, tensor.dtype)
        copy, path = self.memory.empty_mapped(tensor.shape, tensor.dtype)
        self._files.append(path)
        return copy


def _use_expandable_segments(enable: bool) -> None:
    """Let PyTorch's reserved memory grow and shrink by pages, unless the user has set this option.

    Without it, fragmentation took a seventh of a bound.
    """
    settings = [os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")]
    if not any("expandable_segments" in setting for setting in settings):
        torch_private.set_allocator_settings(f"expandable_segments:{enable}")


def pinned_bytes(count: int) -> int:
    """Return what ``count`` bytes take in pinned memory: PyTorch rounds up to a power of two."""
    return 1 << max(0, count - 1).bit_length()


def gigabytes(count: int) -> str:
    """Format bytes as the flags take them, such as ``20.01GB``. Rounded up, so that a suggested bound suffices."""
    unit, scale = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6)
    return f"{-(-count * 100 // scale) / 100:g}{unit}"


def total_host_bytes() -> int:
    """Return the memory of this machine, or of the container that limits this process."""
    total = psutil.virtual_memory().total
    limit, _ = _container_limit()
    return total if limit is None else min(total, limit)


def free_host_bytes() -> int:
    """Return the memory that is available without swapping."""
    available = psutil.virtual_memory().available
    limit, used = _container_limit()
    return available if limit is None else min(available, limit - used)


def _container_limit() -> tuple[int | None, int]:
    """Return a container's memory limit (None: no limit) and what it uses of it, without the page cache."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        page_cache = int(statistics.get("file", 0))
    except (OSError, ValueError):
        return None, 0
    return (None, 0) if limit == "max" else (int(limit), max(0, used - page_cache))
