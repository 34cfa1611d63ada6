"""Rows of a benchmark's CSV: what a machine and a checkout are called, and appending."""

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
    if given := os.environ.get("GEMQ_COMMIT"):
        return given
    git = ["git", "-C", str(RESULTS)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return head.stdout.strip() + ("+" if changes.stdout else "") if head.returncode == 0 else ""


def environment() -> dict[str, str]:
    """The columns that tell where a row was measured."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = ""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": triton,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def append(file: Path, row: dict[str, Any]) -> None:
    """One more row; the header comes with the first. Numbers get four significant digits."""
    cells = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(cells), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(cells)
