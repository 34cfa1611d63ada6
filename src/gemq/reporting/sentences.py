"""Sentences that the report page and the model card share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemq.calibration.sources import SELF
from gemq.evaluation.repetition import MAX_LOOP_PERIOD, MIN_LOOP_CYCLES, MIN_LOOP_TOKENS
from gemq.quant.widths import Width
from gemq.reporting.widths import LayerWidths, width_counts

LOOP_RULE = (
    f"A text runs into a loop if it ends in a cycle of at most {MAX_LOOP_PERIOD} tokens, written at least "
    f"{MIN_LOOP_CYCLES} times and over at least {MIN_LOOP_TOKENS} tokens."
)


def width_unit(layers: Sequence[LayerWidths]) -> str:
    """Return the unit of widths, with what ternary codes count if there are any: they are named 1.6."""
    has_ternary = any(width == Width.TERNARY.value for width, _ in width_counts(layers))
    return "bits of a code" + (f"; 1.6 counts as {Width.TERNARY.bits:g}" if has_ternary else "")


def untrained(job: Mapping[str, Any]) -> str:
    """Return what happened after the allocation of a job that trained nothing there."""
    if job["recipe"]["reconstruct"]:
        return "reconstruction quantized each layer again at the chosen widths, and trained nothing"
    return "assembled from the candidates, and nothing trained after the allocation"


def repeating_inputs(job: Mapping[str, Any]) -> str:
    """Return what ``gemq quantize`` reads to make a checkpoint again by its recipe."""
    inputs = ["the original model", "recipe.yaml"]
    if any(source != SELF for source in job["recipe"]["calibration"]):
        inputs.append("the calibration text that recipe.yaml names")
    if job["method"] == "from a file":
        inputs.append("allocation.json")
    again = "" if job["method"] == "from a file" else ", and chooses the widths in allocation.json again"
    return f"It reads {', '.join(inputs[:-1])} and {inputs[-1]}{again}."
