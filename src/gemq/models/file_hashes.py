"""SHA-256 of a checkpoint's files, by threads that may begin before anything else is imported. Imports no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gemq.errors import UserError
from gemq.runtime.processes import block_sigterm
from gemq.runtime.safetensors_files import weight_files

CHUNK = 1 << 23
"""Bytes that a thread reads before it looks whether it shall go on."""


def begin(directory: Path) -> None:
    """Starts to read a checkpoint of which ``file_digests`` will be asked. Nothing happens where there is none."""
    try:
        files = _files_of(directory)
    except UserError:  # the job that follows tells the user
        return
    _ahead.append(_Reading())
    for path in files.values():
        _ahead[-1].digest(path, path.stat())


def end() -> None:
    """Reads no further what has begun."""
    while _ahead:
        _ahead.pop().close()


def file_digests(directory: Path, known: Mapping[str, Sequence[Any]] | None = None) -> dict[str, list[Any]]:
    """For each file of a checkpoint its size, the nanosecond of its last change and its digest, by name.

    known: what this gave before: a file of the same size and time is not read again
    """
    reading = _ahead[-1] if _ahead else _Reading()
    try:
        found: dict[str, list[Any]] = {}
        waiting: dict[str, Future[str]] = {}
        for name, path in _files_of(directory).items():
            stat = path.stat()
            found[name] = list((known or {}).get(name, ()))
            if found[name][:2] != [stat.st_size, stat.st_mtime_ns]:
                found[name] = [stat.st_size, stat.st_mtime_ns]
                waiting[name] = reading.digest(path, stat)
        for name, digest in waiting.items():
            found[name].append(digest.result())
        return found
    finally:
        if reading not in _ahead:
            reading.close()


def _files_of(directory: Path) -> dict[str, Path]:
    """Weights, configuration and tokenizer, by relative path. Raises UserError where weights are missing."""
    others = [path for name in ("tokenizer*", "config.json") for path in directory.glob(name) if path.is_file()]
    return {str(path.relative_to(directory)): path for path in sorted([*weight_files(directory), *others])}


class _Reading:
    """Threads, and the files that they have begun to read."""

    def __init__(self) -> None:
        threads = min(16, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="gemq-digests", initializer=block_sigterm)
        self._begun: dict[tuple[str, int, int], Future[str]] = {}
        self._closed = False

    def digest(self, path: Path, stat: os.stat_result) -> Future[str]:
        """That of the file as it is now, which ``stat`` tells."""
        key = os.path.realpath(path), stat.st_size, stat.st_mtime_ns
        if key not in self._begun:
            self._begun[key] = self._pool.submit(self._read, path)
        return self._begun[key]

    def close(self) -> None:
        self._closed = True
        self._pool.shutdown(cancel_futures=True)

    def _read(self, path: Path) -> str:
        whole = hashlib.sha256()
        chunk = bytearray(CHUNK)
        with path.open("rb", buffering=0) as file:
            while not self._closed and (read := file.readinto(chunk)):
                whole.update(memoryview(chunk)[:read])
        return whole.hexdigest()


_ahead: list[_Reading] = []
