"""Atomic files: written under a temporary name in the same directory, flushed to disk, then renamed.

A job that is killed leaves complete files only. Temporary files and locks are created anew and never opened through a
link, since a directory may come from somebody else. Must not import what gives files their meaning.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemq.errors import UserError


def write_json(path: Path, value: Any) -> None:
    """Write plain values as indented JSON, atomically. Raises UserError if that fails."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, atomically. Raises UserError if that fails."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, atomically. Raises UserError if that fails."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_host, temporary, metadata=metadata)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new temporary file that replaces ``path`` when the block ends, and is deleted when the block raises."""
    temporary: Path | None = None
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary, mode = _new_temporary(path)
            yield temporary
            temporary.chmod(mode)  # safetensors replaces it by a file that only its owner can read
            flush_to_disk(temporary)
            os.replace(temporary, path)
            flush_to_disk(path.parent)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _new_temporary(path: Path) -> tuple[Path, int]:
    """Create an empty file next to ``path`` and return it with its mode. Existing files are not touched."""
    usual_name = f".{path.name}.tmp"
    random_names = (f".{path.name}.{secrets.token_hex(4)}.tmp" for _ in range(100))
    for name in itertools.chain([usual_name], random_names):
        temporary = path.with_name(name)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        except FileExistsError:
            continue
        try:
            return temporary, stat.S_IMODE(os.fstat(descriptor).st_mode)
        finally:
            os.close(descriptor)
    raise OSError(errno.EEXIST, f"{usual_name} is there already", str(path))


def is_temporary(name: str) -> bool:
    """Whether a file of this name may be a temporary file of gemq or safetensors, which a killed job left."""
    return re.fullmatch(r"\..+\.tmp|\.tmp[A-Za-z0-9]{6}", name) is not None


def lock_file(path: Path) -> int | None:
    """Lock ``path``, which is created if it is absent, without changing its contents.

    The kernel releases the lock when the process ends, even if it is killed.

    Returns:
        The descriptor that holds the lock, or None if another process holds it.

    Raises:
        OSError: the file cannot be created or locked, is a link, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def real_path(path: Path) -> Path:
    """Return ``path`` without links and dots. Raises UserError if it cannot be a path, such as a circle of links."""
    try:
        real = path.resolve()
        real.exists()  # raises if a name is too long
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{str(path)[:80]!r} cannot be used as a path ({reason}): name another") from error
    return real


def read_input(path: Path, limit: int) -> bytes:
    """Return the contents of a small file that the user names.

    Raises:
        OSError: the file cannot be read, is larger than ``limit`` bytes, or is not a regular file (a pipe may
            never end).
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            reason = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file: save it to one first"
            raise OSError(errno.EINVAL, reason, str(path))
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"{status.st_size:,} bytes, more than {limit:,}", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's contents, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the operating system while writing ``path`` into a UserError that says what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise _explain(error.errno, str(path), error.strerror or str(error)) from error
    except SafetensorError as error:  # contains the number of the OSError, but no OSError
        match = re.search(r"os error (\d+)", str(error))
        code = int(match.group(1)) if match else None
        raise _explain(code, str(path), os.strerror(code) if code else str(error)) from error


def _explain(code: int | None, path: str, text: str) -> UserError:
    """Return the error for a file that cannot be written. ``code``: an errno, if known; ``text``: its description."""
    if code in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk is full while writing {path}: free some space or name another disk; "
            "gemq quantize then continues with --resume"
        )
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"cannot write {path}: it is read-only here; name a directory that you may write to")
    return UserError(f"cannot write {path} ({text}): name another directory")


def check_writable(path: Path) -> None:
    """Raise UserError if ``path``, which need not exist, cannot be created in its nearest existing directory."""
    with disk_errors(path):
        os.rmdir(tempfile.mkdtemp(prefix=".gemq-", dir=_nearest_existing(path.parent)))


def check_free_space(directory: Path, needed: int) -> None:
    """Raise UserError if the disk of ``directory`` has fewer than ``needed`` bytes free."""
    free = free_space(directory)
    if free < needed:
        raise UserError(
            f"{directory} needs about {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free: "
            "free some space or name another disk"
        )


def free_space(path: Path) -> int:
    """Return the bytes that are free on the disk of ``path``, which need not exist yet."""
    return shutil.disk_usage(_nearest_existing(path)).free


def _nearest_existing(path: Path) -> Path:
    """Return ``path``, or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
