"""Rows of ``results/accuracy.csv``: which row of a name counts, and the text form of an allocation.

Must not import what measures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gemq.quant.widths import ExpertWidths


def newest(rows: list[dict[str, str]]) -> dict[str, dict[str, dict[str, str]]]:
    """By model and name, the last row. Names with a label in brackets are experiments on the side, and left out."""
    last_rows: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        if "(" not in row["name"]:
            last_rows.setdefault(row["model"], {})[row["name"]] = row
    return last_rows


def allocation_text(by_layer: Sequence[Sequence[ExpertWidths]]) -> str:
    """Widths by layer and expert as one string: ``1 1.6+2 2/2 2 3`` is two layers of three experts, one of which has
    1.6 bits for gate and up and 2 for down."""
    name = lambda first, down: f"{first}" if first == down else f"{first}+{down}"
    return "/".join(" ".join(name(*expert) for expert in layer) for layer in by_layer)


def allocation_widths(text: str) -> list[list[tuple[float, float]]]:
    """What ``allocation_text`` wrote."""
    pairs = [[[float(w) for w in expert.split("+")] for expert in layer.split()] for layer in text.split("/")]
    return [[(widths[0], widths[-1]) for widths in layer] for layer in pairs]


def labelled(name: str, label: str) -> str:
    """The name of a row with a label in brackets, which ``newest`` leaves out. An empty label changes nothing."""
    return f"{name} ({label})" if label else name


def variant_name(model: str, seed: int, values: int) -> str:
    """The name of a model's variant with outliers: the model's with the seed, and the number of values if any."""
    return f"{model}-outliers{seed}" + (f"-values{values}" if values else "")


def variant_base(name: str) -> str | None:
    """The name of the model of which ``name`` is a variant with outliers; None for other models."""
    match = re.fullmatch(r"(.+)-outliers\d+(?:-values\d+)?", name)
    return match[1] if match else None
