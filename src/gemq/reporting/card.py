"""The model card: README.md of a checkpoint, with the metadata that the Hugging Face hub reads.

The same model and widths give the same card. Measurements stand between two markers, so that ``gemq report`` can fill
them in later and leaves everything else as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined, Template

from gemq.allocation.guard import describe
from gemq.errors import UserError
from gemq.reporting.page import title
from gemq.reporting.sentences import LOOP_RULE, repeating_inputs, untrained
from gemq.runtime.display import printable, size_text
from gemq.runtime.files import read_input, write_text

CARD = "README.md"
MAX_CARD_BYTES = 4 << 20

BEGIN, END = "<!-- gemq: measurements -->", "<!-- gemq: end of measurements -->"

COPIED_KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Metadata that a checkpoint has in common with its original."""


def source_metadata(model: Path) -> dict[str, Any]:
    """Return license, languages and task from the card of the full-precision model, if it has one.

    Raises:
        ValueError: the card cannot be read, or its metadata is no valid YAML.
    """
    from huggingface_hub import ModelCard

    if not (model / CARD).exists():
        return {}
    try:
        content = read_input(model / CARD, MAX_CARD_BYTES).decode("utf-8")
        values = ModelCard(content).data.to_dict()
    except (OSError, yaml.YAMLError, TypeError) as error:
        raise ValueError(str(error)) from error
    return {key: values[key] for key in COPIED_KEYS if _is_plain(values.get(key))}


def _is_plain(value: Any) -> bool:
    """Whether a value of a card's metadata is a text, or a list of texts."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def model_card(record: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """Return the README.md of a packed checkpoint.

    Args:
        record: see ``reporting.record``
        metadata: what ``source_metadata`` returned
    """
    model, job = record["model"], record["job"]
    base_model = model["base_model"]
    source = (
        f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"A model of type {model['name']}"
    )
    values = {
        **({"base_model": base_model, "base_model_relation": "quantized"} if base_model else {}),
        **metadata,
        "library_name": "transformers",
        "pipeline_tag": metadata.get("pipeline_tag", "text-generation"),
        "tags": ["gemq", "moe", "quantized"],
    }
    front_matter = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    body = _render(
        "card.md.j2",
        **record,
        title=title(record),
        source=source,
        reference=_reference(record),
        guard=describe(job["guard"]) if job else "",
        untrained=untrained(job) if job else "",
        repeating_inputs=repeating_inputs(job) if job else "",
        measurements=_measurements(record),
        begin=BEGIN,
        end=END,
    )
    return f"---\n{front_matter}---\n\n{body}"


def update_card(checkpoint: Path, record: Mapping[str, Any]) -> bool:
    """Replace the measurements in a checkpoint's card. Returns False, and changes nothing, if it has no place for them.

    Raises:
        UserError: the card cannot be read or written.
    """
    path = checkpoint / CARD
    if not path.exists():
        return False
    try:
        text = read_input(path, MAX_CARD_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): repair it, or move it away") from error
    head, begin, remainder = text.partition(BEGIN)
    _, end, tail = remainder.partition(END)
    if not begin or not end:
        return False
    write_text(path, f"{head}{BEGIN}\n{_measurements(record)}\n{END}{tail}")
    return True


def _measurements(record: Mapping[str, Any]) -> str:
    """Return the Markdown between the markers."""
    return _render("measurements.md.j2", **record, reference=_reference(record), loop_rule=LOOP_RULE).strip()


def _reference(record: Mapping[str, Any]) -> str:
    """Return what stands for the full-precision model in commands."""
    return record["model"]["base_model"] or "MODEL"


def _render(name: str, **values: Any) -> str:
    """Return a template with its values filled in."""
    return _template(name).render(**values)


@cache
def _template(name: str) -> Template:
    """Return a compiled template."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"size": size_text, "cell": _cell}
    return environment.from_string(files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _cell(text: object) -> str:
    """Return a text for a cell of a Markdown table, in which it starts neither markup nor another cell."""
    line = " ".join(printable(str(text)).split())
    for character in "\\`*_[]<>|":
        line = line.replace(character, f"\\{character}")
    return line
