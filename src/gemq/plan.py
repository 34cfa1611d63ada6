"""The dry run: what a job would do to a model, from its configuration alone.

Checkpoint sizes are exact but for rounding the budget. Memory and disk are estimates, and times rest on counted work
(``workload``) and a second's measurement of this machine (``machine``); reading and writing files is not in them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch

from gemq.models.source import Source, calibration_window, configured_types, pick_dtype
from gemq.models.structure import Structure, find_structure
from gemq.quant.widths import nominal_bits
from gemq.recipe import DEFAULT_BITS, Recipe
from gemq.resources.footprint import Footprint, held_bytes, staging_bytes
from gemq.resources.memory import Memory
from gemq.sizes import expert_bytes, ladder_bytes, linear_bytes, other_bytes, quantized_share
from gemq.workload import Workload

LIBRARIES, CUDA_LIBRARIES = 430_000_000, 900_000_000
"""Bytes of host memory that Python, PyTorch, Transformers and a tokenizer take before anything is loaded; CUDA's."""

BUDGETS = (1.5, 2.0, 2.5, 3.0)


@dataclass
class Plan:
    """What ``quantize`` would need and give.

    sizes:   bytes of the checkpoint's tensors by nominal bits per expert weight
    least_bytes, quickest_bytes: of memory on ``device`` with which the job runs at all, and with which nothing waits
    host_bytes: of host memory beside that (on a GPU: on which layers are read)
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
    window: int
    windows: int
    tokens: int
    work_bytes: int
    least_bytes: int
    quickest_bytes: int
    host_bytes: int
    device: str
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(source: Source, recipe: Recipe, device: torch.device) -> Plan:
    """The plan for a model and a recipe. Needs no weights. Raises UserError when the model cannot be quantized."""
    model = source.skeleton()
    structure = find_structure(model)
    stored = configured_types(model)
    fixed = other_bytes(model, structure, recipe, stored) + linear_bytes(structure, recipe)
    wanted = sorted({*BUDGETS, recipe.bits or DEFAULT_BITS})
    low, high = (nominal_bits(f(recipe.ladder_widths)) for f in (min, max))
    sizes = {f"{bits:g}": fixed + experts_at(structure, recipe, bits) for bits in wanted if low <= bits <= high}
    window = calibration_window(model.config, recipe.window)
    compute = pick_dtype(recipe.dtype, device)
    held, limit = held_bytes(model, structure, compute), Memory.bounded(device, None, None, None).on_device.limit
    footprint = Footprint(structure, recipe, model.config, compute, device)
    working = footprint.stages(footprint.train_room(limit - held))
    free = limit - max(working.values())
    workload = Workload.of(structure, recipe, model.config, window, compute, device, free)
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
        budget=recipe.budget_text,
        window=window,
        windows=recipe.windows,
        tokens=workload.tokens,
        work_bytes=ladder_bytes(structure, recipe) + max(1, len(recipe.progressive)) * max(sizes.values(), default=0),
        least_bytes=held + footprint.least,
        quickest_bytes=_quickest_bytes(workload, working),
        host_bytes=LIBRARIES + (CUDA_LIBRARIES + staging_bytes(model, structure) if device.type == "cuda" else 0),
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


def experts_at(structure: Structure, recipe: Recipe, bits: float) -> int:
    """Bytes of all experts at ``bits`` nominal bits: between the sizes of the two widths around it."""
    widths = recipe.ladder_widths

    def total(width: float) -> int:
        return sum(
            x.experts.count * expert_bytes(x.experts, width, recipe.group_size)
            for _, x in structure.moe_layers
            if x.experts
        )

    for a, b in pairwise(widths):
        low, high = nominal_bits(a), nominal_bits(b)
        if low <= bits <= high:
            return round(total(a) + (total(b) - total(a)) * (bits - low) / (high - low))
    return total(widths[-1])
