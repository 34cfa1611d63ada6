"""Completes the report page and the model card of a checkpoint with measurements, or writes a page anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gemq
from gemq.checkpoint.contents import Contents, inspect_checkpoint
from gemq.checkpoint.skeleton import build_skeleton, read_config
from gemq.checkpoint.stored import StoredCheckpoint
from gemq.errors import UserError
from gemq.reporting.card import update_card
from gemq.reporting.memory import memory_rows
from gemq.reporting.page import write_page
from gemq.reporting.record import evaluation_section, hub_id, public_name, read_record, section_of_contents

EVALUATION_KEYS = {"model", "stored_bytes", "texts", "tokens", "windows", "perplexity", "fallbacks"}
"""Keys that results of ``gemq eval`` have."""
SPEED_KEYS = {"model", "stored_bytes", "decode", "prefill", "device", "dtype", "fallbacks"}
"""Keys that results of ``gemq bench`` have."""


class Report(NamedTuple):
    """What was written.

    Attributes:
        page: path of the page
        has_card: whether the measurements are in the model card as well
    """

    page: Path
    has_card: bool


def update_report(
    checkpoint: Path,
    results: Sequence[Mapping[str, Any]] = (),
    *,
    reference: str | None = None,
    trust_remote_code: bool = False,
) -> Report:
    """Write the report page of a checkpoint from its files, its earlier page and new results.

    Args:
        checkpoint: directory of a packed checkpoint
        results: what ``evaluate_paths`` or ``bench_path`` returned
        reference: directory or hub id of the full-precision model, if known
        trust_remote_code: allow Python code that comes with the model to run

    Raises:
        UserError: it is no packed checkpoint, results are not those of it, or its earlier page cannot be read.
    """
    contents = inspect_checkpoint(checkpoint)
    record = read_record(checkpoint) or _empty_record(contents)
    config = read_config(checkpoint, trust_remote_code=trust_remote_code)
    skeleton = build_skeleton(config, StoredCheckpoint.open(checkpoint), trust_remote_code=trust_remote_code)
    memory = memory_rows(
        skeleton, codes=contents.codes, group_size=contents.group_size, bits=contents.expert_bits_nominal
    )
    record["checkpoint"] = section_of_contents(contents, memory)
    base_model = record["model"]["base_model"] or (hub_id(reference) if reference else None)
    record["model"] = {**record["model"], "base_model": base_model}
    for values in results:
        record |= _section(values, contents)
    page = write_page(checkpoint, record)
    return Report(page, update_card(checkpoint, record))


def _empty_record(contents: Contents) -> dict[str, Any]:
    """Return the record of a checkpoint whose job is unknown."""
    return {
        "gemq": gemq.__version__,
        "model": {"name": contents.model_type, "base_model": None},
        "checkpoint": None,
        "job": None,
        "evaluation": None,
        "speed": None,
    }


def _section(values: Mapping[str, Any], contents: Contents) -> dict[str, Any]:
    """Return results as a section of a record, by its name.

    Raises:
        UserError: they are no results of this checkpoint.
    """
    is_evaluation, is_speed = values.keys() >= EVALUATION_KEYS, values.keys() >= SPEED_KEYS
    if not is_evaluation and not is_speed:
        raise UserError("these are no results of gemq eval or gemq bench: give the file that their --json wrote")
    if values["stored_bytes"] != contents.stored_bytes:
        name = public_name(str(values["model"]))
        raise UserError(f"these are results of another checkpoint, {name}: give those of {contents.path}")
    if is_evaluation:
        return {"evaluation": evaluation_section(values)}
    return {"speed": {**values, "model": public_name(str(values["model"]))}}
