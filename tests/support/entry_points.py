"""The entry points of an installed gemq, for programs that run from the source tree."""

from __future__ import annotations

import tomllib
from pathlib import Path

import gemq

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def write_entry_points(directory: Path) -> Path:
    """Writes what an installer writes of gemq beside its code, into a directory of the search path; returns it."""
    entry_points = tomllib.loads(PROJECT.read_text())["project"]["entry-points"]
    info = directory / f"gemq-{gemq.__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: gemq\nVersion: {gemq.__version__}\n")
    lines = []
    for group, entries in entry_points.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return directory
