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

from gemq.batches import Batches
from gemq.calibrate import Activations, KeptCalls, LayerMoments, layer_moments
from gemq.checkpoint.packing import PackedMatrix
from gemq.models.experts import expert_weight
from gemq.models.stream import Replay
from gemq.models.structure import Layer, Linear
from gemq.quant.gptq import gptq, gptq_mixed, round_to_nearest
from gemq.quant.grid import Quantized, dequantize
from gemq.quant.hessian import Moments, factorize
from gemq.quant.widths import Width, group_size_for, width_name
from gemq.reconstruct import Training, train_rungs


@dataclass(frozen=True)
class Quantizer:
    """How matrices are quantized: the recipe's keys that decide codes."""

    method: str
    group_size: int
    damping: float
    shrink: float

    def every_width(
        self, weight: Tensor, hessians: Tensor, widths: tuple[Width, ...], latents: Tensor | None = None
    ) -> tuple[Quantized, int]:
        """Weights [E, R, C] with their inputs' Hessians [E, C, C] -> grids [W, E, ...], and Hessians retried.

        latents: [W, E, R, C], filled with the codes before rounding
        """
        group = self.group(weight.shape[-1])
        if self.method == "rtn":
            return round_to_nearest(weight, widths, group), 0
        factor = factorize(hessians, self.damping)
        return gptq(weight, factor.upper, widths, group, latents), factor.retries

    def own_width(
        self, weight: Tensor, hessians: Tensor, widths: Sequence[Width], latents: Tensor | None = None
    ) -> tuple[Quantized, int]:
        """As ``every_width``, with one width for each expert: grids [E, ...]."""
        group = self.group(weight.shape[-1])
        if self.method == "rtn":
            distinct = tuple(sorted(set(widths)))
            q = round_to_nearest(weight, distinct, group)
            pick = torch.tensor([distinct.index(w) for w in widths], device=weight.device)
            return Quantized(*(t[pick, torch.arange(len(widths), device=weight.device)] for t in q)), 0
        factor = factorize(hessians, self.damping)
        return gptq_mixed(weight, factor.upper, widths, group, latents), factor.retries

    def group(self, columns: int) -> int:
        """Group size of a matrix with so many inputs."""
        return group_size_for(columns, self.group_size)


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
    untrained: int = 0
    """Experts and widths whose training did not lower their held-out error, so that GPTQ's codes were kept."""

    def to_tensors(self) -> dict[str, Tensor]:
        tensors = {"counts": self.counts, "notes": torch.tensor([self.retries, self.untrained])}
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
            *tensors["notes"].tolist(),
        )


def build_layer(
    replay: Replay,
    index: int,
    activations: Activations,
    quantizer: Quantizer,
    widths: tuple[Width, ...],
    dense_bits: int,
    training: Training | None = None,
) -> tuple[LayerLadder, Batches]:
    """Quantizes layer ``index`` at every width on full-precision activations. Returns it with the layer's outputs.

    training: trains every expert at every width on its own after GPTQ (the trained ladder)
    """
    layer = replay.structure.layers[index]
    linears = layer.linears if dense_bits < 16 else ()
    calls = KeptCalls(replay.memory)
    kept = calls if training is not None and layer.experts is not None else None
    moments, outputs = layer_moments(replay, index, activations, linears, with_experts=True, kept=kept)
    ladder = LayerLadder()
    quantize_linears(replay.model, linears, moments, quantizer, dense_bits, ladder)
    if layer.experts is None or moments.experts is None:
        return ladder, outputs
    module = replay.model.get_submodule(layer.experts.path)
    grids: list[Quantized] = []
    latents: list[Tensor] = []
    for matrix, moment in zip(layer.experts.matrices, moments.experts, strict=True):
        weight = expert_weight(module, matrix.name)
        if training is not None:
            latents.append(weight.new_empty(len(widths), *weight.shape, dtype=torch.float32))
        hessians = moment.hessians(quantizer.shrink)
        q, retries = quantizer.every_width(weight, hessians, widths, latents[-1] if latents else None)
        grids.append(q)
        ladder.retries += retries
    if training is not None:
        grids, ladder.untrained = train_rungs(module, layer.experts, calls, grids, latents, widths, training, index)
    for matrix, q in zip(layer.experts.matrices, grids, strict=True):
        group = quantizer.group(matrix.columns)
        ladder.experts[matrix.name] = {
            width: PackedMatrix.pack(Quantized(*(t[i] for t in q)), width, group) for i, width in enumerate(widths)
        }
    ladder.counts = moments.experts[0].counts.cpu()
    return ladder, outputs


def quantize_linears(
    model: Any,
    linears: Sequence[Linear],
    moments: LayerMoments,
    quantizer: Quantizer,
    bits: int,
    ladder: LayerLadder,
    latents: dict[str, Tensor] | None = None,
) -> None:
    """Quantizes dense linears into ``ladder``. ``latents`` receives each one's codes before rounding, [1, R, C]."""
    for linear in linears:
        if linear.path not in moments.linears:  # a branch that no calibration token took
            moments.linears[linear.path] = Moments(1, linear.columns, next(model.parameters()).device)
        weight = model.get_submodule(linear.path).weight.detach().unsqueeze(0)
        before = None if latents is None else weight.new_empty(weight.shape, dtype=torch.float32)
        q, retries = quantizer.own_width(weight, moments.linears[linear.path].hessians(0.0), (bits,), before)
        if latents is not None and before is not None:
            latents[linear.path] = before
        ladder.linears[linear.path] = PackedMatrix.pack(q, bits, quantizer.group(linear.columns))
        ladder.retries += retries


def rung_weight(ladder: LayerLadder, name: str, width: Width, columns: int, group_size: int) -> Tensor:
    """All experts' weights of one matrix at one width: [E, rows, columns] float32."""
    return dequantize(ladder.experts[name][width].unpack(width, group_size_for(columns, group_size)))
