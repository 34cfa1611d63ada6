"""Values of a recipe as people write them, in YAML, on the command line or in Python. Imports no torch."""

from __future__ import annotations

import math
import numbers
import os
import re
from pathlib import Path
from typing import Any

import yaml

from gemq.errors import UserError, shown
from gemq.quant.widths import parse_width
from gemq.runtime.files import read_input

MAX_YAML_BYTES = 1 << 17
"""Upper bound for a recipe file: PyYAML needs a second for some 100 kB."""

MAX_YAML_DEPTH = 8
"""Upper bound for lists within lists. A recipe has two levels."""

MAX_SEED = 2**62
"""Upper bound for a seed: what is added to it must stay within 64 bits."""


def parse_size(text: str) -> int:
    """Bytes from ``12GB``, ``800 MB`` or ``1.5e9``. GB is 1e9 bytes. Raises UserError when it is none of these."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kMGT]?)B?\s*", text, re.IGNORECASE)
    try:
        number = float(match.group(1)) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or not 0 < number < math.inf:
        raise UserError(f"{shown(text)} is not a size: write it like 12GB or 800MB")
    return int(number * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[match.group(2).upper()])


def read_yaml(path: Path, hint: str) -> Any:
    """The contents of a small YAML file, without aliases, repeated keys or deep nesting.

    Args:
        path: the file
        hint: what to give instead, for the message

    Raises:
        UserError: the file cannot be read, is too large, or is not such YAML.
    """
    try:
        text = read_input(path, MAX_YAML_BYTES).decode()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"cannot read recipe {path} ({reason}): give {hint}") from error
    try:
        return yaml.load(text, _PlainLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not valid YAML ({line[:200]}): write lines such as 'bits: 2.0'") from error


class _PlainLoader(yaml.SafeLoader):
    """Refuses what a recipe does not need, and what makes a short file large."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias, such as *name: write the value itself")
        self._depth += 1
        if self._depth > MAX_YAML_DEPTH:
            raise yaml.YAMLError(f"it is nested deeper than {MAX_YAML_DEPTH} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise yaml.YAMLError(f"it has the key {shown(repeated)} twice")
        return super().construct_mapping(node, deep)


def convert(key: str, value: Any, kind: str, origin: str) -> Any:
    """A value as the type that a field's annotation names. Raises UserError for a value of another kind.

    Args:
        key: name of the field
        value: as it was written
        kind: the annotation, such as ``tuple[Width, ...] | None``
        origin: where the value was written, for the message
    """
    if value is None and "None" in kind:
        return None
    try:
        if kind.startswith("tuple[str"):
            return tuple(_text(v) for v in _items(value, split=False))
        if kind.startswith("tuple[Width"):
            return tuple(parse_width(v) for v in _items(value))
        if kind.startswith("tuple[float"):
            return tuple(_number(v) for v in _items(value))
        if kind.startswith("bool"):
            if not isinstance(value, bool):
                raise TypeError
            return value
        if kind.startswith("int"):
            return parse_size(value) if key == "size" and isinstance(value, str) else _integer(value)
        if kind.startswith("float"):
            return _number(value)
        return _text(value)
    except UserError:
        raise
    except (OverflowError, TypeError, ValueError) as error:
        plain = f"a value of type {kind.split('|')[0].strip()}"
        if kind.startswith("tuple"):
            plain = "budgets such as 3.0,2.5,2.0" if key == "progressive" else "a value, or a list of values"
        raise UserError(f"{origin}: {key} cannot be {shown(value)}: it takes {plain}") from error


def _items(value: Any, split: bool = True) -> list[Any]:
    """The items of a list; a single value is a list of one. ``split``: texts hold items between commas."""
    if isinstance(value, str) and split:
        return list(value.split(","))
    return list(value) if isinstance(value, list | tuple) else [value]


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | os.PathLike | int):
        raise TypeError
    text = str(value)
    if "\0" in text:
        raise ValueError
    return text


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
        raise TypeError
    return float(value)


def _integer(value: Any) -> int:
    """A whole number, exactly, however it was written: 64, 64.0 or "64"."""
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]+\s*", value):
        return int(value)
    if not isinstance(value, numbers.Integral) and not _number(value).is_integer():
        raise TypeError
    return int(value) if not isinstance(value, str) else int(float(value))
