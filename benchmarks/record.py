"""Rows of a benchmark's CSV: what a machine and a checkout are called, appending and reading.

Knows nothing of what is measured.
"""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

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


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a row, floats with four significant digits.

    A file that lacks one of its columns is first written anew, with that column empty in older rows.
    """
    cells = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
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
