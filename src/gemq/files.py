"""Files that are whole or absent: written beside their place, flushed to disk, then renamed.

Every file that a job may be killed over goes through here. Knows nothing of what the files mean.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemq.errors import UserError


def write_json(path: Path, value: Any) -> None:
    """Writes plain values as indented JSON, atomically. Raises UserError when the disk does not take it."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text, atomically. Raises UserError when the disk does not take it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically. Raises UserError when the disk does not take it."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=metadata)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` when the block ends well, and vanishes when it does not."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            flush_to_disk(temporary)
            os.replace(temporary, path)
            flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Waits until a file's contents, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals to write ``path`` into one line that says what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise _explain(error.errno, str(path), error.strerror or str(error)) from error
    except SafetensorError as error:  # hides the OSError, but not its number
        match = re.search(r"os error (\d+)", str(error))
        code = int(match.group(1)) if match else None
        raise _explain(code, str(path), os.strerror(code) if code else str(error)) from error


def _explain(code: int | None, path: str, text: str) -> UserError:
    if code in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk is full while writing {path}: free some space or name another disk; "
            "gemq quantize then goes on with --resume"
        )
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"cannot write {path}: it is read-only here; name a directory that you may write to")
    return UserError(f"cannot write {path} ({text}): name another directory")


def check_writable(path: Path) -> None:
    """Refuses a path, there or not, below whose nearest existing directory nothing can be made."""
    with disk_errors(path):
        os.rmdir(tempfile.mkdtemp(prefix=".gemq-", dir=_existing(path.parent)))


def check_free_space(directory: Path, needed: int) -> None:
    """Refuses when the disk that holds ``directory`` has fewer than ``needed`` bytes free."""
    free = shutil.disk_usage(_existing(directory)).free
    if free < needed:
        raise UserError(
            f"{directory} needs about {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free: "
            "free some space or name another disk"
        )


def _existing(path: Path) -> Path:
    """``path``, or its nearest parent that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
