"""The dry run: what a job would do to a model, from its configuration alone.

It refuses what ``quantize`` would refuse before computing, as far as no weights are needed for that. Checkpoint sizes
are exact but for rounding of the budget. Memory and disk are estimates. Times are rough estimates, which count neither
files nor compilation (``planning.cost_model``).
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gemq.models.byte_sizes import candidate_bytes, parameter_bytes, quantized_share
from gemq.models.source import Source, configured_types, pick_dtype
from gemq.models.structure import find_structure
from gemq.pipeline.candidates_stage import CANDIDATES
from gemq.pipeline.codes_stage import expected_recipe
from gemq.pipeline.fit import Fit, fit
from gemq.pipeline.preflight import Checked, check_model
from gemq.pipeline.reconstruction_stage import DISTILL, RECONSTRUCTION
from gemq.pipeline.scores_stage import SCORES
from gemq.pipeline.stage_costs import Footprint, JobStages, check_bounds, stage_seconds
from gemq.planning.cost_model import Workload
from gemq.planning.expert_sizes import bits_at, experts_at
from gemq.planning.memory_model import held_bytes, staging_bytes
from gemq.recipe import Recipe
from gemq.recipe_defaults import DEFAULT_BITS
from gemq.runtime.device import pick_device
from gemq.runtime.memory import MemoryBudget

LIBRARY_BYTES, CUDA_LIBRARY_BYTES = 430_000_000, 900_000_000
"""Host memory that Python, PyTorch, Transformers and a tokenizer take before anything is loaded, and CUDA's."""

TABLE_BUDGETS = (1.5, 2.0, 2.5, 3.0)
"""Budgets in bits whose checkpoint sizes are shown."""


@dataclass
class Plan:
    """What ``quantize`` would need and produce. ``plan`` returns it.

    Checkpoint sizes are exact except for the rounding of the budget. Memory, disk and time are estimates. Times count
    neither files nor compilation.

    Attributes:
        model: directory of the model's files.
        parameters: number of parameters by kind, as in ``Result``.
        quantized_share: share of the parameters that are quantized, from 0 to 1.
        linears_not_quantized: paths of large weights in decoder layers that stay unquantized.
        moe_layers: number of layers with routed experts.
        layers: number of decoder layers.
        experts: number of routed experts in all layers.
        original_bytes: bytes of the full-precision model's tensors.
        sizes: bytes of the checkpoint's tensors by nominal bits per expert weight, such as ``"2.5"``.
        budget: the budget, such as ``2 bits``.
        bits: nominal bits per expert weight that the budget buys.
        codes: kind of the experts' codes that everything is counted for, ``affine`` or ``trellis``.
        is_codes_open: whether the job takes affine codes instead if it cannot equalize the experts' inputs. Only a
            job can tell, since it has the weights.
        seq_len: tokens per calibration window.
        num_windows: number of calibration windows of the recipe, without those that the effort adds.
        tokens: calibration tokens, with those that the effort adds.
        work_bytes: bytes of the work directory on disk.
        least_bytes: bytes of memory on ``device`` with which the job runs at all.
        quickest_bytes: bytes of memory on ``device`` with which nothing is offloaded or read again.
        host_bytes: bytes of host memory in addition. On a GPU layers are read through it.
        available_bytes: bytes of memory on ``device`` that a job started now would take at most.
        device: the device, such as ``cpu``.
        seconds: expected seconds of each stage on ``device``.
        fit: what fits into the memory of a GPU that serves the model, if a memory was named.
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
    codes: str
    is_codes_open: bool
    seq_len: int
    num_windows: int
    tokens: int
    work_bytes: int
    least_bytes: int
    quickest_bytes: int
    host_bytes: int
    available_bytes: int
    device: str
    seconds: dict[str, float]
    fit: Fit | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as ``gemq plan --json`` writes them."""
        return asdict(self)


