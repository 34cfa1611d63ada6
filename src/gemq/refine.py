"""The chosen widths applied: assembled from the ladder, or quantized again on the quantized model's activations.

Either way a layer ends as the tensors of the checkpoint. Knows one layer at a time, no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemq.calibrate import Activations, LayerMoments, layer_moments
from gemq.checkpoint.packing import PackedMatrix
from gemq.ladder import LayerLadder, Quantizer, quantize_linears
from gemq.models.experts import expert_weight, set_expert_weight
from gemq.models.stream import Replay
from gemq.models.structure import Layer, Linear
from gemq.quant.grid import dequantize
from gemq.quant.widths import Width, group_size_for


def assemble_layer(ladder: LayerLadder, layer: Layer, widths: Sequence[Width]) -> dict[str, Tensor]:
    """A layer's checkpoint tensors with each expert's codes picked from the ladder."""
    tensors: dict[str, Tensor] = {}
    for path, packed in ladder.linears.items():
        tensors.update(_row(packed, 0).named(path))
    for name, rungs in ladder.experts.items():
        assert layer.experts is not None
        for e, width in enumerate(widths):
            tensors.update(_row(rungs[width], e).named(f"{layer.experts.path}.{e}.{name}"))
    return tensors


def refine_layer(
    replay: Replay,
    index: int,
    activations: Activations,
    quantizer: Quantizer,
    widths: Sequence[Width],
    dense_bits: int,
) -> tuple[dict[str, Tensor], int]:
    """Quantizes layer ``index`` at its chosen widths on ``activations``, which the quantized layers before it made.

    Attention first; everything behind it then sees the quantized attention's output. Leaves the quantized weights in
    the model. Returns the checkpoint tensors and the number of Hessians that needed more damping.
    """
    layer = replay.structure.layers[index]
    result = LayerLadder()
    linears = layer.linears if dense_bits < 16 else ()
    attention = [x for x in linears if x.kind == "attention"]
    if attention:
        moments, _ = layer_moments(replay, index, activations, attention, with_experts=False)
        quantize_linears(replay.model, attention, moments, quantizer, dense_bits, result)
        install_linears(replay.model, attention, result.linears, dense_bits, quantizer.group_size)
    others = [x for x in linears if x.kind != "attention"]
    moments, _ = layer_moments(replay, index, activations, others, with_experts=True)
    quantize_linears(replay.model, others, moments, quantizer, dense_bits, result)
    install_linears(replay.model, others, result.linears, dense_bits, quantizer.group_size)
    tensors = assemble_layer(result, layer, ())
    retries = result.retries + _refine_experts(replay.model, layer, moments, quantizer, widths, tensors)
    return tensors, retries


def _refine_experts(
    model: Any,
    layer: Layer,
    moments: LayerMoments,
    quantizer: Quantizer,
    widths: Sequence[Width],
    tensors: dict[str, Tensor],
) -> int:
    if layer.experts is None or moments.experts is None:
        return 0
    retries = 0
    module = model.get_submodule(layer.experts.path)
    for matrix, moment in zip(layer.experts.matrices, moments.experts, strict=True):
        weight, hessians = expert_weight(module, matrix.name), moment.hessians(quantizer.shrink)
        for width in sorted(set(widths)):
            members = [e for e, w in enumerate(widths) if w == width]
            (packed,), again = quantizer(weight[members], hessians[members], (width,))
            retries += again
            for i, e in enumerate(members):
                tensors.update(_row(packed, i).named(f"{layer.experts.path}.{e}.{matrix.name}"))
    install_experts(model, layer, tensors, widths, quantizer.group_size)
    return retries


def install_linears(
    model: Any, linears: Sequence[Linear], packed: dict[str, PackedMatrix], bits: int, group_size: int
) -> None:
    """Overwrites dense linears' weights with what their codes mean."""
    for linear in linears:
        q = packed[linear.path].unpack(bits, group_size_for(linear.columns, group_size))
        weight = model.get_submodule(linear.path).weight
        weight.data.copy_(dequantize(q).reshape(weight.shape))


def install_experts(
    model: Any, layer: Layer, tensors: dict[str, Tensor], widths: Sequence[Width], group_size: int
) -> None:
    """Overwrites a layer's routed experts with what the checkpoint tensors mean."""
    assert layer.experts is not None
    module = model.get_submodule(layer.experts.path)
    for matrix in layer.experts.matrices:
        group = group_size_for(matrix.columns, group_size)
        rows = []
        for e, width in enumerate(widths):
            rows.append(dequantize(_named(tensors, f"{layer.experts.path}.{e}.{matrix.name}").unpack(width, group)))
        set_expert_weight(module, matrix.name, torch.stack(rows))


def install_layer(
    model: Any,
    layer: Layer,
    tensors: dict[str, Tensor],
    widths: Sequence[Width],
    dense_bits: int,
    group_size: int,
) -> None:
    """Overwrites a whole layer's quantized weights with what its checkpoint tensors mean."""
    if dense_bits < 16:
        packed = {x.path: _named(tensors, x.path) for x in layer.linears}
        install_linears(model, layer.linears, packed, dense_bits, group_size)
    if layer.experts is not None:
        install_experts(model, layer, tensors, widths, group_size)


def _named(tensors: dict[str, Tensor], name: str) -> PackedMatrix:
    return PackedMatrix(*(tensors[f"{name}.{part}"] for part in PackedMatrix._fields))


def _row(packed: PackedMatrix, index: int) -> PackedMatrix:
    return PackedMatrix(*(t[index] for t in packed))
