"""The record behind a report page: plain values that the page shows and contains, so that it can be completed later.

Its keys:

- ``gemq``: version that wrote it
- ``model``: ``name``, ``base_model`` (id on the hub, or None)
- ``checkpoint``: widths and sizes, see ``checkpoint_section``
- ``job``: what ``Result.to_dict`` returns without paths, with ``recipe``, ``device``, ``versions`` and, if widths were
  allocated from scores, ``curve``; or None
- ``evaluation``: what ``evaluate_paths`` returned, or None
- ``speed``: what ``bench_path`` returned, or None

A page may come from somebody else. So its record is untrusted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemq.checkpoint.contents import Contents
from gemq.errors import UserError
from gemq.quant.widths import ExpertWidths
from gemq.reporting.widths import LayerWidths, layer_names
from gemq.runtime.files import read_input

PAGE = "report.html"
MAX_PAGE_BYTES = 64 << 20

RECORD_ID = "gemq-record"
"""Id of the page's element that contains the record."""

SECTIONS = ("gemq", "model", "checkpoint", "job", "evaluation", "speed")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_RECORD = re.compile(rf'<script type="application/json" id="{RECORD_ID}">(.*?)</script>', re.DOTALL)


def checkpoint_section(
    layers: Sequence[tuple[str, Sequence[ExpertWidths], float]],
    *,
    codes: str,
    linears: Mapping[str, int],
    group_size: int,
    stored_bytes: int,
    bits_nominal: float,
    bits_stored: float,
    model_type: str,
    memory: Sequence[Mapping[str, int]],
) -> dict[str, Any]:
    """Return what a report says of the checkpoint itself.

    Args:
        layers: for each experts module its path, the widths of its experts and their mean bits
        codes: kind of the experts' codes, ``affine`` or ``trellis``
        linears: number of packed dense linears by width
        group_size: weights that share a scale and an offset
        stored_bytes: bytes of all tensors
        bits_nominal: mean bits per expert weight, without scales and offsets
        bits_stored: the same with scales and offsets
        model_type: of the configuration
        memory: what ``memory_rows`` returned
    """
    names = layer_names([path for path, _, _ in layers])
    rows = []
    for name, (_, widths, bits) in zip(names, layers, strict=True):
        gate_up, down = ([pair[matrix].value for pair in widths] for matrix in (0, 1))
        rows.append({"name": name, "gate_up": gate_up, "down": down, "bits": bits})
    return {
        "model_type": model_type,
        "layers": rows,
        "codes": codes,
        "linears": dict(linears),
        "group_size": group_size,
        "stored_bytes": stored_bytes,
        "expert_bits_nominal": bits_nominal,
        "expert_bits_stored": bits_stored,
        "memory": list(memory),
    }


def section_of_contents(contents: Contents, memory: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """Return what a report says of a checkpoint on disk."""
    return checkpoint_section(
        contents.layers,
        codes=contents.codes,
        linears=contents.linears,
        group_size=contents.group_size,
        stored_bytes=contents.stored_bytes,
        bits_nominal=contents.expert_bits_nominal,
        bits_stored=contents.expert_bits_stored,
        model_type=contents.model_type,
        memory=memory,
    )


def layers_of_section(checkpoint: Mapping[str, Any]) -> list[LayerWidths]:
    """Return the widths of a ``checkpoint_section``."""
    layers = []
    for row in checkpoint["layers"]:
        widths = [float(width) for width in row["gate_up"]], [float(width) for width in row["down"]]
        layers.append(LayerWidths(str(row["name"]), widths, float(row["bits"])))
    return layers


def hub_id(model: str | Path) -> str | None:
    """Return the id on the hub of a model that was named by its id or by its snapshot in the hub's cache, else None."""
    path = Path(model)
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        cached_id = path.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
        return cached_id if _HUB_ID.fullmatch(cached_id) else None
    is_id = _HUB_ID.fullmatch(str(model)) is not None and not path.exists()
    return str(model) if is_id else None


def public_name(model: str | Path) -> str:
    """Return the name of a model without the directories of this machine."""
    return hub_id(model) or Path(model).resolve().name


def evaluation_section(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of ``evaluate_paths`` without directories of this machine."""
    section = dict(values)
    for key in ("model", "reference"):
        if section.get(key) is not None:
            section[key] = public_name(str(section[key]))
    section["fallbacks"] = [_without_path(line, str(values["model"])) for line in values.get("fallbacks", [])]
    return section


def _without_path(line: str, path: str) -> str:
    """Return a line with the directory of a model shortened to its name."""
    return line.replace(path, public_name(path))


def record_text(record: Mapping[str, Any]) -> str:
    """Return a record as JSON that can stand in a page's script element."""
    text = json.dumps(_finite(record), separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _finite(value: Any) -> Any:
    """Return plain values with None in place of numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_record(checkpoint: Path) -> dict[str, Any] | None:
    """Return the record in a checkpoint's report page, or None if the checkpoint has no page.

    Raises:
        UserError: there is a page without a record that can be read.
    """
    page = checkpoint / PAGE
    if not page.exists():
        return None
    try:
        text = read_input(page, MAX_PAGE_BYTES).decode("utf-8")
        match = _RECORD.search(text)
        record = json.loads(match.group(1)) if match else None
    except (OSError, ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not record.keys() >= set(SECTIONS):
        raise damaged_page(page)
    model = record["model"]
    if not isinstance(model, dict) or not isinstance(model.get("name"), str):
        raise damaged_page(page)
    is_id = isinstance(model.get("base_model"), str) and _HUB_ID.fullmatch(model["base_model"])
    return {**record, "model": {**model, "base_model": model["base_model"] if is_id else None}}  # part of commands


def damaged_page(page: Path) -> UserError:
    """Return the error for a page whose record cannot be used."""
    return UserError(
        f"{page} or the results for it are not those of this gemq, or damaged: move it away, and run gemq report again"
    )
