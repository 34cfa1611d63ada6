"""Rows of a benchmark's CSV: what a machine and a checkout are called, appending and reading.

Several processes may append to one file. Must not import what is measured.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

import gemq

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """Short hash of the checkout, ``+`` if it has changes. A copy without git takes it from ``GEMQ_COMMIT``."""
    if revision := os.environ.get("GEMQ_COMMIT"):
        return revision
    git = ["git", "-C", str(RESULTS)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return head.stdout.strip() + ("+" if changes.stdout else "") if head.returncode == 0 else ""


def environment(device: str = "auto") -> dict[str, str]:
    """The columns that tell where a row was measured. ``device`` "cpu" is the CPU, GPU or not."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = ""
    on_gpu = torch.cuda.is_available() and device != "cpu"
    threads = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else threads,
        "torch": torch.__version__,
        "triton": triton,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def code_digest() -> str:
    """Short digest of the Python files of gemq. Unlike a commit it knows every change, and needs no git."""
    sources = Path(gemq.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(sources.rglob("*.py")):
        digest.update(f"{file.relative_to(sources)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:8]


@contextmanager
def locked(path: Path) -> Iterator[Path]:
    """Holds the lock of a directory, or of a file that is created if it is absent. Waits for other processes.

    The kernel releases the lock when the process ends, even if it is killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that holds {path}", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield path
    finally:
        os.close(descriptor)


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a row, floats with four significant digits. Several processes may append to one file.

    A file that lacks one of its columns is first written anew, with that column empty in older rows.
    """
    cells = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    # The lock is the directory's: the file itself may be replaced, and no lock file stays next to it.
    with locked(path.parent):
        header = _header(path)
        if missing := [column for column in cells if column not in header]:
            old = read(path) if header else []
            header = list(cells) + [column for column in header if column not in cells]
            _write(path, header, old)
            if old:
                print(f"{path}: new columns {', '.join(missing)}, empty in {len(old)} older rows", flush=True)
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, header, restval="", lineterminator="\n").writerow(cells)


def read(path: Path) -> list[dict[str, str]]:
    """All rows, oldest first."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, restval=""))


def _header(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def _write(path: Path, header: list[str], rows: list[dict[str, str]]) -> None:
    """Writes beside the file and renames, so that a kill loses no measured row."""
    new_file = path.with_name(path.name + ".new")
    with new_file.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(new_file, path)
