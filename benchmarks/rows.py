"""Rows of ``results/accuracy.csv``: which row of a name counts, and the text form of an allocation.

Knows nothing of models or of what another column means.
"""

from __future__ import annotations

from collections.abc import Sequence


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
