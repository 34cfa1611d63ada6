"""The values of a recipe: which are allowed, and how they are converted from YAML, the command line or Python.

Must not import torch.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from gemq.errors import UserError, short_repr
from gemq.quant.widths import AnyWidth, TrellisWidth, Width
from gemq.runtime.files import read_input

MAX_YAML_BYTES = 1 << 17
"""Upper bound for a recipe file: PyYAML takes a second for 100 kB."""

MAX_YAML_DEPTH = 8
"""Upper bound for nested lists and mappings. A recipe has two levels."""

MAX_SEED = 2**62
"""Upper bound for a seed: sums with it must fit into 64 bits."""

SIZE_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
"""Bytes of the units of a size."""


CHOICES = {
    "effort": ("low", "medium", "high"),
    "codes": ("auto", "affine", "trellis"),
    "quantizer": ("gptq", "rtn"),
    "score_form": ("token", "elementwise"),
    "score_labels": ("sampled", "data"),
    "score_weights": ("candidates", "rtn"),
    "allocate": ("global", "uniform", "random", "layerwise", "frequency"),
    "allocate_by": ("matrix", "expert"),
    "dtype": ("auto", "float32", "bfloat16"),
    "distill_loss": ("kl", "next_token"),
}
"""Keys with a fixed set of values."""

UNQUANTIZED_BITS = 16
"""``dense_bits`` that leaves the dense linears in the model's own type."""

DENSE_BITS = (2, 3, 4, 8, UNQUANTIZED_BITS)
"""Widths of the dense linears."""

INTEGER_RANGES = {
    "num_windows": (1, 1_000_000),
    "micro_batch_tokens": (1, 1 << 31),
    "seed": (0, MAX_SEED),
    "total_tokens": (0, 1 << 40),
    "score_tokens": (0, 1 << 40),
    "candidate_epochs": (0, 1000),
    "reconstruction_epochs": (0, 1000),
    "distill_epochs": (0, 1000),
}
"""Bounds of integers. Upper bounds are far above useful values, and low enough to refuse a job that must fail."""

NON_NEGATIVE_KEYS = ("dampening", "hessian_shrinkage", "smoothing", "lr_candidates", "lr_codes", "lr_grids", "lr_tuned")
"""Keys of numbers from 0 up."""

MAX_NUMBER, MAX_SIZE_BYTES, MAX_GROUP_SIZE = 1e6, 10**18, 1 << 20
"""Upper bounds of those numbers, of a size in bytes, and of a group size."""


def parse_size(text: str) -> int:
    """Bytes from ``12GB``, ``800 MB`` or ``1.5e9``. GB is 1e9 bytes. Raises UserError for other texts."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kMGT]?)B?\s*", text, re.IGNORECASE)
    try:
        number = float(match.group(1)) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or not 0 < number < math.inf:
        raise UserError(f"{short_repr(text)} is not a size: write it like 12GB or 800MB")
    return int(number * SIZE_UNITS[match.group(2).upper()])


def read_keys(path: str | Path, built_in: Iterable[str]) -> dict[str, Any]:
    """The keys and values of a recipe file.

    Args:
        path: of the file.
        built_in: names of built-in recipes, for messages.

    Raises:
        UserError: the file cannot be read, or holds no keys.
    """
    values = read_yaml(Path(path), hint=f"a YAML file of lines such as 'bits: 2.0', or {', '.join(built_in)}")
    if values is None:  # an empty file
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no keys: write lines such as 'bits: 2.0'")
    return values


def read_yaml(path: Path, hint: str) -> Any:
    """Reads a small YAML file without aliases, repeated keys or deep nesting.

    Args:
        path: of the file.
        hint: what to give instead, for the message.

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
    """A safe loader that refuses what a recipe does not need, and what makes a short file expensive to read."""

    def __init__(self, stream: str):
        """``stream``: the text of the file."""
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuses aliases and deep nesting."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias, such as *name: write the value itself")
        self._depth += 1
        if self._depth > MAX_YAML_DEPTH:
            raise yaml.YAMLError(f"it is nested deeper than {MAX_YAML_DEPTH} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Refuses repeated keys."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"it has the key {short_repr(name)} twice")
        return super().construct_mapping(node, deep)


def convert(key: str, value: Any, annotation: str, origin: str) -> Any:
    """Converts a value to the type of a field.

    Args:
        key: name of the field.
        value: as it was written.
        annotation: of the field, such as ``tuple[Width, ...] | None``.
        origin: where the value was written, for the message.

    Raises:
        UserError: the value has another type.
    """
    kind, _, alternative = annotation.partition(" | ")
    if value is None and alternative == "None":
        return None
    try:
        if key == "size" and isinstance(value, str):
            return parse_size(value)
        return _CONVERTERS[kind](value)
    except UserError:
        raise
    except (OverflowError, TypeError, ValueError) as error:
        if key == "progressive":
            expected = "budgets such as 3.0,2.5,2.0"
        elif kind.startswith("tuple"):
            expected = "a value, or a list of values"
        else:
            expected = f"a value of type {kind}"
        raise UserError(f"{origin}: {key} cannot be {short_repr(value)}: it takes {expected}") from error


