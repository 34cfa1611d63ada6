"""The chosen widths applied: assembled from the ladder, or quantized again on the quantized model's activations.

Either way a layer ends as the tensors of the checkpoint. Knows one layer at a time, no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemq.calibration.activations import Activations, layer_moments
from gemq.layers.candidates import LayerLadder, Quantizer, linear_parameters, quantize_linears
from gemq.layers.training import QuantizedParameter, Training, as_parameter, train_layer
from gemq.models.expert_parallel import can_shard_windows, join_experts, own_experts
from gemq.models.experts import expert_weight
from gemq.models.replay import Replay
from gemq.models.structure import Layer, Linear, Matrix
from gemq.quant.grid import Quantized, dequantize, dequantize_each
from gemq.quant.packing import PackedMatrix
from gemq.quant.trainable_gpu import latent_type
from gemq.quant.widths import ExpertWidths, Width, group_size_for
from gemq.runtime.activation_store import Batches

TUNED = "tuned:"


@dataclass(frozen=True)
class Targets:
    """What reconstruction trains a layer towards, and how.

    hidden: the full-precision layer's outputs [B, S, H], one per micro-batch of this rank
    stored: the type in which each parameter of the model is kept
    """

    hidden: Batches
    stored: dict[str, torch.dtype]
    training: Training


@dataclass
class RefinedLayer:
    """A finished layer.

    tensors: as they stand in the checkpoint
    tuned:   trained routers and norms by their name inside the model, float32
    retries: Hessians that needed more damping
    before, after: relative error of the layer's output on held-out windows, without and with training (0 if untrained)
    """

    tensors: dict[str, Tensor]
    tuned: dict[str, Tensor] = field(default_factory=dict)
    retries: int = 0
    before: float = 0.0
    after: float = 0.0

    def to_tensors(self) -> dict[str, Tensor]:
        notes = torch.tensor([self.retries, self.before, self.after], dtype=torch.float64)
        return {**self.tensors, **{TUNED + name: t for name, t in self.tuned.items()}, "notes": notes}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> RefinedLayer:
        retries, before, after = tensors.pop("notes").tolist()
        tuned = {name.removeprefix(TUNED): tensors.pop(name) for name in list(tensors) if name.startswith(TUNED)}
        return cls(tensors, tuned, int(retries), before, after)


def matrix_widths(layer: Layer, widths: Sequence[ExpertWidths]) -> dict[str, tuple[Width, ...]]:
    """The width of every expert by the name of the matrix; empty for a dense layer."""
    matrices = layer.experts.matrices if layer.experts is not None else ()
    return {matrix.name: tuple(both[i] for both in widths) for i, matrix in enumerate(matrices)}


def assemble_layer(ladder: LayerLadder, layer: Layer, widths: Sequence[ExpertWidths]) -> RefinedLayer:
    """A layer with each expert's codes picked from the ladder."""
    tensors: dict[str, Tensor] = {}
    for path, packed in ladder.linears.items():
        tensors.update(_row(packed, 0).named(path))
    for name, own in matrix_widths(layer, widths).items():
        assert layer.experts is not None
        for e, width in enumerate(own):
            tensors.update(_row(ladder.experts[name][width], e).named(f"{layer.experts.path}.{e}.{name}"))
    return RefinedLayer(tensors)


def refine_layer(
    replay: Replay,
    index: int,
    activations: Activations,
    quantizer: Quantizer,
    widths: Sequence[ExpertWidths],
    dense_bits: int,
    targets: Targets | None = None,
) -> RefinedLayer:
    """Quantizes layer ``index`` at its chosen widths on ``activations``, which the quantized layers before it made.

    Attention first; everything behind it then sees the quantized attention's output. With ``targets`` the layer is
    then trained (see ``reconstruct``). Leaves the finished weights in the model.
    """
    layer, model, ranks = replay.structure.layers[index], replay.model, replay.ranks
    result = LayerLadder()
    linears = layer.linears if dense_bits < 16 else ()
    latents: dict[str, Tensor] | None = {} if targets is not None else None
    attention = [x for x in linears if x.kind == "attention"]
    if attention:
        moments, _ = layer_moments(replay, index, activations, attention, None, with_outputs=False)
        quantize_linears(replay, attention, moments, quantizer, dense_bits, result, latents)
        install_linears(model, attention, result.linears, dense_bits, quantizer.group_size)
    others = [x for x in linears if x.kind != "attention"]
    own = own_experts(model, layer.experts, ranks) if layer.experts is not None else None
    moments, _ = layer_moments(replay, index, activations, others, own, with_outputs=False)
    quantize_linears(replay, others, moments, quantizer, dense_bits, result, latents)
    install_linears(model, others, result.linears, dense_bits, quantizer.group_size)
    found: list[QuantizedParameter] = []
    of_matrices = matrix_widths(layer, widths)
    if layer.experts is not None and own is not None and moments.experts is not None:
        module = model.get_submodule(layer.experts.path)
        retried = 0
        for matrix, moment in zip(layer.experts.matrices, moments.experts, strict=True):
            weight = expert_weight(module, matrix.name)[own]
            dtype = latent_type(weight.device, weight.dtype)
            before = None if targets is None else weight.new_empty(weight.shape, dtype=dtype)
            at = of_matrices[matrix.name][own]
            q, retries = quantizer.own_width(weight, moment, at, before)
            found.append(QuantizedParameter(f"{layer.experts.path}.{matrix.name}", at, q, before))
            retried += retries
        everything = own.stop - own.start == layer.experts.count
        result.retries += retried if everything else ranks.all_reduce_int(retried)
        del moments, moment  # as large as what training takes
    refined = RefinedLayer({}, retries=result.retries)
    if targets is not None and latents is not None:
        found += linear_parameters(linears, result, quantizer, dense_bits, latents)
        sharded = activations.can_shard_windows(ranks) and (
            layer.experts is None or can_shard_windows(model, layer.experts, ranks)
        )
        every, goals = activations.to_train(replay, sharded), activations.share(replay, targets.hidden, sharded)
        found, refined.tuned, refined.before, refined.after = train_layer(
            replay, index, every, goals, found, targets.training, targets.stored, sharded=sharded
        )
    grids = {x.name: _of_all_ranks(replay, layer, x) for x in found}
    for linear in linears:
        packed = result.linears[linear.path]
        if f"{linear.path}.weight" in grids:
            packed = PackedMatrix.pack(grids[f"{linear.path}.weight"], dense_bits, quantizer.group(linear.columns))
        refined.tensors.update(_row(packed, 0).named(linear.path))
    if layer.experts is not None:
        for matrix in layer.experts.matrices:
            q, group = grids[f"{layer.experts.path}.{matrix.name}"], quantizer.group(matrix.columns)
            for width, some in _together(matrix, of_matrices[matrix.name]):
                packed = PackedMatrix.pack(Quantized(*(t[some] for t in q)), width, group)
                for row, e in enumerate(some):
                    refined.tensors.update(_row(packed, row).named(f"{layer.experts.path}.{e}.{matrix.name}"))
    install_layer(model, layer, refined, widths, dense_bits, quantizer.group_size)
    return refined


