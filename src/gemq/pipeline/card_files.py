"""What a job writes next to the weights: model card, picture, recipe, allocation and report page.

All but the page are the same for the same model and widths. The page has times, memory and versions.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

import gemq
from gemq.allocation.problem import Allocation, Budget, Problem, allocate
from gemq.calibration.sources import SELF
from gemq.checkpoint.contents import widths_by_expert
from gemq.checkpoint.format import PackedFormat
from gemq.models.source import pick_dtype
from gemq.pipeline.context import Job
from gemq.pipeline.size_curve import curve_points
from gemq.recipe import Recipe
from gemq.recipe_defaults import BUDGETS, DEFAULT_BITS
from gemq.reporting.card import CARD, model_card, source_metadata
from gemq.reporting.memory import memory_rows
from gemq.reporting.page import render_page
from gemq.reporting.record import PAGE, checkpoint_section, hub_id, layers_of_section
from gemq.reporting.svg import widths_picture

REPORT_STEP_BITS = 0.25
"""Distance between two budgets of the size curve in a report."""

PRIVATE_RESULTS = ("out", "work", "allocation", "layer_bits", "work_bytes", "other_bits", "complete_before")
"""Keys of a result that name directories, or that the report has elsewhere."""


def about(model: PreTrainedModel, packed_format: PackedFormat, allocation: Allocation) -> dict[str, Any]:
    """Values of ``quantization_config`` that describe the checkpoint to people and to the hub.

    Args:
        model: the full-precision model, whose layers may be on the meta device.
        packed_format: which matrices are packed.
        allocation: of the experts.
    """
    packed = packed_format.replaced_names()
    unpacked = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in packed and parameter.ndim > 1:
            unpacked.append(name.removesuffix(".weight"))
    return {
        "bits": round(allocation.nominal_bits, 3),
        "producer": {"name": "gemq", "version": gemq.__version__},
        "modules_to_not_convert": path_patterns(unpacked, {name.removesuffix(".weight") for name in packed}),
    }


def path_patterns(paths: Iterable[str], excluded: Collection[str]) -> list[str]:
    """Module paths with a star in place of numbers, such as ``model.layers.*.mlp.gate``.

    A path stays as it is if its pattern also fits one of ``excluded``.
    """
    excluded_patterns = {_pattern(path) for path in excluded}
    patterns: dict[str, None] = {}
    for path in paths:
        pattern = _pattern(path)
        patterns[path if pattern in excluded_patterns else pattern] = None
    return list(patterns)


def _pattern(path: str) -> str:
    """A module path with a star in place of each number."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def curve_of_job(problem: Problem, recipe: Recipe, fixed: int, expert_bytes: int) -> dict[str, Any]:
    """The size curve for the report, and random widths of the same size.

    Args:
        problem: with the costs of the job.
        recipe: of the job.
        fixed: bytes of everything but the experts.
        expert_bytes: of the allocation.
    """
    random = allocate(problem, Budget("bytes", expert_bytes), "random", seed=recipe.seed)
    points = curve_points(problem, recipe, fixed, "global", REPORT_STEP_BITS)
    return {
        "points": [dataclasses.asdict(point) for point in points],
        "random_cost": random.predicted_cost,
        "random_bytes": fixed + random.stored_bytes,
    }