def plan(
    model: str | Path,
    recipe: Recipe | None = None,
    *,
    allocation: str | Path | None = None,
    device: str = "auto",
    gpu_memory: int | None = None,
    host_memory: int | None = None,
    memory: int | None = None,
    context: int | None = None,
    batch: int = 1,
    gpus: int = 1,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Plan a job from the model's configuration. No weights are read, and none of a hub id are downloaded.

    Args:
        model: as for ``quantize``.
        recipe: as for ``quantize``.
        allocation: as for ``quantize``.
        device: the device to plan for: ``auto``, ``cpu`` or ``cuda``. Its speed is measured for a second.
        gpu_memory: limit in bytes, as for ``quantize``.
        host_memory: limit in bytes, as for ``quantize``.
        memory: bytes of a GPU that is to serve the model. The plan is for the largest budget that fits, unless the
            recipe has a budget, and its ``fit`` says what other budgets leave. None: no matter.
        context: tokens of a sequence that is served. None: 8192, or the model's maximum if that is less.
        batch: sequences that are served at the same time.
        gpus: GPUs with ``memory`` bytes each that share the model.
        revision: as for ``quantize``.
        trust_remote_code: as for ``quantize``.

    Returns:
        Sizes, memory, disk and time of the job.

    Raises:
        UserError: the model, the recipe, the calibration texts or the limits cannot be used, or no budget fits into
            ``memory``. Without limits a model may be too large for this machine: a plan may be for another one.
    """
    source = Source.resolve(str(model), revision=revision, trust_remote_code=trust_remote_code, weights=False)
    if os.path.exists(model) and any(source.path.glob("*.safetensors")):  # a hub id's cache may lack some of them
        source.check_weights()
    allocation_file = None if allocation is None else Path(allocation)
    recipe = recipe or Recipe()
    job_device = pick_device(device)
    largest = None
    if memory is not None:
        skeleton = source.skeleton()
        structure = find_structure(skeleton)
        expected = expected_recipe(recipe, job_device, structure)
        largest = fit(skeleton, structure, expected, memory, context=context, batch=batch, gpus=gpus)
        if allocation is None and not recipe.has_budget:
            recipe = recipe.replace(bits=largest.bits)
    job = _plan(source, recipe, allocation_file, job_device, gpu_memory, host_memory)
    return replace(job, fit=largest)


def _plan(
    source: Source,
    recipe: Recipe,
    allocation: Path | None,
    device: torch.device,
    gpu_memory: int | None,
    host_memory: int | None,
) -> Plan:
    """Plans a job on a device. See ``plan``."""
    memory = MemoryBudget.bounded(device, gpu_memory, host_memory, None)
    checked = check_model(source, recipe, allocation, device, reconstruct=recipe.reconstruct)
    is_codes_open = recipe.codes == "auto" and checked.recipe.codes == "trellis"
    model, structure, recipe = checked.model, checked.structure, checked.recipe
    dtype = pick_dtype(recipe.dtype, device)
    footprint = Footprint(structure, recipe, model.config, dtype, device)
    if gpu_memory is not None or host_memory is not None:
        check_bounds(memory, footprint, model)
    limit = memory.on_device.limit
    resident_bytes = held_bytes(model, structure, dtype)
    working_bytes = footprint.peak_bytes_by_stage(footprint.training_bytes(limit - resident_bytes))
    free_bytes = limit - max(working_bytes.values())
    workload = Workload(structure, recipe, model.config, checked.seq_len, dtype, device, free_bytes)
    stages = JobStages.of(recipe, allocation, reconstruct=recipe.reconstruct)
    seconds = stage_seconds(workload, stages)
    bits = bits_of(checked, recipe, allocation)
    sizes = _checkpoint_sizes(checked, recipe, bits)
    host_bytes = LIBRARY_BYTES
    if device.type == "cuda":
        host_bytes += CUDA_LIBRARY_BYTES + staging_bytes(model, structure)
    return Plan(
        model=str(source.path),
        parameters=structure.parameters,
        quantized_share=quantized_share(structure, recipe),
        linears_not_quantized=structure.unquantized_linears,
        moe_layers=len(structure.moe_layers),
        layers=len(structure.layers),
        experts=sum(layer.experts.count for _, layer in structure.moe_layers),
        original_bytes=parameter_bytes(model, configured_types(model)),
        sizes=sizes,
        budget=recipe.budget_text if allocation is None else f"of {allocation}",
        bits=bits,
        codes="trellis" if recipe.codes == "trellis" else "affine",
        is_codes_open=is_codes_open,
        seq_len=checked.seq_len,
        num_windows=recipe.num_windows,
        tokens=workload.tokens,
        work_bytes=candidate_bytes(structure, recipe)
        + max(1, len(recipe.progressive)) * max(sizes.values(), default=0),
        least_bytes=resident_bytes + footprint.min_working_bytes,
        quickest_bytes=_quickest_bytes(workload, working_bytes),
        host_bytes=host_bytes,
        available_bytes=limit,
        device=str(device),
        seconds={name: round(value, 1) for name, value in seconds.items()},
    )


def _checkpoint_sizes(checked: Checked, recipe: Recipe, bits: float) -> dict[str, int]:
    """Bytes of the checkpoint at ``bits`` and at other budgets, by nominal bits."""
    low, high = min(recipe.candidate_widths).bits, max(recipe.candidate_widths).bits
    sizes = {}
    for budget in sorted({*TABLE_BUDGETS, bits}):
        if low <= budget <= high:
            sizes[f"{budget:.4g}"] = checked.fixed_bytes + experts_at(checked.structure, recipe, budget)
    return sizes


def _quickest_bytes(workload: Workload, working_bytes: dict[str, int]) -> int:
    """Bytes on the device with which every layer stays there, and all activations that a stage keeps.

    With less, layers are read again, and activations are offloaded or computed again.

    Args:
        workload: the job.
        working_bytes: to compute with, by stage.
    """
    recipe, structure = workload.recipe, workload.structure
    states = {
        CANDIDATES: 3 if recipe.candidate_epochs else 2,  # inputs, outputs, and what experts receive
        SCORES: len(structure.layers) + 2,  # every layer's inputs, the current state, a gradient
        RECONSTRUCTION: 2 if recipe.reconstruction_epochs or recipe.distill_epochs else 1,  # inputs, and the teacher's
        DISTILL: 2,
    }
    itemsize = workload.dtype.itemsize
    state_bytes = workload.tokens * workload.text_config.hidden_size * itemsize
    peaks = [working + states[stage] * state_bytes for stage, working in working_bytes.items()]
    return structure.total_parameters * itemsize + max(peaks)


def bits_of(checked: Checked, recipe: Recipe, allocation: Path | None) -> float:
    """Nominal bits per expert weight that a recipe's budget buys, or that the allocation of a file has."""
    if allocation is not None:
        return checked.allocation.nominal_bits
    if recipe.size is not None:
        return bits_at(checked.structure, recipe, recipe.size - checked.fixed_bytes)
    if recipe.stored_bits is not None:
        return bits_at(checked.structure, recipe, recipe.stored_bits * checked.structure.expert_weights / 8)
    return DEFAULT_BITS if recipe.bits is None else recipe.bits
