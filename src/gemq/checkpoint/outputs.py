"""Checks and locks an output directory before a job writes it.

A checkpoint appears by one rename at the end of a job, possibly after hours. What could prevent that is detected at the
start.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemq.checkpoint.format import is_packed
from gemq.errors import UserError
from gemq.runtime.files import disk_errors, lock_file, real_path


def check_output(out: Path, *, resume: bool) -> bool:
    """Checks that an output does not exist, or may be the job's own if it is resumed.

    Returns:
        Whether the output is a packed checkpoint. The caller must check that it is the job's own.

    Raises:
        UserError: the output exists and the job may not replace it.
    """
    path = real_path(out)
    with disk_errors(out):
        is_occupied = path.exists() and (not path.is_dir() or any(path.iterdir()))
        if not is_occupied and path.exists() and os.path.samefile(path, "."):
            raise UserError(f"{out} is the current directory, which cannot be replaced: name a new directory")
    if not is_occupied:
        return False
    if not (resume and is_packed(out)):
        raise UserError(f"{out} exists: name another output, or delete it first")
    return True


def check_not_nested(out: Path, work: Path, advice: str) -> None:
    """Raises UserError, ending with ``advice``, if the output and the work directory are nested."""
    out_path = real_path(out)
    work_path = real_path(work)
    if out_path == work_path or out_path in work_path.parents or work_path in out_path.parents:
        raise UserError(f"one of {out} and the work directory {work} contains the other: {advice}")


def default_work_directory(out: Path) -> Path:
    """Returns the work directory of an output if none is named: next to it."""
    named = out if out.name not in ("", "..") else real_path(out)
    return named.parent / f"{named.name}.work"


def partial_directory(out: Path) -> Path:
    """Returns the directory to which a checkpoint is written before it is renamed to ``out``."""
    return out.with_name(f".{out.name}.partial")


@contextmanager
def lock_output(out: Path) -> Iterator[None]:
    """Locks an output for this job, and tries to put a new directory in its place, as the end of the job will.

    The lock is a file next to the output. It is removed at the end of the context, and the kernel releases it if the
    process dies.

    Raises:
        UserError: another job has locked the output, or it cannot be written or replaced.
    """
    path = real_path(out)
    if not path.name:
        raise UserError(f"{out} exists: name another output")
    new_parents = [parent for parent in path.parents if not parent.exists()]
    lock = _lock_path(path)
    descriptor: int | None = None
    try:
        with disk_errors(out):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _lock(lock)
            if descriptor is None:
                raise UserError(f"another gemq process writes {out}: wait for it, or name another output")
            _try_to_replace(out, path)
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                lock.unlink()
            os.close(descriptor)
        for parent in new_parents:  # these are empty if the job wrote nothing
            with contextlib.suppress(OSError):
                parent.rmdir()


def remove_stale_lock(out: Path) -> None:
    """Removes the lock of a job that was killed after its output appeared, unless a process holds the lock."""
    lock = _lock_path(real_path(out))
    with contextlib.suppress(OSError, UserError):
        if not lock.exists():
            return
        descriptor = _lock(lock)
        if descriptor is not None:
            lock.unlink()
            os.close(descriptor)


def _lock_path(path: Path) -> Path:
    """Returns the lock file of an output."""
    return path.with_name(f".{path.name}.gemq-lock")


def _lock(path: Path) -> int | None:
    """Locks a file that its holder deletes. Returns its descriptor, or None if another process holds the lock.

    The holder may delete the file between opening and locking, so the locked file must still be the one at ``path``.
    """
    while True:
        descriptor = lock_file(path)
        if descriptor is None:
            return None
        status = os.fstat(descriptor)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(status, os.lstat(path)) and not status.st_size:
                return descriptor
        os.close(descriptor)
        if status.st_size:
            raise UserError(f"{path} is in the way and is not gemq's: move it away, or name another output")


def _try_to_replace(out: Path, path: Path) -> None:
    """Creates the partial directory. If ``path`` is an empty directory, renames the partial directory to it."""
    partial = partial_directory(path)
    remove_partial(partial)
    partial.mkdir()
    if not path.exists() or any(path.iterdir()):
        partial.rmdir()
        return
    try:
        partial.rename(path)
    except OSError as error:
        partial.rmdir()
        raise UserError(
            f"{out} is a mount point or cannot be replaced ({error.strerror}), and a checkpoint appears as a whole: "
            f"name a directory in it, such as {out / 'model'}"
        ) from error


def remove_partial(partial: Path) -> None:
    """Removes the partial checkpoint of a killed job. Call this only while the output is locked."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise UserError(f"{partial} is in the way and is no directory of gemq's: move it away, or name another output")
    if partial.exists():
        shutil.rmtree(partial)