def make_record(
    job: Job, packed_format: PackedFormat, result: Mapping[str, Any], recipe: Recipe, curve: dict[str, Any] | None
) -> dict[str, Any]:
    """The record of a job for card and page, see ``reporting.record``.

    Args:
        job: the job.
        packed_format: which matrices are packed.
        result: ``Result.to_dict()`` of the job.
        recipe: that makes this checkpoint.
        curve: what ``curve_of_job`` returned, if the job has scores.
    """
    config = job.source.config()
    bits_nominal = result["expert_bits_nominal"]
    layers = []
    layer_bits = [bits for widths, bits in zip(result["allocation"], result["layer_bits"], strict=True) if widths]
    for (path, projections), bits in zip(packed_format.experts.items(), layer_bits, strict=True):
        layers.append((path, widths_by_expert(projections), bits))
    checkpoint = checkpoint_section(
        layers,
        codes=packed_format.codes,
        linears=Counter(str(width) for width in packed_format.linears.values()),
        group_size=packed_format.group_size,
        stored_bytes=result["stored_bytes"],
        bits_nominal=bits_nominal,
        bits_stored=result["expert_bits_stored"],
        model_type=config.model_type,
        memory=memory_rows(
            job.source.skeleton(), codes=packed_format.codes, group_size=packed_format.group_size, bits=bits_nominal
        ),
    )
    base_model = hub_id(job.source.path)
    facts = {key: value for key, value in result.items() if key not in PRIVATE_RESULTS}
    facts["expert_tokens"] = [counts for counts in result["expert_tokens"] if counts]
    versions = {"gemq": gemq.__version__, **{name: metadata.version(name) for name in ("torch", "transformers")}}
    return {
        "gemq": gemq.__version__,
        "model": {"name": base_model.partition("/")[2] if base_model else config.model_type, "base_model": base_model},
        "checkpoint": checkpoint,
        "job": {
            **facts,
            "recipe": recipe_values(recipe, job.calibration),
            "curve": curve,
            "device": _device_name(job),
            "versions": versions,
        },
        "evaluation": None,
        "speed": None,
    }


def _device_name(job: Job) -> str:
    """The device of a job, such as ``NVIDIA H200`` or ``a CPU``."""
    return torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "a CPU"


def repeating_recipe(job: Job, reconstructed: bool) -> Recipe:
    """The recipe by which ``quantize`` makes a checkpoint again, on any device.

    Args:
        job: the job.
        reconstructed: whether the model was reconstructed. A plain export was not, and no guard ran.
    """
    dtype = pick_dtype(job.recipe.dtype, job.device)
    recipe = job.recipe.replace(dtype=str(dtype).removeprefix("torch."))
    if reconstructed:
        return recipe
    return recipe.replace(reconstruct=False, guard=False, progressive=(), reconstruction_epochs=0, distill_epochs=0)


def recipe_values(recipe: Recipe, digests: Sequence[str]) -> dict[str, Any]:
    """The keys of a recipe with their values, defaults included. Files of calibration have their names alone.

    Args:
        recipe: of the job.
        digests: of its calibration sources. That of a data set is its id.
    """
    sources = []
    for source, source_digest in zip(recipe.calibration, digests, strict=True):
        sources.append(source if source in (SELF, source_digest) else Path(source).name)
    values = {**recipe.to_dict(), "calibration": sources}
    if all(values[budget] is None for budget in BUDGETS):
        values["bits"] = DEFAULT_BITS
    return {**values, "widths": [width.value for width in recipe.candidate_widths]}


def recipe_text(values: Mapping[str, Any], digests: Iterable[str], from_file: bool) -> str:
    """Contents of recipe.yaml.

    Args:
        values: what ``recipe_values`` returned.
        digests: of the calibration sources.
        from_file: whether the widths were read from a file.
    """
    flag = " --allocation allocation.json" if from_file else ""
    lines = [
        f"# gemq quantize MODEL --recipe recipe.yaml{flag} -o OUT makes this checkpoint again, where these files are."
    ]
    for source, source_digest in zip(values["calibration"], digests, strict=True):
        if source not in (SELF, source_digest):
            lines.append(f"# calibration text: {' '.join(source_digest.split())}")
    return "\n".join(lines) + "\n" + yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def texts(job: Job, record: Mapping[str, Any], allocation: Allocation) -> dict[str, str]:
    """Contents of the files next to the weights, by name."""
    facts = record["job"]
    token_counts = iter(facts["expert_tokens"])
    tokens: list[list[int]] = [next(token_counts, []) if layer else [] for layer in allocation.by_layer]
    try:
        card_metadata = source_metadata(job.source.path)
    except ValueError:
        job.count_fallback("source_card_unreadable")
        facts["fallbacks"] = dict(job.fallbacks)
        card_metadata = {}
    return {
        CARD: model_card(record, card_metadata),
        "allocation.json": allocation.to_json(tokens),
        "allocation.svg": widths_picture(layers_of_section(record["checkpoint"])),
        "recipe.yaml": recipe_text(facts["recipe"], job.calibration, facts["method"] == "from a file"),
        PAGE: render_page(record),
    }
