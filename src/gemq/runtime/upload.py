"""Reads tensors from safetensors files into a GPU's memory.

Touching a new page of memory takes longer than copying to it, and a mapped file consists of new pages. Therefore
threads read into two pinned buffers that are reused: one is filled while the GPU copies from the other.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemq.errors import UserError
from gemq.runtime.integers import round_up
from gemq.runtime.safetensors_files import tensor_entries

BUFFER_BYTES, MAX_READ_BYTES = 64 << 20, 4 << 20
"""Size of a buffer, and upper bound for one read of a thread."""

THREADS, ALIGNMENT = 8, 256

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""torch dtypes by the names that safetensors has for them."""


class Span(NamedTuple):
    """Where a tensor is stored: its file, the position of its first byte, dtype and shape."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, rows: slice) -> Span:
        """Return the span of these rows of the first dimension. ``rows`` has a start and a stop."""
        row_bytes = self.bytes // max(1, self.shape[0])
        shape = (rows.stop - rows.start, *self.shape[1:])
        return Span(self.file, self.start + rows.start * row_bytes, self.dtype, shape)


def read_spans(file: Path) -> dict[str, Span]:
    """Return where each tensor of a safetensors file is stored, by name.

    Raises:
        UserError: the file is damaged, or has a dtype that torch does not have.
    """
    entries, data_start = tensor_entries(file)
    spans = {}
    for name, entry in entries.items():
        if entry["dtype"] not in TORCH_DTYPES:
            raise UserError(f"{file} stores {name} as {entry['dtype']}: give the model in 16 or 32 bits")
        start = data_start + entry["data_offsets"][0]
        spans[name] = Span(file, start, TORCH_DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return spans


class Fragment(NamedTuple):
    """A span that is a fragment of a new tensor: the name of the tensor, and where the span begins in it.

    ``start`` counts elements of the flattened tensor.
    """

    span: Span
    tensor: str
    start: int


class _Read(NamedTuple):
    """Bytes of a file, from ``start``, that fill ``target``: a flat uint8 view of a tensor."""

    file: Path
    start: int
    target: Tensor


class Upload:
    """Reads tensors into the memory of one device. Safe to call from several threads, which wait for each other."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._on_gpu = device, device.type == "cuda"
        self._lock = threading.Lock()
        self._buffers: list[Tensor] = []
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="gemq-read")
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None

    def tensors(self, spans: Mapping[str, Span]) -> dict[str, Tensor]:
        """Return the tensors on the device, ready for work that is launched on the current stream afterwards."""
        shapes = {name: (span.shape, span.dtype) for name, span in spans.items()}
        return self.assemble(shapes, [Fragment(span, name, 0) for name, span in spans.items()])

    def assemble(
        self, shapes: Mapping[str, tuple[Sequence[int], torch.dtype]], fragments: Sequence[Fragment]
    ) -> dict[str, Tensor]:
        """Return new tensors on the device that are assembled from fragments.

        Args:
            shapes: shape and dtype of each tensor by name
            fragments: cover all tensors completely
        """
        tensors: dict[str, Tensor] = {}
        with self._lock, torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            for name, (shape, dtype) in shapes.items():
                tensors[name] = torch.empty(tuple(shape), dtype=dtype, device=self.device)
            reads: list[_Read] = []
            for fragment in fragments:
                reads.extend(_divide_into_reads(fragment, tensors[fragment.tensor]))
            with ExitStack() as stack:
                files = dict.fromkeys(read.file for read in reads)
                self._fill(reads, {file: _open(file, stack) for file in files})
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            for tensor in tensors.values():
                tensor.record_stream(current)
        return tensors

    def _fill(self, reads: Sequence[_Read], descriptors: Mapping[Path, int]) -> None:
        """Run ``reads`` by threads, and copy from the buffers to the targets."""
        if not self._buffers:
            self._buffers = [torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(2)]
        wait_until_copied: list[Callable[[], Any]] = [lambda: None, lambda: None]
        for number, batch in enumerate(_fit_into_buffers(reads)):
            buffer = self._buffers[number % 2]
            wait_until_copied[number % 2]()
            pending = []
            for start, read in batch:
                source = buffer[start : start + len(read.target)]
                future = self._pool.submit(_read_into, descriptors[read.file], read.start, source.numpy().data)
                pending.append((future, read.target, source))
            for future, target, source in pending:
                future.result()
                target.copy_(source, non_blocking=True)
            if self._on_gpu:
                event = torch.cuda.Event()
                event.record()
                wait_until_copied[number % 2] = event.synchronize
        for wait in wait_until_copied:  # the next call may overwrite the buffers
            wait()


def _divide_into_reads(fragment: Fragment, tensor: Tensor) -> Iterator[_Read]:
    """Yield the reads that fill a fragment of ``tensor``."""
    span = fragment.span
    if not span.bytes:
        return
    start = fragment.start * span.dtype.itemsize
    target = tensor.view(-1).view(torch.uint8)[start : start + span.bytes]
    for offset in range(0, span.bytes, MAX_READ_BYTES):
        yield _Read(span.file, span.start + offset, target[offset : offset + MAX_READ_BYTES])


def _fit_into_buffers(reads: Sequence[_Read]) -> Iterator[list[tuple[int, _Read]]]:
    """Yield as many reads as a buffer holds, each with its position in the buffer."""
    batch: list[tuple[int, _Read]] = []
    end = 0
    for read in reads:
        if end + len(read.target) > BUFFER_BYTES:
            yield batch
            batch, end = [], 0
        batch.append((end, read))
        end += round_up(len(read.target), ALIGNMENT)
    if batch:
        yield batch


def _open(file: Path, stack: ExitStack) -> int:
    """Return a descriptor for reading, which ``stack`` closes."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror})") from error
    stack.callback(os.close, descriptor)
    return descriptor


def _read_into(descriptor: int, start: int, target: memoryview) -> None:
    """Fill ``target`` with the bytes of a file from ``start``."""
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], start + done)
        if not count:
            raise UserError("a file became shorter while it was read: copy the checkpoint again")
        done += count


@cache
def upload_to(device: torch.device) -> Upload:
    """Return the one ``Upload`` of a device, so that its buffers are shared."""
    return Upload(device)
