"""The ladder: every expert of a layer at every candidate width, and its dense linears at theirs.

Made once from full-precision activations; any allocation afterwards only picks from it. A ``Rung`` set is independent
of the allocation, so another budget costs no quantization. Knows one layer at a time, no files.

Shapes: E experts, W widths; packed codes as in ``checkpoint.packing``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemq.calibrate import Activations, LayerMoments, layer_moments
from gemq.checkpoint.packing import PackedMatrix
from gemq.models.experts import expert_weight
from gemq.models.stream import Replay
from gemq.models.structure import Layer, Linear
from gemq.quant.gptq import gptq, round_to_nearest
from gemq.quant.grid import Quantized, dequantize
from gemq.quant.hessian import Moments, factorize
from gemq.quant.widths import Width, group_size_for, width_name


@dataclass(frozen=True)
class Quantizer:
    """How matrices are quantized: the recipe's keys that decide codes."""

    method: str
    group_size: int
    damping: float
    shrink: float

    def __call__(self, weight: Tensor, hessians: Tensor, widths: tuple[Width, ...]) -> tuple[list[PackedMatrix], int]:
        """Weights [E, R, C] with their inputs' Hessians [E, C, C] -> a packed batch per width, and Hessians retried."""
        group = group_size_for(weight.shape[-1], self.group_size)
        retries = 0
        if self.method == "rtn":
            q = round_to_nearest(weight, widths, group)
        else:
            factor = factorize(hessians, self.damping)
            q, retries = gptq(weight, factor.upper, widths, group), factor.retries
        rungs = [PackedMatrix.pack(Quantized(*(t[i] for t in q)), w, group) for i, w in enumerate(widths)]
        return rungs, retries


@dataclass
class LayerLadder:
    """One layer quantized at every width.

    linears: path -> [1, ...] packed batch at the dense width
    experts: matrix name -> width -> [E, ...] packed batch
    counts:  [E] int64, calibration tokens routed to each expert; empty in a dense layer
    retries: Hessians that needed more damping
    """

    linears: dict[str, PackedMatrix] = field(default_factory=dict)
    experts: dict[str, dict[Width, PackedMatrix]] = field(default_factory=dict)
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    retries: int = 0

    def to_tensors(self) -> dict[str, Tensor]:
        tensors = {"counts": self.counts, "retries": torch.tensor(self.retries)}
        for path, packed in self.linears.items():
            tensors.update(packed.named(f"linear:{path}"))
        for name, rungs in self.experts.items():
            for width, packed in rungs.items():
                tensors.update(packed.named(f"expert:{name}:{width_name(width)}"))
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], layer: Layer, widths: tuple[Width, ...]) -> LayerLadder:
        def packed(prefix: str) -> PackedMatrix:
            return PackedMatrix(*(tensors[f"{prefix}.{part}"] for part in PackedMatrix._fields))

        names = [m.name for m in layer.experts.matrices] if layer.experts else []
        return cls(
            {x.path: packed(f"linear:{x.path}") for x in layer.linears if f"linear:{x.path}.codes" in tensors},
            {n: {w: packed(f"expert:{n}:{width_name(w)}") for w in widths} for n in names},
            tensors["counts"],
            int(tensors["retries"]),
        )


def build_layer(
    replay: Replay,
    index: int,
    activations: Activations,
    quantizer: Quantizer,
    widths: tuple[Width, ...],
    dense_bits: int,
) -> tuple[LayerLadder, list[Tensor]]:
    """Quantizes layer ``index`` at every width on full-precision activations. Returns it with the layer's outputs."""
    layer = replay.structure.layers[index]
    linears = layer.linears if dense_bits < 16 else ()
    moments, outputs = layer_moments(replay, index, activations, linears, with_experts=True)
    ladder = LayerLadder()
    quantize_linears(replay.model, linears, moments, quantizer, dense_bits, ladder)
    quantize_experts(replay.model, layer, moments, quantizer, widths, ladder)
    return ladder, outputs


def quantize_linears(
    model: Any,
    linears: Sequence[Linear],
    moments: LayerMoments,
    quantizer: Quantizer,
    bits: int,
    ladder: LayerLadder,
) -> None:
    """Quantizes dense linears into ``ladder``."""
    for linear in linears:
        if linear.path not in moments.linears:  # a branch that no calibration token took
            moments.linears[linear.path] = Moments(1, linear.columns, next(model.parameters()).device)
        weight = model.get_submodule(linear.path).weight.detach()
        hessians = moments.linears[linear.path].hessians(0.0)
        (packed,), retries = quantizer(weight.unsqueeze(0), hessians, (bits,))
        ladder.linears[linear.path] = packed
        ladder.retries += retries


def quantize_experts(
    model: Any,
    layer: Layer,
    moments: LayerMoments,
    quantizer: Quantizer,
    widths: tuple[Width, ...],
    ladder: LayerLadder,
) -> None:
    """Quantizes a layer's routed experts at ``widths`` into ``ladder``."""
    if layer.experts is None or moments.experts is None:
        return
    module = model.get_submodule(layer.experts.path)
    for matrix, moment in zip(layer.experts.matrices, moments.experts, strict=True):
        rungs, retries = quantizer(expert_weight(module, matrix.name), moment.hessians(quantizer.shrink), widths)
        ladder.experts[matrix.name] = dict(zip(widths, rungs, strict=True))
        ladder.retries += retries
    ladder.counts = moments.experts[0].counts.cpu()


def rung_weight(ladder: LayerLadder, name: str, width: Width, columns: int, group_size: int) -> Tensor:
    """All experts' weights of one matrix at one width: [E, rows, columns] float32."""
    return dequantize(ladder.experts[name][width].unpack(width, group_size_for(columns, group_size)))
