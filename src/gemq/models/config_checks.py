"""Checks of a config.json that name the invalid field.

Messages of Transformers often do not name it ("integer modulo by zero"). Uses the JSON values only.
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
    """Reads a config.json and checks what does not depend on the family.

    Raises:
        UserError: it is not a JSON object, or a field has an invalid value. The message names the field.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a model's configuration: copy the model again")
    for name, expected_type in (("model_type", str), ("quantization_config", dict), ("text_config", dict)):
        if name in values and not isinstance(values[name], expected_type | None):
            raise UserError(f"{path} says {name} is {values[name]!r}, which cannot be: copy the model again")
    for field, value in _fields(values):
        name = field.rpartition(".")[2]
        if name in ("dtype", "torch_dtype") and isinstance(value, str) and not _is_dtype(value):
            raise UserError(f"{path} says {field} is {value!r}, which is no type of torch: try bfloat16 or float16")
    return values


def suspicious_fields(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Returns fields that may prevent a model from being built, with their values: ``num_attention_heads (0)``.

    Args:
        values: of config.json
        defaults: of the family
    """
    default_by_field = dict(_fields(defaults))
    suspicious = []
    for field, value in _fields(values):
        if _is_suspicious(field, value, default_by_field.get(field)):
            suspicious.append(f"{field} ({value!r})")
    padding = values.get("pad_token_id")
    rows = values.get("vocab_size", default_by_field.get("vocab_size"))
    if _is_number(padding) and _is_number(rows) and not -rows <= padding < rows:
        suspicious.append(f"pad_token_id ({padding}, and vocab_size is {rows})")
    return suspicious


def _is_suspicious(field: str, value: Any, default: Any) -> bool:
    """Whether the value of a field has another type than the default, or is not positive where the default is."""
    if isinstance(value, str):
        is_rotary = any(ROTARY.match(name) for name in field.split("."))
        is_rotary_number = is_rotary and not field.endswith("type")
        return _is_number(default) or is_rotary_number
    if _is_number(value):
        return isinstance(default, int | float) and default > 0 and value <= 0
    return _is_number(default) and value is not None and not isinstance(value, list)


def _fields(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields names and values of all fields, including nested ones, whose names contain dots."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_dtype(name: str) -> bool:
    """Whether a name is that of a torch dtype, or ``auto``."""
    return name == "auto" or isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)


def _is_number(value: Any) -> bool:
    """Whether a JSON value is a number. A bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)
