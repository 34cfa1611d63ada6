"""The CSV files of measured rows: appending, reading, and which row of a name counts.

Knows nothing of models or of what a column means, but for ``name``, ``model`` and the text form of an allocation.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a row. A file that lacks one of its columns is first written anew, with that column empty in older rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = _header(path)
    if missing := [column for column in row if column not in header]:
        old = read(path) if header else []
        header = list(row) + [column for column in header if column not in row]
        _write(path, header, old)
        if old:
            print(f"{path}: new columns {', '.join(missing)}, empty in {len(old)} older rows", flush=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, header, restval="").writerow(row)


def read(path: Path) -> list[dict[str, str]]:
    """All rows, oldest first."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, restval=""))


def newest(rows: list[dict[str, str]]) -> dict[str, dict[str, dict[str, str]]]:
    """By model and name, the last row. Names with a label in brackets are experiments on the side, and left out."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        if "(" not in row["name"]:
            found.setdefault(row["model"], {})[row["name"]] = row
    return found


def allocation_text(by_layer: Sequence[Sequence[float]]) -> str:
    """Widths by layer and expert as one string: ``1 1.6 2/2 2 3`` is two layers of three experts."""
    return "/".join(" ".join(f"{width:g}" for width in layer) for layer in by_layer)


def allocation_widths(text: str) -> list[list[float]]:
    """What ``allocation_text`` wrote."""
    return [[float(width) for width in layer.split()] for layer in text.split("/")]


def _header(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def _write(path: Path, header: list[str], rows: list[dict[str, str]]) -> None:
    """Writes beside the file and renames, so that a kill loses no measured row."""
    beside = path.with_name(path.name + ".new")
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header, restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, path)
