"""The ladder: every expert of a layer at every candidate width, and its dense linears at theirs.

Made once from full-precision activations; any allocation afterwards only picks from it. It does not depend on
the allocation, so another budget costs no quantization. Knows one layer at a time, no files.

Shapes: E experts, W widths; packed codes as in ``quant.packing``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemq.calibration.activations import Activations, KeptCalls, LayerMoments, layer_moments
from gemq.errors import UserError
from gemq.layers.candidate_training import ExpertInputs, expert_chunks, train_rooms, train_rungs
from gemq.layers.training import QuantizedParameter, Training, train_layer
from gemq.models.experts import expert_weight
from gemq.models.replay import Replay
from gemq.models.structure import Experts, Layer, Linear
from gemq.quant.gptq import gptq, gptq_mixed, round_to_nearest
from gemq.quant.grid import LARGEST_SCALE, LAST_SCALE, Quantized, below_scales, dequantize
from gemq.quant.hessian import Moments, factorize
from gemq.quant.packing import PackedMatrix
from gemq.quant.trainable_gpu import latent_type
from gemq.quant.widths import Width, group_size_for, width_name
from gemq.runtime.activation_store import Batches


@dataclass(frozen=True)
class Quantizer:
    """How matrices are quantized: the recipe's keys that decide codes."""

    method: str
    group_size: int
    damping: float
    shrink: float

    def every_width(
        self,
        weight: Tensor,
        moments: Moments,
        widths: tuple[Width, ...],
        latents: Tensor | None = None,
        first: int = 0,
        shrink: float | None = None,
    ) -> tuple[Quantized, int]:
        """Weights [E, R, C] with their inputs' moments -> grids [W, E, ...], and how many Hessians were retried.

        latents: [W, E, R, C], filled with the codes before rounding
        first:   number of the first of these experts among those of ``moments``
        shrink:  in place of the recipe's
        """
        group = self.group(weight.shape[-1])
        if self.method == "rtn":
            return round_to_nearest(weight, widths, group), 0
        grids, retries = [], 0
        shrink = self.shrink if shrink is None else shrink
        for some in _chunks(weight, len(widths)):
            which = slice(some.start + first, some.stop + first)
            factor = factorize(moments.hessians(shrink, which), self.damping)
            of_some = None if latents is None else latents[:, some]
            grids.append(gptq(weight[some], factor.upper, widths, group, of_some))
            retries += factor.retries
            del factor  # as large as what the next ones take
        return _joined(grids, 1), retries

    def own_width(
        self, weight: Tensor, moments: Moments, widths: Sequence[Width], latents: Tensor | None = None
    ) -> tuple[Quantized, int]:
        """As ``every_width``, with one width for each expert: grids [E, ...]."""
        group = self.group(weight.shape[-1])
        if self.method == "rtn":
            distinct = tuple(sorted(set(widths)))
            q = round_to_nearest(weight, distinct, group)
            pick = torch.tensor([distinct.index(w) for w in widths], device=weight.device)
            return Quantized(*(t[pick, torch.arange(len(widths), device=weight.device)] for t in q)), 0
        grids, retries = [], 0
        for some in _chunks(weight, 1):
            factor = factorize(moments.hessians(self.shrink, some), self.damping)
            of_some = None if latents is None else latents[some]
            grids.append(gptq_mixed(weight[some], factor.upper, widths[some], group, of_some))
            retries += factor.retries
            del factor  # as large as what the next ones take
        return _joined(grids, 0), retries

    def group(self, columns: int) -> int:
        """Group size of a matrix with so many inputs."""
        return group_size_for(columns, self.group_size)


CHUNK_BYTES = 4 << 30
"""Memory for the Hessians, factors and errors of the experts that are quantized together."""


