"""Tensors from safetensors files to a GPU, past all memory that is new.

Touching a page for the first time takes longer than copying to it, and a mapped file is nothing but such pages. So
threads read into two pinned buffers that stay, and while one is read into the GPU copies from the other.
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
from gemq.runtime.safetensors_files import tensor_entries

BUFFER, PIECE = 64 << 20, 4 << 20
"""Bytes of a buffer, and of what a thread reads into it at once."""

THREADS, ALIGNMENT = 8, 256

TYPES = {
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
"""As safetensors calls them."""


class Span(NamedTuple):
    """Where a tensor's bytes lie."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, some: slice) -> Span:
        """Some of the first dimension. ``some`` has a start and a stop."""
        each = self.bytes // max(1, self.shape[0])
        return Span(self.file, self.start + some.start * each, self.dtype, (some.stop - some.start, *self.shape[1:]))


def spans_of(file: Path) -> dict[str, Span]:
    """The tensors of a safetensors file by name.

    Raises:
        UserError: a damaged file, or a type that torch does not have.
    """
    entries, start = tensor_entries(file)
    for name, entry in entries.items():
        if entry["dtype"] not in TYPES:
            raise UserError(f"{file} stores {name} as {entry['dtype']}: give the model in 16 or 32 bits")
    return {
        name: Span(file, start + entry["data_offsets"][0], TYPES[entry["dtype"]], tuple(entry["shape"]))
        for name, entry in entries.items()
    }


class Place(NamedTuple):
    """A span, the tensor that it is a part of, and where it begins there, in numbers."""

    span: Span
    tensor: str
    start: int


class _Piece(NamedTuple):
    """Some bytes of a file, and where in a tensor they belong."""

    file: Path
    start: int
    into: Tensor  # flat, uint8


class Upload:
    """Reads tensors to one device. For any thread, one at a time."""

    def __init__(self, device: torch.device):
        self.device, self._on_gpu = device, device.type == "cuda"
        self._lock = threading.Lock()
        self._buffers: list[Tensor] = []
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="gemq-read")
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None

    def tensors(self, spans: Mapping[str, Span]) -> dict[str, Tensor]:
        """The tensors, on the device; work that is launched from here on finds them there."""
        shapes = {name: (span.shape, span.dtype) for name, span in spans.items()}
        return self.placed(shapes, [Place(span, name, 0) for name, span in spans.items()])

    def placed(
        self, shapes: Mapping[str, tuple[Sequence[int], torch.dtype]], places: Sequence[Place]
    ) -> dict[str, Tensor]:
        """Tensors of these shapes and types, put together from ``places``, which are all there is in them."""
        with self._lock, torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            found = {n: torch.empty(tuple(x), dtype=dtype, device=self.device) for n, (x, dtype) in shapes.items()}
            pieces = []
            for span, name, start in places:
                if span.bytes:
                    first = start * span.dtype.itemsize
                    flat = found[name].view(-1).view(torch.uint8)[first : first + span.bytes]
                    pieces += [
                        _Piece(span.file, span.start + at, flat[at : at + PIECE]) for at in range(0, span.bytes, PIECE)
                    ]
            with ExitStack() as stack:
                files = dict.fromkeys(piece.file for piece in pieces)
                self._fill(pieces, {file: _opened(file, stack) for file in files})
        if self._stream is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self._stream)
            for tensor in found.values():
                tensor.record_stream(now)
        return found

    def _fill(self, pieces: Sequence[_Piece], descriptors: Mapping[Path, int]) -> None:
        if not self._buffers:
            self._buffers = [torch.empty(BUFFER, dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(2)]
        copied: list[Callable[[], Any]] = [lambda: None, lambda: None]
        for number, some in enumerate(_loads(pieces)):
            copied[number % 2]()
            parts = [self._buffers[number % 2][start : start + len(piece.into)] for start, piece in some]
            reading = [
                self._pool.submit(_read, descriptors[piece.file], piece.start, part.numpy().data)
                for (_, piece), part in zip(some, parts, strict=True)
            ]
            for (_, piece), part, future in zip(some, parts, reading, strict=True):
                future.result()
                piece.into.copy_(part, non_blocking=True)
            if self._on_gpu:
                event = torch.cuda.Event()
                event.record()
                copied[number % 2] = event.synchronize
        for wait in copied:  # the buffers are free again
            wait()


def _loads(pieces: Sequence[_Piece]) -> Iterator[list[tuple[int, _Piece]]]:
    """As many pieces as a buffer holds, each with its place there."""
    load: list[tuple[int, _Piece]] = []
    end = 0
    for piece in pieces:
        if end + len(piece.into) > BUFFER:
            yield load
            load, end = [], 0
        load.append((end, piece))
        end += -(-len(piece.into) // ALIGNMENT) * ALIGNMENT
    if load:
        yield load


def _opened(file: Path, stack: ExitStack) -> int:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror})") from error
    stack.callback(os.close, descriptor)
    return descriptor


def _read(descriptor: int, start: int, into: memoryview) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], start + done)
        if not count:
            raise UserError("a file became shorter while it was read: copy the checkpoint again")
        done += count


@cache
def upload_to(device: torch.device) -> Upload:
    """The one upload of a device."""
    return Upload(device)
