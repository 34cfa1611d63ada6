"""What can be wrong in a config.json, by the name of the field.

Transformers' own messages often do not name it ("integer modulo by zero"). Works on the JSON values alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from gemq.errors import UserError
from gemq.runtime.safetensors_files import read_json

ROTARY = re.compile(r"^rope_(parameters|scaling)$")


def read_configuration(path: Path) -> dict[str, Any]:
    """The values of a config.json, checked as far as they can be without knowing the family.

    Raises:
        UserError: it is no JSON object, or a field has a value that no model has. Names the field.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a model's configuration: copy the model again")
    for name, kind in (("model_type", str), ("quantization_config", dict), ("text_config", dict)):
        if name in values and not isinstance(values[name], kind | None):
            raise UserError(f"{path} says {name} is {values[name]!r}, which cannot be: copy the model again")
    for field, value in _fields(values):
        name = field.rpartition(".")[2]
        if name in ("dtype", "torch_dtype") and isinstance(value, str) and not _is_dtype(value):
            raise UserError(f"{path} says {field} is {value!r}, which is no type of torch: try bfloat16 or float16")
    return values


def suspicious_fields(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Fields by which a model could not be built, with their values, such as ``num_attention_heads (0)``.

    Args:
        values: of config.json.
        defaults: of the family.
    """
    usual = dict(_fields(defaults))
    found = []
    for field, value in _fields(values):
        default = usual.get(field)
        is_rotary = any(ROTARY.match(part) for part in field.split("."))
        wrong = isinstance(value, str) and (_is_number(default) or (is_rotary and not field.endswith("type")))
        wrong |= _is_number(default) and not _is_number(value) and value is not None and not isinstance(value, list)
        wrong |= isinstance(default, int | float) and default > 0 and _is_number(value) and value <= 0
        if wrong:
            found.append(f"{field} ({value!r})")
    padding, rows = values.get("pad_token_id"), values.get("vocab_size", usual.get("vocab_size"))
    if _is_number(padding) and _is_number(rows) and not -rows <= padding < rows:
        found.append(f"pad_token_id ({padding}, and vocab_size is {rows})")
    return found


def _fields(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names with dots and values of all fields, those of parts included."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_dtype(name: str) -> bool:
    return name == "auto" or isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
