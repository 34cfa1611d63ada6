"""The dry run: what a job would do to a model, from its configuration alone.

What ``quantize`` refuses before it computes is refused here as well, as far as it shows without weights. Checkpoint
sizes are exact but for rounding the budget. Memory and disk are estimates, and times rest on counted work
(``planning.cost_model``) and a second's measurement of this machine (``runtime.device``); reading and writing files is
not in them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemq.models.byte_sizes import expert_bytes, ladder_bytes, quantized_share
from gemq.models.source import Source, configured_types, pick_dtype
from gemq.models.structure import Structure
from gemq.pipeline.preflight import Checked, check_model
from gemq.planning.cost_model import Workload
from gemq.planning.memory_model import Footprint, check_bounds, held_bytes, staging_bytes
from gemq.quant.widths import nominal_bits
from gemq.recipe import DEFAULT_BITS, Recipe
from gemq.runtime.memory import Memory

LIBRARIES, CUDA_LIBRARIES = 430_000_000, 900_000_000
"""Bytes of host memory that Python, PyTorch, Transformers and a tokenizer take before anything is loaded; CUDA's."""

BUDGETS = (1.5, 2.0, 2.5, 3.0)


@dataclass
class Plan:
    """What ``quantize`` would need and give.

    sizes:   bytes of the checkpoint's tensors by nominal bits per expert weight
    bits:    nominal bits per expert weight that the budget buys
    least_bytes, quickest_bytes: of memory on ``device`` with which the job runs at all, and with which nothing waits
    host_bytes: of host memory beside that (on a GPU: on which layers are read)
    available_bytes: of memory on ``device`` that a job started now would take at most
    tokens:  of calibration, those that the effort adds included
    seconds: expected time of each stage on ``device``
    """

    model: str
    parameters: dict[str, int]
    quantized_share: float
    linears_not_quantized: tuple[str, ...]
    moe_layers: int
    layers: int
    experts: int
    original_bytes: int
    sizes: dict[str, int]
    budget: str
    bits: float
    window: int
    windows: int
    tokens: int
    work_bytes: int
    least_bytes: int
    quickest_bytes: int
    host_bytes: int
    available_bytes: int
    device: str
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    source: Source,
    recipe: Recipe,
    device: torch.device,
    *,
    allocation: Path | None = None,
    gpu_memory: int | None = None,
    host_memory: int | None = None,
    with_weights: bool = False,
) -> Plan:
    """The plan for a model and a recipe. Needs no weights.

    Args:
        source: the model
        recipe: as for ``quantize``
        device: where the job would run
        allocation: file with the widths of all experts, as for ``quantize``
        gpu_memory, host_memory: bounds in bytes, as for ``quantize``
        with_weights: the model's weights are there, so their headers are checked as well

    Raises:
        UserError: the model, the recipe, the calibration texts or the bounds cannot be used. Bounds that nobody gave
            are no reason: a plan may be for another machine.
    """
    memory = Memory.bounded(device, gpu_memory, host_memory, None)
    if with_weights:
        source.check_weights()
    checked = check_model(source, recipe, allocation)
    model, structure, fixed = checked.model, checked.structure, checked.fixed_bytes
    compute = pick_dtype(recipe.dtype, device)
    if gpu_memory is not None or host_memory is not None:
        check_bounds(memory, model, structure, recipe, compute)
    stored = configured_types(model)
    bits = bits_of(checked, recipe, allocation)
    low, high = (nominal_bits(f(recipe.ladder_widths)) for f in (min, max))
    sizes = {f"{b:.4g}": fixed + experts_at(structure, recipe, b) for b in sorted({*BUDGETS, bits}) if low <= b <= high}
    held, limit = held_bytes(model, structure, compute), memory.on_device.limit
    footprint = Footprint(structure, recipe, model.config, compute, device)
    working = footprint.stages(footprint.train_room(limit - held))
    free = limit - max(working.values())
    workload = Workload.of(structure, recipe, model.config, checked.window, compute, device, free)
    return Plan(
        model=str(source.path),
        parameters=structure.parameters,
        quantized_share=quantized_share(structure, recipe),
        linears_not_quantized=structure.kept_linears,
        moe_layers=len(structure.moe_layers),
        layers=len(structure.layers),
        experts=sum(x.experts.count for _, x in structure.moe_layers if x.experts),
        original_bytes=sum(p.numel() * stored[name].itemsize for name, p in model.named_parameters()),
        sizes=sizes,
        budget=recipe.budget_text if allocation is None else f"of {allocation}",
        bits=bits,
        window=checked.window,
        windows=recipe.windows,
        tokens=workload.tokens,
        work_bytes=ladder_bytes(structure, recipe) + max(1, len(recipe.progressive)) * max(sizes.values(), default=0),
        least_bytes=held + footprint.least,
        quickest_bytes=_quickest_bytes(workload, working),
        host_bytes=LIBRARIES + (CUDA_LIBRARIES + staging_bytes(model, structure) if device.type == "cuda" else 0),
        available_bytes=limit,
        device=str(device),
        seconds={name: round(seconds, 1) for name, seconds in workload.seconds(device, compute).items()},
    )


def _quickest_bytes(workload: Workload, working: dict[str, int]) -> int:
    """What a job would hold on its device if it could: every layer, and what a stage keeps of activations.

    With less, layers are read again, and activations wait elsewhere or are computed again.
    working: bytes to compute with, by stage
    """
    recipe, layers = workload.recipe, len(workload.structure.layers)
    states = {  # inputs and outputs; what experts receive or a teacher gives; every layer's inputs and a gradient
        "ladder": 2 + bool(recipe.ladder_epochs),
        "scores": layers + 2,
        "refine": 1 + bool(recipe.layer_epochs or recipe.distil_epochs),
        "distil": 2,
    }
    of_state = workload.tokens * workload.hidden * workload.itemsize
    most = max(count + states[stage] * of_state for stage, count in working.items())
    return workload.structure.total_parameters * workload.itemsize + most


def bits_of(checked: Checked, recipe: Recipe, allocation: Path | None) -> float:
    """Nominal bits per expert weight that a recipe's budget buys, or that the allocation of a file has."""
    if allocation is not None:
        return checked.allocation.nominal_bits
    if recipe.size is not None:
        return bits_at(checked.structure, recipe, recipe.size - checked.fixed_bytes)
    if recipe.stored_bits is not None:
        return bits_at(checked.structure, recipe, recipe.stored_bits * checked.structure.expert_weights / 8)
    return DEFAULT_BITS if recipe.bits is None else recipe.bits


def experts_at(structure: Structure, recipe: Recipe, bits: float) -> int:
    """Bytes of all experts at ``bits`` nominal bits: between the sizes of the two widths around it."""
    return round(float(np.interp(bits, *_size_curve(structure, recipe))))


def bits_at(structure: Structure, recipe: Recipe, size: float) -> float:
    """Nominal bits at which all experts take ``size`` bytes: the inverse of ``experts_at``, within the widths."""
    bits, sizes = _size_curve(structure, recipe)
    return float(np.interp(size, sizes, bits))


def _size_curve(structure: Structure, recipe: Recipe) -> tuple[list[float], list[int]]:
    """Nominal bits of each width, and bytes of all experts at it; both rise."""
    sizes = [
        sum(
            x.experts.count * expert_bytes(x.experts, width, recipe.group_size)
            for _, x in structure.moe_layers
            if x.experts
        )
        for width in recipe.ladder_widths
    ]
    return [nominal_bits(width) for width in recipe.ladder_widths], sizes