def _chunks(weight: Tensor, widths: int) -> Iterator[slice]:
    """Slices of the experts of weight [E, R, C] that are quantized together, at ``widths`` widths."""
    experts, rows, columns = weight.shape
    each = 4 * columns * (3 * columns + widths * rows)
    count = max(1, min(experts, CHUNK_BYTES // each))
    return (slice(start, min(start + count, experts)) for start in range(0, experts, count))


def _joined(grids: list[Quantized], dim: int) -> Quantized:
    return grids[0] if len(grids) == 1 else Quantized(*(torch.cat(parts, dim) for parts in zip(*grids, strict=True)))


@dataclass
class LayerLadder:
    """One layer quantized at every width.

    linears: path -> [1, ...] packed batch at the dense width
    experts: matrix name -> width -> [E, ...] packed batch
    counts:  [E] int64, calibration tokens routed to each expert; empty in a dense layer
    retries: Hessians that needed more damping
    small:   matrices whose weights are smaller than scales reach
    """

    linears: dict[str, PackedMatrix] = field(default_factory=dict)
    experts: dict[str, dict[Width, PackedMatrix]] = field(default_factory=dict)
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    retries: int = 0
    untrained: int = 0
    """Experts at a width, and dense linears, that did no better trained on held-out windows: GPTQ's codes stay."""
    small: int = 0

    def to_tensors(self) -> dict[str, Tensor]:
        tensors = {"counts": self.counts, "notes": torch.tensor([self.retries, self.untrained, self.small])}
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


def refuse_clipped(names: Sequence[str], packed: Iterable[PackedMatrix]) -> None:
    """Refuses matrices with weights beyond what the largest scale holds: they would be clipped.

    Args:
        names: of the matrices.
        packed: batches of them, at one or more widths.

    Raises:
        UserError: names the first one.
    """
    clipped = torch.stack([(matrices.scales == LAST_SCALE).flatten(1).any(1) for matrices in packed]).any(0)
    if bool(clipped.any()):
        raise UserError(
            f"{names[int(clipped.int().argmax())]} has weights that are too large to be quantized: scales reach "
            f"{LARGEST_SCALE:g}; weights of a usable model are far smaller, so check where this one comes from"
        )


LINEAR_TOKENS = 262_144
"""Of calibration that dense linears of the ladder are trained on: they have few weights and many bits."""


def build_layer(
    replay: Replay,
    index: int,
    activations: Activations,
    quantizer: Quantizer,
    widths: tuple[Width, ...],
    dense_bits: int,
    training: Training | None = None,
    linear_training: Training | None = None,
    with_outputs: bool = True,
) -> tuple[LayerLadder, Batches]:
    """Quantizes layer ``index`` at every width on full-precision activations. Returns it with the layer's outputs.

    replay:          of one rank alone
    training:        trains every expert at every width on its own after GPTQ (the trained ladder)
    linear_training: trains the dense linears, together, towards the layer's output
    with_outputs:    False: whoever asks knows them
    """
    layer = replay.structure.layers[index]
    linears = layer.linears if dense_bits < 16 else ()
    every = slice(0, layer.experts.count) if layer.experts is not None else None
    calls = KeptCalls(replay.memory) if training is not None and layer.experts is not None else None
    with_outputs = with_outputs or linear_training is not None
    moments, outputs = layer_moments(replay, index, activations, linears, every, calls, with_outputs)
    ladder = LayerLadder()
    latents: dict[str, Tensor] | None = {} if linear_training is not None else None
    quantize_linears(replay, linears, moments, quantizer, dense_bits, ladder, latents)
    if training is not None:  # what trains takes the room where the moments are
        for moment in moments.experts or ():
            moment.park(lambda sums: Batches(replay.memory, sums))
    if linear_training is not None and latents:
        parameters = linear_parameters(linears, ladder, quantizer, dense_bits, latents)
        _train_linears(replay, index, activations, outputs, parameters, quantizer, linear_training, ladder)
    if layer.experts is not None and moments.experts is not None:
        _quantize_experts(replay, index, layer.experts, moments.experts, calls, quantizer, widths, training, ladder)
    return ladder, outputs


def _train_linears(
    replay: Replay,
    index: int,
    activations: Activations,
    outputs: Batches,
    parameters: list[QuantizedParameter],
    quantizer: Quantizer,
    training: Training,
    ladder: LayerLadder,
) -> None:
    """Trains a layer's dense linears towards its ``outputs`` and packs them into ``ladder``; all else is exact."""
    most = max(2, LINEAR_TOKENS // activations.ids[0].numel())
    done = train_layer(replay, index, activations, outputs, parameters, training, {}, most)
    for x in done.parameters:
        group = quantizer.group(x.q.codes.shape[-1])
        ladder.linears[x.name.removesuffix(".weight")] = PackedMatrix.pack(x.q, x.widths[0], group)
    if done.after >= done.before:
        ladder.untrained += len(parameters)


def _quantize_experts(
    replay: Replay,
    index: int,
    experts: Experts,
    moments: tuple[Moments, Moments],
    calls: KeptCalls | None,
    quantizer: Quantizer,
    widths: tuple[Width, ...],
    training: Training | None,
    ladder: LayerLadder,
) -> None:
    """Quantizes a layer's experts at every width into ``ladder``. ``calls``: to train on."""
    module = replay.model.get_submodule(experts.path)
    batches = ExpertInputs(module, experts, calls) if calls is not None else None
    every = slice(0, experts.count)
    chunks: Iterable[slice] = [every]
    if training is not None:
        chunks = expert_chunks(experts, len(widths), training.room or train_rooms(replay.device)[0])
    packed: dict[str, list[list[PackedMatrix]]] = {m.name: [] for m in experts.matrices}
    for some in chunks:
        grids: list[Quantized] = []
        latents: list[Tensor] = []
        for matrix, moment in zip(experts.matrices, moments, strict=True):
            weight = expert_weight(module, matrix.name)[some]
            ladder.small += below_scales(weight)
            if training is not None:
                dtype = latent_type(weight.device, weight.dtype)
                latents.append(weight.new_empty(len(widths), *weight.shape, dtype=dtype))
            of_some = latents[-1] if latents else None
            q, retries = quantizer.every_width(weight, moment, widths, of_some, some.start)
            grids.append(q)
            ladder.retries += retries
        if training is not None and batches is not None:
            grids, kept = train_rungs(batches, some, grids, latents, widths, training, index)
            ladder.untrained += kept
        for matrix, q in zip(experts.matrices, grids, strict=True):
            group = quantizer.group(matrix.columns)
            one = [PackedMatrix.pack(Quantized(*(t[i] for t in q)), w, group) for i, w in enumerate(widths)]
            packed[matrix.name].append(one)
    for name, parts in packed.items():
        ladder.experts[name] = {
            w: PackedMatrix(*(torch.cat(fields) for fields in zip(*(part[i] for part in parts), strict=True)))
            for i, w in enumerate(widths)
        }
        refuse_clipped([f"{experts.path}.{e}.{name}" for e in range(experts.count)], ladder.experts[name].values())
    ladder.counts = moments[0].counts.cpu()


def quantize_linears(
    replay: Replay,
    linears: Sequence[Linear],
    moments: LayerMoments,
    quantizer: Quantizer,
    bits: int,
    ladder: LayerLadder,
    latents: dict[str, Tensor] | None = None,
) -> None:
    """Quantizes dense linears into ``ladder``, those that receive the same tensor as one, the ranks taking turns.

    ``latents`` receives each one's codes before rounding, [1, R, C].
    """
    model, ranks = replay.model, replay.ranks
    groups: dict[int, list[Linear]] = {}
    for linear in linears:
        if linear.path not in moments.linears:  # a branch that no calibration token took
            moments.linears[linear.path] = Moments(1, linear.columns, replay.device)
        groups.setdefault(id(moments.linears[linear.path]), []).append(linear)
    retried = 0
    ladder.small += sum(below_scales(model.get_submodule(x.path).weight.unsqueeze(0)) for x in linears)
    for number, group in enumerate(groups.values()):
        if number % ranks.count != ranks.rank:
            continue
        weights = [model.get_submodule(linear.path).weight.detach() for linear in group]
        weight = torch.cat(weights).unsqueeze(0)  # rows do not depend on each other
        dtype = latent_type(weight.device, weight.dtype)
        before = None if latents is None else weight.new_empty(weight.shape, dtype=dtype)
        shared = moments.linears[group[0].path]
        own = None if before is None else before.unsqueeze(0)
        q, retries = quantizer.every_width(weight, shared, (bits,), own, shrink=0.0)
        retried += retries
        rows = [len(w) for w in weights]
        for linear, *part in zip(group, *(t[0].split(rows, 1) for t in q), strict=True):
            packed = PackedMatrix.pack(Quantized(*part), bits, quantizer.group(linear.columns))
            ladder.linears[linear.path] = packed
            refuse_clipped([linear.path], [packed])
        if latents is not None and before is not None:
            latents.update({x.path: part.contiguous() for x, part in zip(group, before.split(rows, 1), strict=True)})
    size = len(PackedMatrix._fields)
    given: list[Tensor | None] = []
    for linear in linears:
        given += [*(ladder.linears.get(linear.path) or [None] * size), (latents or {}).get(linear.path)]
    found = ranks.all_gather_tensors(given, [retried])
    ladder.retries += sum(notes[0] for _, notes in found)
    owners = {linear.path: number % ranks.count for number, group in enumerate(groups.values()) for linear in group}
    for place, linear in enumerate(linears if ranks.count > 1 else ()):
        tensors = found[owners[linear.path]][0][place * (size + 1) :][: size + 1]
        parts = [t.clone() for t in tensors if t is not None]
        ladder.linears[linear.path] = PackedMatrix(*parts[:size])
        if latents is not None:
            latents[linear.path] = parts[size]


def linear_parameters(
    linears: Sequence[Linear], ladder: LayerLadder, quantizer: Quantizer, bits: int, latents: dict[str, Tensor]
) -> list[QuantizedParameter]:
    """Dense linears that ``quantize_linears`` has quantized, ready to be trained."""
    found = []
    for x in linears:
        q = ladder.linears[x.path].unpack(bits, quantizer.group(x.columns))
        found.append(QuantizedParameter(f"{x.path}.weight", (bits,), q, latents[x.path]))
    return found


def rung_weight(ladder: LayerLadder, name: str, width: Width, columns: int, group_size: int) -> Tensor:
    """All experts' weights of one matrix at one width: [E, rows, columns] float32."""
    return dequantize(ladder.experts[name][width].unpack(width, group_size_for(columns, group_size)))
