"""Saving: the packed format of an allocation, and the checkpoint with what stands next to the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemq.allocation.problem import Allocation
from gemq.calibration.windows import Windows
from gemq.checkpoint.format import TRELLIS, PackedFormat, read_quantization_config
from gemq.checkpoint.save import dense_state, write_checkpoint
from gemq.errors import UserError
from gemq.layers.reconstruction import QuantizedLayer
from gemq.layers.scheme import matrix_widths
from gemq.models.replay import Replay
from gemq.models.structure import Structure
from gemq.pipeline.card_files import about, texts
from gemq.pipeline.context import Job
from gemq.pipeline.records import digest
from gemq.pipeline.stage_settings import candidate_inputs, distillation_inputs
from gemq.quant import trellis
from gemq.quant.widths import Width
from gemq.runtime.progress import Tick

SAVE = "save"
"""Name of the stage in progress bars and in the summary."""


def make_packed_format(
    job: Job,
    structure: Structure,
    windows: Windows,
    allocation: Allocation,
    reconstructed: bool,
    gradients: str | None = None,
) -> PackedFormat:
    """The format of the checkpoint, with a fingerprint of everything that it is made from.

    ``gradients``: directory of the gradients that reconstruction uses, if any.
    """
    experts = {}
    for i, layer in structure.moe_layers:
        experts[layer.experts.path] = matrix_widths(layer, allocation.by_layer[i])
    linears: dict[str, Width] = {}
    if (dense_width := job.recipe.dense_width) is not None:
        linears = {linear.path: dense_width for layer in structure.layers for linear in layer.linears}
    inputs = distillation_inputs(job, windows) if reconstructed else candidate_inputs(job, windows)
    if gradients is not None:
        inputs["gradients"] = gradients
    fingerprint = digest({**inputs, "allocation": allocation.by_layer, "reconstructed": reconstructed})
    state_bits = trellis.STATE_BITS if job.recipe.codes == TRELLIS else 0
    return PackedFormat(experts, linears, job.recipe.group_size, fingerprint, state_bits)


def is_complete(out: Path, packed_format: PackedFormat) -> bool:
    """Whether ``out`` holds this very checkpoint already. A checkpoint appears by one rename, so it is never partial.

    Raises:
        UserError: it holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        fingerprint = read_quantization_config(out).get("fingerprint")
    except UserError:
        fingerprint = None
    if fingerprint != packed_format.fingerprint:
        raise UserError(f"{out} exists and holds something else: name another output, or delete it first")
    return True


def run_save(
    job: Job,
    replay: Replay,
    stored_dtypes: dict[str, torch.dtype],
    out: Path,
    packed_format: PackedFormat,
    layers: Iterable[QuantizedLayer],
    tuned: dict[str, Tensor],
    allocation: Allocation,
    make_record: Callable[[], dict[str, Any]],
) -> None:
    """Writes the checkpoint on the first rank.

    Args:
        job: the job.
        replay: the full-precision model.
        stored_dtypes: the type in which each parameter is stored.
        out: directory of the checkpoint.
        packed_format: of the checkpoint.
        layers: the quantized layers.
        tuned: trained routers and norms by their names inside the model.
        allocation: of the experts.
        make_record: returns what card and report page say of the job, see ``reporting.record``.
    """

    def shards(tick: Tick) -> Iterator[dict[str, Tensor]]:
        for layer in layers:
            yield layer.tensors
            tick()
        state = {**replay.stored_state(packed_format.replaced_names()), **tuned}
        stored_state = {name: tensor.to(stored_dtypes.get(name, tensor.dtype)) for name, tensor in state.items()}
        yield dense_state(replay.model, packed_format, stored_state)

    def write(tick: Tick) -> None:
        config = job.source.config()
        if not config.architectures:
            config.architectures = [type(replay.model).__name__]  # vLLM chooses its class by it
        write_checkpoint(
            out,
            config=config,
            packed_format=packed_format,
            shards=shards(tick),
            source=job.source.path,
            texts=texts(job, make_record(), allocation),
            about=about(replay.model, packed_format, allocation),
        )

    with job.monitor.stage(SAVE, len(replay.structure.layers)) as tick:
        replay.ranks.run_on_first(lambda: write(tick))
