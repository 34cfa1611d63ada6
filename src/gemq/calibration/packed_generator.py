"""A packed copy of a model, to write windows in its place where memory does not hold the model itself.

Experts are rounded to nearest at one width, the widest that fits; other linears at 8 bits. Nothing is calibrated: this
is what the windows for calibrating are written with. The copy is a checkpoint beside the work directory's results, made
a layer at a time and removed when the windows are there.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemq.checkpoint.format import PackedFormat
from gemq.checkpoint.load import load
from gemq.checkpoint.save import dense_state, write_checkpoint
from gemq.errors import UserError
from gemq.models.byte_sizes import expert_bytes
from gemq.models.experts import expert_weight
from gemq.models.replay import Replay
from gemq.models.source import Source
from gemq.models.structure import Structure
from gemq.quant.gptq import round_to_nearest
from gemq.quant.grid import Quantized
from gemq.quant.packing import PackedMatrix
from gemq.quant.widths import LEVELS, Width, group_size_for, matrix_bytes
from gemq.runtime.memory import Memory, gigabytes

LINEAR_BITS = 8
GROUP_SIZE = 128
ROUNDED_TOGETHER = 1 << 26
"""Weights that are rounded at once: rounding holds several float32 copies of them."""


def copy_bytes(structure: Structure, width: Width, outside: int) -> int:
    """Bytes of a copy with experts at ``width``; ``outside`` those of embeddings, norms and head."""
    linears = sum(
        matrix_bytes(x.rows, x.columns, LINEAR_BITS, group_size_for(x.columns, GROUP_SIZE))
        for layer in structure.layers
        for x in layer.linears
    )
    experts = sum(
        layer.experts.count * expert_bytes(layer.experts, width, GROUP_SIZE)
        for _, layer in structure.moe_layers
        if layer.experts
    )
    return outside + linears + experts


def widest_copy(structure: Structure, outside: int, beside: int, memory: Memory) -> Width:
    """The widest width at which a copy fits into all of the device's bound with ``beside`` bytes for its caches.

    Raises UserError when none does.
    """
    for width in sorted(LEVELS, reverse=True):
        if copy_bytes(structure, width, outside) + beside <= memory.on_device.limit:
            return width
    least = copy_bytes(structure, min(LEVELS), outside) + beside
    raise UserError(
        f"{memory.flag} {gigabytes(memory.on_device.limit)} do not hold even a copy of the model at 1 bit, which is to "
        f"write windows: give at least {memory.flag} {gigabytes(least)}"
    )


@contextmanager
def packed_copy(replay: Replay, source: Source, width: Width, directory: Path) -> Iterator[Any]:
    """The copy, loaded on the device, while the layers of ``replay`` are put away. ``directory`` must not exist."""
    shutil.rmtree(directory, ignore_errors=True)  # of a job that was killed
    try:
        _write(replay, source, width, directory)
        assert replay.residency is not None
        with replay.residency.away():
            model = load(directory, str(replay.device), replay.model.dtype, trust_remote_code=source.trust_remote_code)
            yield model
            del model
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _write(replay: Replay, source: Source, width: Width, directory: Path) -> None:
    structure = replay.structure
    experts = {
        layer.experts.path: {m.name: (width,) * layer.experts.count for m in layer.experts.matrices}
        for _, layer in structure.moe_layers
        if layer.experts
    }
    linears = {x.path: float(LINEAR_BITS) for layer in structure.layers for x in layer.linears}
    packed_format = PackedFormat(experts, linears, GROUP_SIZE)

    def shards() -> Iterator[dict[str, Tensor]]:
        for index in replay.walk(range(len(structure.layers))):
            yield _rounded_layer(replay, index, width)
        rest = replay.unpacked(packed_format.replaced_names())
        yield dense_state(replay.model, packed_format, {name: tensor.cpu() for name, tensor in rest.items()})

    write_checkpoint(
        directory,
        config=source.config(),
        packed_format=packed_format,
        shards=shards(),
        source=source.path,
        model_card="",
    )


@torch.no_grad()
def _rounded_layer(replay: Replay, index: int, width: Width) -> dict[str, Tensor]:
    """A layer's packed tensors by their checkpoint names."""
    layer = replay.structure.layers[index]
    tensors: dict[str, Tensor] = {}
    for linear in layer.linears:
        weight = replay.model.get_submodule(linear.path).weight.unsqueeze(0)
        (packed,) = _rounded(weight, float(LINEAR_BITS))
        tensors.update(packed.named(linear.path))
    if layer.experts is not None:
        module = replay.model.get_submodule(layer.experts.path)
        for matrix in layer.experts.matrices:
            for e, packed in enumerate(_rounded(expert_weight(module, matrix.name), width)):
                tensors.update(packed.named(f"{layer.experts.path}.{e}.{matrix.name}"))
    return tensors


def _rounded(weight: Tensor, width: Width) -> Iterator[PackedMatrix]:
    """Each of the matrices [E, R, C] rounded to nearest and packed, on the CPU."""
    group = group_size_for(weight.shape[-1], GROUP_SIZE)
    for part in weight.split(max(1, ROUNDED_TOGETHER // weight[0].numel())):
        q = round_to_nearest(part, (width,), group)
        packed = PackedMatrix.pack(Quantized(*(t[0] for t in q)), width, group)
        parts = [t.cpu() for t in packed]
        for e in range(len(part)):
            yield PackedMatrix(*(t[e].clone() for t in parts))
