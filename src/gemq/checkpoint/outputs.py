"""An output directory before it is written: whether it can be, and that no other job writes it meanwhile.

A checkpoint appears by one rename, after hours. Whatever could be in its way then is found at the start.
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
    """Raises UserError for an output that is there already; a resumed job may find its own.

    Returns whether there is a packed checkpoint, which the caller has to recognise.
    """
    place = real_path(out)
    with disk_errors(out):
        taken = place.exists() and (not place.is_dir() or any(place.iterdir()))
        if not taken and place.exists() and os.path.samefile(place, "."):
            raise UserError(f"{out} is the current directory, which cannot be replaced: name a new directory")
    if not taken:
        return False
    if not (resume and is_packed(out)):
        raise UserError(f"{out} exists: name another output, or delete it first")
    return True


def check_apart(out: Path, work: Path, advice: str) -> None:
    """Raises UserError, with ``advice``, when one of the two directories lies in the other."""
    a, b = real_path(out), real_path(work)
    if a == b or a in b.parents or b in a.parents:
        raise UserError(f"{out} and the work directory {work} lie in each other: {advice}")


def default_work(out: Path) -> Path:
    """The work directory of an output if none is named: next to it."""
    named = out if out.name not in ("", "..") else real_path(out)
    return named.parent / f"{named.name}.work"


def partial_directory(out: Path) -> Path:
    """Where a checkpoint is written before it becomes ``out``."""
    return out.with_name(f".{out.name}.partial")


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Keeps an output for this job, and tries what its last step will do: put a new directory in its place.

    The lock is a file next to the output that goes away with the block. The kernel releases it if the process dies.

    Raises:
        UserError: another job has claimed the output, or it cannot be written or replaced.
    """
    place = real_path(out)
    if not place.name:
        raise UserError(f"{out} exists: name another output")
    parents = [parent for parent in place.parents if not parent.exists()]
    lock = _lock_path(place)
    descriptor: int | None = None
    try:
        with disk_errors(out):
            place.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _lock(lock)
            if descriptor is None:
                raise UserError(f"another gemq process writes {out}: wait for it, or name another output")
            _try_to_replace(out, place)
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                lock.unlink()
            os.close(descriptor)
        for parent in parents:  # of a job that wrote nothing
            with contextlib.suppress(OSError):
                parent.rmdir()


def remove_stale_lock(out: Path) -> None:
    """Removes the lock of a job that was killed after its output appeared. A lock that a process holds stays."""
    lock = _lock_path(real_path(out))
    with contextlib.suppress(OSError, UserError):
        if lock.exists() and (descriptor := _lock(lock)) is not None:
            lock.unlink()
            os.close(descriptor)


def _lock_path(place: Path) -> Path:
    return place.with_name(f".{place.name}.gemq-lock")


def _lock(path: Path) -> int | None:
    """Locks an empty file that its holder deletes: what is locked must still be what the path names."""
    while (descriptor := lock_file(path)) is not None:
        found = os.fstat(descriptor)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(found, os.lstat(path)) and not found.st_size:
                return descriptor
        os.close(descriptor)
        if found.st_size:
            raise UserError(f"{path} is in the way and is not gemq's: move it away, or name another output")
    return None


def _try_to_replace(out: Path, place: Path) -> None:
    """Makes the directory that a checkpoint is written to, and puts it in the place of an empty output."""
    partial = partial_directory(place)
    remove_partial(partial)
    partial.mkdir()
    if not place.exists() or any(place.iterdir()):
        partial.rmdir()
        return
    try:
        partial.rename(place)  # an empty directory in the way is replaced
    except OSError as error:
        partial.rmdir()
        raise UserError(
            f"{out} is a mount point or cannot be replaced ({error.strerror}), and a checkpoint appears as a whole: "
            f"name a directory in it, such as {out / 'model'}"
        ) from error


def remove_partial(partial: Path) -> None:
    """Removes what a killed job has left of a checkpoint. Call only while the output is claimed."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise UserError(f"{partial} is in the way and is no directory of gemq's: move it away, or name another output")
    if partial.exists():
        shutil.rmtree(partial)
