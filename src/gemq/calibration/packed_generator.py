"""The generator copy: a packed copy of a model that writes windows if memory does not hold the model itself.

Experts are rounded to nearest at one width, the widest that fits, and other linears at 8 bits. Nothing is calibrated,
since the windows for calibration do not exist yet. The copy is a checkpoint in the work directory. It is made one layer
at a time and removed once the windows are written.
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
from gemq.models.fused_norms import use_fused_rotary
from gemq.models.replay import Replay
from gemq.models.source import Source
from gemq.models.structure import Structure
from gemq.quant.gptq import round_to_nearest
from gemq.quant.packing import PackedMatrix
from gemq.quant.widths import Width, group_size_for
from gemq.runtime.fallbacks import optional
from gemq.runtime.memory import MemoryBudget, gigabytes

LINEAR_WIDTH = Width.EIGHT_BIT
GROUP_SIZE = 128
ROUNDING_CHUNK = 1 << 26
"""Upper bound for the weights that are rounded in one call, which holds several float32 copies of them."""


def generator_bytes(structure: Structure, width: Width, outside: int) -> int:
    """Bytes of a generator copy.

    Args:
        structure: of the model.
        width: of the experts.
        outside: bytes of embeddings, norms and head.
    """
    total = outside
    for layer in structure.layers:
        for linear in layer.linears:
            group_size = group_size_for(linear.columns, GROUP_SIZE)
            total += LINEAR_WIDTH.matrix_bytes(linear.rows, linear.columns, group_size)
        if layer.experts:
            total += layer.experts.count * expert_bytes(layer.experts, width, GROUP_SIZE)
    return total


def widest_generator(structure: Structure, outside: int, reserved_bytes: int, memory: MemoryBudget) -> Width:
    """The widest width at which a generator copy fits into the device's memory limit.

    Args:
        structure: of the model.
        outside: bytes of embeddings, norms and head.
        reserved_bytes: must stay free for key-value caches.
        memory: its limit on the device counts, whatever else is allocated now.

    Raises:
        UserError: no copy fits.
    """
    for width in sorted(Width, reverse=True):
        if generator_bytes(structure, width, outside) + reserved_bytes <= memory.on_device.limit:
            return width
    required = generator_bytes(structure, min(Width), outside) + reserved_bytes
    raise UserError(
        f"{memory.flag} {gigabytes(memory.on_device.limit)} are too small even for the 1-bit copy of the model that "
        f"generates calibration text: give at least {memory.flag} {gigabytes(required)}"
    )


@contextmanager
def packed_generator_copy(replay: Replay, source: Source, width: Width, directory: Path) -> Iterator[Any]:
    """Makes the generator copy and loads it on the device. The layers of ``replay`` are offloaded meanwhile.

    Args:
        replay: the full-precision model.
        source: its files.
        width: of the copy's experts.
        directory: of the copy, removed at the end. A directory of a killed job is overwritten.
    """
    shutil.rmtree(directory, ignore_errors=True)
    try:
        _write_copy(replay, source, width, directory)
        assert replay.layer_cache is not None
        with replay.layer_cache.released():
            model = load(directory, str(replay.device), replay.model.dtype, trust_remote_code=source.trust_remote_code)
            if replay.device.type == "cuda":
                with optional("rotary_not_fused"):
                    use_fused_rotary(model)
            yield model
            del model
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _write_copy(replay: Replay, source: Source, width: Width, directory: Path) -> None:
    """Writes the checkpoint of the generator copy."""
    structure = replay.structure
    experts: dict[str, dict[str, tuple[Width, ...]]] = {}
    linears: dict[str, Width] = {}
    for layer in structure.layers:
        linears.update((linear.path, LINEAR_WIDTH) for linear in layer.linears)
        if layer.experts:
            widths = (width,) * layer.experts.count
            experts[layer.experts.path] = {matrix.name: widths for matrix in layer.experts.matrices}
    packed_format = PackedFormat(experts, linears, GROUP_SIZE)

    def shards() -> Iterator[dict[str, Tensor]]:
        for index in replay.walk(range(len(structure.layers))):
            yield _pack_layer(replay, index, width)
        unpacked = replay.stored_state(packed_format.replaced_names())
        cpu_tensors = {name: tensor.cpu() for name, tensor in unpacked.items()}
        yield dense_state(replay.model, packed_format, cpu_tensors)

    write_checkpoint(
        directory,
        config=source.config(),
        packed_format=packed_format,
        shards=shards(),
        source=source.path,
    )


@torch.no_grad()
def _pack_layer(replay: Replay, index: int, width: Width) -> dict[str, Tensor]:
    """A layer's packed tensors by their names in the checkpoint."""
    layer = replay.structure.layers[index]
    tensors: dict[str, Tensor] = {}
    for linear in layer.linears:
        weight = replay.model.get_submodule(linear.path).weight.unsqueeze(0)
        (packed,) = _round_and_pack(weight, LINEAR_WIDTH)
        tensors.update(packed.named(linear.path))
    if layer.experts is not None:
        module = replay.model.get_submodule(layer.experts.path)
        for matrix in layer.experts.matrices:
            for expert, packed in enumerate(_round_and_pack(expert_weight(module, matrix.name), width)):
                tensors.update(packed.named(f"{layer.experts.path}.{expert}.{matrix.name}"))
    return tensors


def _round_and_pack(weight: Tensor, width: Width) -> Iterator[PackedMatrix]:
    """Yields each of the matrices [E, R, C] rounded to nearest and packed, on the CPU."""
    group_size = group_size_for(weight.shape[-1], GROUP_SIZE)
    matrices_per_chunk = max(1, ROUNDING_CHUNK // weight[0].numel())
    for chunk in weight.split(matrices_per_chunk):
        quantized = round_to_nearest(chunk, (width,), group_size).select(0)
        packed = PackedMatrix.pack(quantized, width).map(Tensor.cpu)
        for expert in range(len(chunk)):
            yield packed.select(expert).map(Tensor.clone)
