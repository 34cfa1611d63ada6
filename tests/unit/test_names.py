"""Names in the code are nouns or verbs, not pronouns and fillers. See "Style" in ``CONTRIBUTING.md``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILLERS = frozenset(
    [
        "after",
        "alike",
        "among",
        "at",
        "before",
        "beside",
        "both",
        "each",
        "every",
        "found",
        "given",
        "held",
        "here",
        "kept",
        "known",
        "least",
        "made",
        "mine",
        "more",
        "most",
        "now",
        "one",
        "other",
        "own",
        "part",
        "parts",
        "place",
        "places",
        "rest",
        "some",
        "stuff",
        "taken",
        "there",
        "things",
        "told",
        "wanted",
        "whole",
    ]
)
"""Words that do not say what a value is. ``first`` is not among them: as a flag or an index it does."""


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that the code of ``tree`` defines, with its line: variables, parameters, attributes, functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.arg) and node.arg != "other":  # the second operand of an operator
            yield node.arg, node.lineno
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node.lineno


def is_filler(name: str) -> bool:
    """Return whether a name says nothing about its value."""
    word = name.strip("_").lower()
    return word in FILLERS or word.startswith("of_")


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks"])
def test_no_name_is_a_filler(folder: str):
    offenders = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name, line in names(ast.parse(path.read_text(encoding="utf-8")))
        if is_filler(name)
    ]
    assert not offenders, "\n".join(offenders)


def test_fillers_are_seen_wherever_a_name_is_defined():
    code = "def each(own, *, of_x): self.rest = [found for found in own]"
    assert {name for name, _ in names(ast.parse(code)) if is_filler(name)} == {"each", "own", "of_x", "rest", "found"}
