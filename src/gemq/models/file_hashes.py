"""SHA-256 of a checkpoint's files, computed by threads that can start before heavy imports. Must not import torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gemq.errors import UserError
from gemq.runtime.safetensors_files import weight_files

CHUNK_BYTES = 1 << 23
"""Bytes that a thread reads between two checks whether it should stop."""

MAX_THREADS = 16


def start_hashing(directory: Path) -> None:
    """Starts to hash a checkpoint, for a later call of ``file_digests``. Ignores directories without one."""
    try:
        files = _checkpoint_files(directory)
    except UserError:  # the job itself will raise it again
        return
    hasher = _FileHasher()
    _background.append(hasher)
    for path in files.values():
        hasher.digest(path, path.stat())


def stop_hashing() -> None:
    """Stops all background hashing."""
    while _background:
        _background.pop().close()


def file_digests(directory: Path, previous: Mapping[str, Sequence[Any]] | None = None) -> dict[str, list[Any]]:
    """Returns size, time of the last change in nanoseconds, and digest of each file of a checkpoint, by name.

    Args:
        directory: the checkpoint
        previous: an earlier result. Files with the same size and time are not read again.
    """
    hasher = _background[-1] if _background else _FileHasher()
    try:
        records: dict[str, list[Any]] = {}
        pending: dict[str, Future[str]] = {}
        for name, path in _checkpoint_files(directory).items():
            stat = path.stat()
            records[name] = list((previous or {}).get(name, ()))
            if records[name][:2] != [stat.st_size, stat.st_mtime_ns]:
                records[name] = [stat.st_size, stat.st_mtime_ns]
                pending[name] = hasher.digest(path, stat)
        for name, digest in pending.items():
            records[name].append(digest.result())
        return records
    finally:
        if hasher not in _background:
            hasher.close()


def _checkpoint_files(directory: Path) -> dict[str, Path]:
    """Returns weights, configuration and tokenizer files by relative path.

    Raises:
        UserError: weights are missing
    """
    files = list(weight_files(directory))
    for pattern in ("tokenizer*", "config.json"):
        files += [path for path in directory.glob(pattern) if path.is_file()]
    return {str(path.relative_to(directory)): path for path in sorted(files)}


class _FileHasher:
    """Threads that hash files. Each file is hashed once."""

    def __init__(self) -> None:
        num_threads = min(MAX_THREADS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="gemq-digests")
        self._digests: dict[tuple[str, int, int], Future[str]] = {}
        self._closed = False

    def digest(self, path: Path, stat: os.stat_result) -> Future[str]:
        """Returns the future digest of a file in its current state, which ``stat`` describes."""
        key = os.path.realpath(path), stat.st_size, stat.st_mtime_ns
        if key not in self._digests:
            self._digests[key] = self._pool.submit(self._read, path)
        return self._digests[key]

    def close(self) -> None:
        """Stops all threads."""
        self._closed = True
        self._pool.shutdown(cancel_futures=True)

    def _read(self, path: Path) -> str:
        """Hashes a file, until the hasher is closed."""
        digest = hashlib.sha256()
        chunk = bytearray(CHUNK_BYTES)
        with path.open("rb", buffering=0) as file:
            while not self._closed and (count := file.readinto(chunk)):
                digest.update(memoryview(chunk)[:count])
        return digest.hexdigest()


_background: list[_FileHasher] = []
"""Hashers started by ``start_hashing``."""
