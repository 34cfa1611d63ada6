"""Families of rows of ``results/accuracy.csv``: how they are called in tables, and how they look in figures.

Must not import what measures or draws.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

ORANGE, BLUE, GREY, GREEN, PURPLE, PINK = "#c2410c", "#0f6ab4", "#6b7280", "#0d8a6f", "#7c3aed", "#be185d"
DARK, LIGHT = "#1f2937", "#e5e7eb"


@dataclass(frozen=True)
class Family:
    """Rows that differ in their budget alone: ``pattern`` matches their names and holds the budget as its group.

    ``title`` is their name in the table. ``label`` is their name in the figure; without one they are not drawn.
    """

    pattern: str
    title: str
    label: str = ""
    colour: str = DARK
    line: str = "-"


def _families() -> Iterator[Family]:
    """All families, in the order in which they are drawn."""
    yield Family("gemq B", "**gemq {}**", "gemq", ORANGE)
    yield Family("self only B", "gemq {} without any text")
    yield Family("low B", "gemq {} at `--effort low`")
    yield Family("gemq B high", "gemq {} at `--effort high`")
    yield Family("assembled B(?: default)?", "gemq {} assembled (`export`)")
    for method, colour in {"uniform": BLUE, "random": GREY, "frequency": GREEN, "layerwise": PURPLE}.items():
        for treatment, line in {"treated": "-", "plain": "--"}.items():
            label = f"{treatment} {method}"
            yield Family(f"{label} B", f"{label} {{}}", label, colour, line)
        yield Family(f"assembled B {method}", f"{method} {{}} assembled")
    yield Family("paper B", "paper's recipe {}", "paper's recipe", PINK, "-.")


FAMILIES = tuple(_families())


def is_score_ablation(name: str) -> bool:
    """The ``scores`` set compares ways to score among themselves, in the lab log; its methods count here."""
    return name.startswith("assembled ") and family_and_budget(name) is None


def family_and_budget(name: str) -> tuple[Family, str] | None:
    """The family of a row and its budget, by the row's name; None for a row of no family."""
    for family in FAMILIES:
        if match := re.fullmatch(family.pattern.replace("B", r"(\d(?:\.\d+)?)"), name):
            return family, match[1]
    return None


def row_title(name: str) -> str:
    """The name of a row in the tables."""
    match = family_and_budget(name)
    return match[0].title.format(match[1]) if match else name
