"""Loading: the full-precision model is opened and verified, and memory for the stages' arithmetic is reserved."""

from __future__ import annotations

from typing import Any

import torch

from gemq.calibration.sources import host_bytes
from gemq.models.layer_cache import LayerCache
from gemq.models.library_errors import one_line_errors
from gemq.models.replay import Replay
from gemq.models.source import pick_dtype
from gemq.models.structure import Structure, find_structure
from gemq.pipeline.context import Job
from gemq.pipeline.equalization_stage import run_equalization
from gemq.pipeline.stage_costs import Footprint
from gemq.planning.memory_model import held_bytes, staging_bytes

LOAD = "load"
"""Name of the stage in progress bars and in the summary."""

PROBE_TOKENS = 16
"""Length of the text on which the replay is compared with the model's own forward."""


def run_load(job: Job, verify: bool = True) -> tuple[Replay, dict[str, torch.dtype]]:
    """Opens the full-precision model and reserves memory for the stages' arithmetic.

    Args:
        job: the job, which learns how much memory its stages may use.
        verify: compare the replay with the model's own forward. This reads one layer of each kind.

    Returns:
        The model, ready to be replayed layer by layer, and the type in which each parameter is stored.
    """
    with job.monitor.stage(LOAD, 1) as tick:
        dtype = pick_dtype(job.recipe.dtype, job.device)
        model, reader = job.source.open(job.device, dtype)
        job.fallbacks["matrices_left_out"] = len(job.source.left_out)
        structure = find_structure(model)
        layer_cache = LayerCache(model, structure, reader, job.memory, dtype)
        _reserve_memory(job, model, structure, dtype)
        with one_line_errors(f"{job.source.path} cannot be run", "correct its config.json, or copy the model again"):
            replay = Replay(model, structure, layer_cache, job.work.ranks)
            vocabulary = model.config.get_text_config().vocab_size
            probe = torch.arange(PROBE_TOKENS, device=job.device).unsqueeze(0) % vocabulary
            with layer_cache.with_one_layer_per_kind():
                if verify:
                    replay.verify(probe)
                run_equalization(job, replay, layer_cache, probe)
        tick()
    return replay, reader.types


def _reserve_memory(job: Job, model: Any, structure: Structure, dtype: torch.dtype) -> None:
    """Reserves what a job holds throughout, apart from layers and activations: staging, texts, and working memory."""
    on_gpu = job.device.type == "cuda"
    text_bytes = host_bytes(job.recipe.calibration)
    if on_gpu:
        job.memory.host.reserve(staging_bytes(model, structure))
    job.memory.host.reserve(text_bytes)
    resident_bytes = held_bytes(model, structure, dtype) + (0 if on_gpu else text_bytes)
    footprint = Footprint(structure, job.recipe, model.config, dtype, job.device)
    job.training_bytes = footprint.training_bytes(job.memory.on_device.limit - resident_bytes)
    job.working_bytes = footprint.working_bytes(job.training_bytes)
    reserved = job.memory.try_reserve(job.working_bytes)
    assert reserved, "bounds are checked before a job begins"