TOGETHER = 1 << 28
"""Codes of experts of one width that are packed or unpacked together."""


def _together(matrix: Matrix, widths: Sequence[Width]) -> Iterator[tuple[Width, list[int]]]:
    """Experts of one width, as many as are packed or unpacked together."""
    most = max(1, TOGETHER // (matrix.rows * matrix.columns))
    for width in sorted(set(widths)):
        which = [e for e, own in enumerate(widths) if own == width]
        yield from ((width, which[start : start + most]) for start in range(0, len(which), most))


def _of_all_ranks(replay: Replay, layer: Layer, parameter: QuantizedParameter) -> Quantized:
    """A parameter's grids, those of experts put together from all ranks."""
    ranks, q = replay.ranks, parameter.q
    if layer.experts is not None and parameter.name.startswith(f"{layer.experts.path}."):
        return Quantized(*join_experts(replay.model, layer.experts, ranks, q))
    return Quantized(*(ranks.broadcast(t, 0) for t in q))


def install_linears(
    model: Any, linears: Sequence[Linear], packed: dict[str, PackedMatrix], bits: int, group_size: int
) -> None:
    """Overwrites dense linears' weights with what their codes mean."""
    for linear in linears:
        q = packed[linear.path].unpack(bits, group_size_for(linear.columns, group_size))
        weight = model.get_submodule(linear.path).weight
        weight.data.copy_(dequantize(q).reshape(weight.shape))


def layer_overrides(
    model: Any, layer: Layer, refined: RefinedLayer, widths: Sequence[ExpertWidths], dense_bits: int, group_size: int
) -> dict[str, Tensor]:
    """What a finished layer's tensors make of the model's parameters, by their names inside the model."""
    overrides = {}
    for linear in layer.linears if dense_bits < 16 else ():
        q = _named(refined.tensors, linear.path).unpack(dense_bits, group_size_for(linear.columns, group_size))
        name = f"{linear.path}.weight"
        overrides[name] = as_parameter(model, name, dequantize(q).unsqueeze(0))
    of_matrices = matrix_widths(layer, widths)
    for matrix in layer.experts.matrices if layer.experts is not None else ():
        assert layer.experts is not None
        group = group_size_for(matrix.columns, group_size)
        name = f"{layer.experts.path}.{matrix.name}"
        device = refined.tensors[f"{layer.experts.path}.0.{matrix.name}.codes"].device
        dtype = model.get_parameter(name).dtype
        weight = torch.empty(len(widths), matrix.rows, matrix.columns, dtype=dtype, device=device)
        for width, some in _together(matrix, of_matrices[matrix.name]):
            each = [_named(refined.tensors, f"{layer.experts.path}.{e}.{matrix.name}") for e in some]
            q = PackedMatrix(*(torch.stack(parts) for parts in zip(*each, strict=True))).unpack(width, group)
            weight[some] = dequantize_each(q, dtype)
        overrides[name] = as_parameter(model, name, weight)
    for name, tensor in refined.tuned.items():
        overrides[name] = tensor.to(model.get_parameter(name).dtype)
    return overrides


@torch.no_grad()
def install_layer(
    model: Any, layer: Layer, refined: RefinedLayer, widths: Sequence[ExpertWidths], dense_bits: int, group_size: int
) -> None:
    """Overwrites a whole layer's quantized and tuned weights with what its checkpoint tensors mean."""
    for name, tensor in layer_overrides(model, layer, refined, widths, dense_bits, group_size).items():
        model.get_parameter(name).copy_(tensor)


def _named(tensors: dict[str, Tensor], name: str) -> PackedMatrix:
    return PackedMatrix(*(tensors[f"{name}.{part}"] for part in PackedMatrix._fields))


def _row(packed: PackedMatrix, index: int) -> PackedMatrix:
    return PackedMatrix(*(t[index] for t in packed))