def convert_keys(values: dict[str, Any], types: dict[str, str], origin: str) -> dict[str, Any]:
    """Converts values to the types of their fields.

    Args:
        values: as they were written, by key.
        types: annotation of each field, by key.
        origin: where the values were written, for messages: a file, or ``flag``.

    Raises:
        UserError: a key is unknown, or a value has another type.
    """
    converted: dict[str, Any] = {}
    for key, value in values.items():
        if key not in types:
            near = difflib.get_close_matches(str(key)[:80], types, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "docs/recipe.md lists the keys"
            raise UserError(f"{origin}: unknown key {short_repr(key)}: {hint}")
        where = "--" + key.replace("_", "-") if origin == "flag" else origin
        converted[key] = convert(key, value, types[key], where)
    return converted


def read_widths(widths: Iterable[Any], codes: str) -> tuple[str, list[AnyWidth]]:
    """Reads candidate widths. Widths that only trellis codes have decide on these codes.

    Args:
        widths: numbers, or texts of them.
        codes: ``auto``, ``affine`` or ``trellis``.

    Returns:
        The codes, and the widths in their order.

    Raises:
        UserError: there is no such width of these codes.
    """
    widths = list(widths)
    if codes == "trellis":
        return codes, [TrellisWidth.read(width) for width in widths]
    try:
        return codes, [Width.read(getattr(width, "value", width)) for width in widths]
    except UserError as error:
        if codes == "affine":
            raise
        affine_error = error
    try:
        return "trellis", [TrellisWidth.read(width) for width in widths]
    except UserError:
        raise affine_error from None


def check_integer(name: str, value: int) -> None:
    """Raises UserError for an integer outside its range."""
    low, high = INTEGER_RANGES[name]
    if value < low:
        raise UserError(f"{name} cannot be {short_repr(value)}: the minimum is {low}")
    if value > high:
        raise UserError(f"{name} cannot be {short_repr(value)}: the maximum is {high}")


def check_number(name: str, value: float) -> None:
    """Raises UserError unless a number lies between 0 and the upper bound."""
    if not 0 <= value < math.inf:  # refuses NaN as well
        raise UserError(f"{name} must be a number from 0 up (it is {value})")
    if value > MAX_NUMBER:
        raise UserError(f"{name} cannot be {value:g}: the maximum is {MAX_NUMBER:g}")


def check_numbers(recipe: Any) -> None:
    """Raises UserError for numbers of a recipe that are out of range."""
    for name in INTEGER_RANGES:
        check_integer(name, getattr(recipe, name))
    for name in NON_NEGATIVE_KEYS:
        check_number(name, getattr(recipe, name))
    if recipe.seq_len is not None and recipe.seq_len < 2:
        raise UserError(f"seq_len cannot be {short_repr(recipe.seq_len)}: a window has at least 2 tokens")
    if not 0 <= recipe.val_fraction < 1:
        raise UserError(f"val_fraction must be a share from 0 up and below 1 (it is {recipe.val_fraction})")


def plain_value(value: Any) -> Any:
    """A field's value as JSON and YAML contain it."""
    if isinstance(value, tuple):
        return [plain_value(item) for item in value]
    return value.value if isinstance(value, Width | TrellisWidth) else value


def steps_to(bits: float | None, steps: tuple[float, ...]) -> tuple[float, ...]:
    """A progressive schedule with another last budget: the ``steps`` above ``bits``, then ``bits``.

    Empty without a budget in bits, or without steps above it.
    """
    if bits is None:
        return ()
    above = tuple(step for step in steps if step > bits)
    return (*above, bits) if above else ()


def _boolean(value: Any) -> bool:
    """True or False, never a number or a text that stands for one."""
    if not isinstance(value, bool):
        raise TypeError
    return value


def _text(value: Any) -> str:
    """A text, a path, or an integer as text."""
    if isinstance(value, bool) or not isinstance(value, str | os.PathLike | int):
        raise TypeError
    text = str(value)
    if "\0" in text:
        raise ValueError
    return text


def _number(value: Any) -> float:
    """A number, or a text that holds one."""
    if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
        raise TypeError
    return float(value)


def _width(value: Any) -> Width:
    """A width, by its number or a text that holds it."""
    if isinstance(value, bool):
        raise TypeError
    return Width(value)


def _integer(value: Any) -> int:
    """An exact integer, written as 64, 64.0 or "64"."""
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]+\s*", value):
        return int(value)
    if not isinstance(value, numbers.Integral) and not _number(value).is_integer():
        raise TypeError
    return int(value) if not isinstance(value, str) else int(float(value))


def _items(value: Any) -> list[Any]:
    """The items of a list. A single value is a list of one."""
    return list(value) if isinstance(value, list | tuple) else [value]


def _split_items(value: Any) -> list[Any]:
    """The items of a list, or of a text with commas."""
    return list(value.split(",")) if isinstance(value, str) else _items(value)


_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "bool": _boolean,
    "int": _integer,
    "float": _number,
    "str": _text,
    "tuple[str, ...]": lambda value: tuple(_text(item) for item in _items(value)),
    "tuple[float, ...]": lambda value: tuple(_number(item) for item in _split_items(value)),
    "Width": _width,
    "tuple[AnyWidth, ...]": lambda value: tuple(_split_items(value)),  # read once the kind of codes is known
}
"""By type of a field."""
