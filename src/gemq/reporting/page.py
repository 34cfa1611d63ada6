"""The report page: one HTML file that loads nothing else.

Texts of models, names of files and the record itself are untrusted. The template escapes all of them, and the page's
security policy lets only its own script run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined, Template, TemplateError
from markupsafe import Markup

from gemq.allocation.guard import describe
from gemq.reporting.fallback_texts import FALLBACKS
from gemq.reporting.record import PAGE, RECORD_ID, damaged_page, layers_of_section, record_text
from gemq.reporting.sentences import LOOP_RULE, repeating_inputs, untrained, width_unit
from gemq.reporting.svg import (
    CHART_HEIGHT,
    CHART_WIDTH,
    Mark,
    cells,
    labeled_indices,
    lines_between_cells,
    size_curve_chart,
)
from gemq.reporting.widths import MATRICES, LayerWidths, text_color, width_colors, width_counts
from gemq.runtime.display import duration_text, printable, size_text
from gemq.runtime.files import write_text
from gemq.runtime.integers import ceil_div

MAX_LABELS = 16
"""Most rows of a map that get a label."""

NO_VALUE = "\N{EN DASH}"

FEW_TOKENS = 0.1
"""An expert with fewer calibration tokens than this share of its layer's mean is listed."""

MAX_EXPERTS_LISTED = 12


def write_page(checkpoint: Path, record: Mapping[str, Any]) -> Path:
    """Write the report page of a checkpoint and return its path.

    Raises:
        UserError: the record, which may be that of an earlier page, cannot be shown.
    """
    page = checkpoint / PAGE
    try:
        text = render_page(record)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, TemplateError) as error:
        raise damaged_page(page) from error
    write_text(page, text)
    return page


def render_page(record: Mapping[str, Any]) -> str:
    """Return the HTML of a report. See ``reporting.record`` for its keys."""
    script = _text("page.js")
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    checkpoint, job = record["checkpoint"], record["job"]
    layers = layers_of_section(checkpoint)
    html: str = _template().render(
        **record,
        title=title(record),
        style=Markup(_text("page.css")),
        script=Markup(script),
        script_hash=script_hash,
        record_id=RECORD_ID,
        record_text=Markup(record_text(record)),
        maps=_maps(layers),
        colors=_legend(layers),
        counts=width_counts(layers),
        layers=layers,
        chart=_chart(record),
        chart_size=(CHART_WIDTH, CHART_HEIGHT),
        guard=_sentence(describe(job["guard"])) if job else "",
        gains=_gains(job) if job else [],
        untrained=_sentence(untrained(job)) if job else "",
        repeating_inputs=repeating_inputs(job) if job else "",
        loop_rule=LOOP_RULE,
        width_unit=width_unit(layers),
        tokens=_tokens(job, layers),
        recipe_text=yaml.safe_dump(job["recipe"], sort_keys=False, allow_unicode=True) if job else "",
        fallbacks=_fallbacks(record),
    )
    return html


@cache
def _template() -> Template:
    """Return the compiled template of the page. Compiling it takes longer than filling it in."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "size": size_text,
        "number": lambda value, form: NO_VALUE if value is None else format(value, form),
        "percent": _percent,
        "printable": lambda text: printable(str(text)),
        "duration": lambda seconds: duration_text(seconds, 1),
    }
    return environment.from_string(_text("page.html.j2"))


def title(record: Mapping[str, Any]) -> str:
    """Return the title of page and card."""
    return f"{record['model']['name']} at {record['checkpoint']['expert_bits_nominal']:.3g} bits per expert weight"


def _text(name: str) -> str:
    """Return the contents of a file of this package."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _maps(layers: list[LayerWidths]) -> list[dict[str, Any]]:
    """Return for each of the two matrices what the template needs to draw the map of its widths."""
    colors = width_colors(layers)
    columns = max(len(layer.widths[0]) for layer in layers)
    labels = []
    for index in labeled_indices(len(layers), ceil_div(len(layers), MAX_LABELS)):
        labels.append((f"{(index + 0.5) / len(layers):.2%}", layers[index].name))
    maps = []
    for matrix, name in enumerate(MATRICES):
        rows = [layer.widths[matrix] for layer in layers]
        maps.append(
            {
                "name": name,
                "key": ("gate_up", "down")[matrix],
                "columns": columns,
                "rows": len(layers),
                "labels": labels,
                "cells": Markup(cells(rows, colors)),
                "lines": lines_between_cells(columns, len(layers)),
            }
        )
    return maps


def _legend(layers: list[LayerWidths]) -> list[tuple[str, str, str]]:
    """Return each width in use with its color and a color of text on it."""
    return [(f"{width:g}", color, text_color(color)) for width, color in width_colors(layers).items()]


def _chart(record: Mapping[str, Any]) -> Markup | None:
    """Return the size curve with this checkpoint, if the job has one."""
    job = record["job"]
    if not job or not job.get("curve"):
        return None
    curve = job["curve"]
    marks = []
    if curve["random_cost"] is not None:
        marks.append(Mark("random", "random widths of the same size", curve["random_bytes"], curve["random_cost"]))
    if job["predicted_cost"] is not None:
        marks.append(Mark("model", "this checkpoint", job["stored_bytes"], job["predicted_cost"]))
    points = curve["points"]
    return Markup(size_curve_chart(points, points[0]["uniform_cost"] or 1.0, marks))


def _gains(job: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the error before and after each stage of training that ran."""
    rows = []
    for stage, unit in (("reconstruction", "mean relative error of layers"), ("distillation", "nats per token")):
        if f"{stage}_before" in job["gains"]:
            losses = job["gains"][f"{stage}_before"], job["gains"][f"{stage}_after"]
            change = losses[1] / losses[0] - 1 if losses[0] else None
            rows.append({"stage": stage, "unit": unit, "losses": losses, "change": change})
    return rows


def _tokens(job: Mapping[str, Any] | None, layers: list[LayerWidths]) -> dict[str, Any] | None:
    """Return how many calibration tokens experts had: a row for each layer, and the experts with few of them."""
    counts = job.get("expert_tokens") if job else None
    if not counts:
        return None
    rows, few = [], []
    for layer, layer_counts in zip(layers, counts, strict=True):
        mean = sum(layer_counts) / len(layer_counts)
        rows.append((layer.name, min(layer_counts), median(layer_counts), max(layer_counts)))
        for expert, count in enumerate(layer_counts):
            if count < FEW_TOKENS * mean:
                few.append((count, layer.name, expert))
    few.sort(key=lambda row: row[0])
    num_experts = sum(len(layer_counts) for layer_counts in counts)
    few_listed = few[:MAX_EXPERTS_LISTED]
    return {"layers": rows, "few": few_listed, "num_few": len(few), "num_experts": num_experts, "share": FEW_TOKENS}


def _fallbacks(record: Mapping[str, Any]) -> list[str]:
    """Return a line for each kind of fallback of the job, the evaluation and the measurement of speed."""
    lines = []
    for name, count in (record["job"] or {}).get("fallbacks", {}).items():
        if count:
            lines.append(f"{count} {FALLBACKS.get(name, name.replace('_', ' '))}")
    for section in ("evaluation", "speed"):
        lines += (record[section] or {}).get("fallbacks", [])
    return lines


def _percent(value: float | None, digits: int = 1) -> str:
    """Return ``12.3 %``, with a space that does not break."""
    return NO_VALUE if value is None else f"{value:.{digits}%}".replace("%", "\N{NO-BREAK SPACE}%")


def _sentence(text: str) -> str:
    """Return a text that begins with a capital letter."""
    return text[:1].upper() + text[1:]
