"""Training what is left after the codes: routers, norms, scales and offsets of the whole packed model.

The loss is the KL divergence from the full-precision model, whose logits are computed again from its last hidden
states, so that T x vocabulary numbers are never stored; or the next-token loss, with which the paper tunes routers.
A layer's experts are dequantized when it runs, forward and again backward, and dropped: never are all of them dense.

Held-out micro-batches decide: a result that is not better on them is dropped.
Shapes: B windows, S tokens, H hidden, V vocabulary, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gemq.calibrate import Activations
from gemq.checkpoint.packing import PackedMatrix, unpack_codes
from gemq.models.stream import Replay
from gemq.models.structure import Layer, Matrix
from gemq.progress import Tick
from gemq.quant.grid import Quantized
from gemq.quant.trainable import TrainableMatrices, epochs, rounded_to
from gemq.quant.widths import Width, group_size_for
from gemq.reconstruct import Training, expert_overrides, tunable_names
from gemq.refine import RefinedLayer


@dataclass(frozen=True)
class Distillation:
    """What is trained, and towards what.

    loss: ``kl`` from the full-precision model, or ``next_token``
    sets: any of ``routers``, ``norms`` and ``grids`` (the experts' scales and offsets)
    """

    training: Training
    loss: str
    sets: tuple[str, ...]


@dataclass
class Distilled:
    """What distillation gave. Empty when it was dropped.

    tensors: experts' scales and offsets by their checkpoint names, float16
    tuned:   routers and norms by their name inside the model, float32
    before, after: the loss per token on held-out windows, in nats
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    tuned: dict[str, Tensor] = field(default_factory=dict)
    before: float = 0.0
    after: float = 0.0


class PackedExperts:
    """One matrix of a layer's experts, packed, with trainable scales and offsets."""

    def __init__(self, refined: RefinedLayer, path: str, matrix: Matrix, widths: Sequence[Width], group_size: int):
        self.matrix, self.widths = matrix, widths
        self.group = group_size_for(matrix.columns, group_size)
        self.names = [f"{path}.{e}.{matrix.name}" for e in range(len(widths))]
        packed = [PackedMatrix(*(refined.tensors[f"{n}.{p}"] for p in PackedMatrix._fields)) for n in self.names]
        self.members: dict[Width, list[int]] = defaultdict(list)
        for e, width in enumerate(widths):
            self.members[width].append(e)
        self.packed = {w: torch.stack([packed[e].codes for e in members]) for w, members in self.members.items()}
        scales, offsets = (torch.stack([getattr(p, part) for p in packed]) for part in ("scales", "offsets"))
        self.grids = TrainableMatrices(Quantized(packed[0].codes, scales, offsets), scales.new_zeros(len(widths)), None)

    def weight(self) -> Tensor:
        """[E, rows, columns] float32, differentiable in scales and offsets."""
        some = next(iter(self.packed.values()))
        codes = some.new_empty(len(self.widths), self.matrix.rows, self.matrix.columns)
        for width, members in self.members.items():
            codes[members] = unpack_codes(self.packed[width], width, self.group)
        self.grids.codes = codes
        try:
            return self.grids.weight()
        finally:
            self.grids.codes = some  # the unpacked codes live as long as the layer runs

    def result(self) -> dict[str, Tensor]:
        q = self.grids.result()
        return {
            f"{name}.{part}": getattr(q, part)[e].clone()
            for e, name in enumerate(self.names)
            for part in ("scales", "offsets")
        }


def distil(
    replay: Replay,
    refined: Sequence[RefinedLayer],
    widths: Sequence[Sequence[Width]],
    activations: Activations,
    teacher: list[Tensor],
    distillation: Distillation,
    stored: dict[str, torch.dtype],
    group_size: int,
    tick: Tick,
) -> Distilled:
    """Distils a quantized model.

    replay:      the model with every layer's quantized and tuned weights installed
    refined:     its layers, whose packed experts are trained
    activations: the inputs of the first layer
    teacher:     the full-precision model's last hidden states [B, S, H], one per micro-batch
    stored:      the type in which each parameter is kept: routers and norms are trained as they will be
    tick:        called with (steps done, all steps)
    """
    student = _Student(replay, refined, widths, distillation.sets, stored, group_size)
    training = distillation.training
    train, held_out = training.split(len(activations.ids))

    def loss(batch: int) -> Tensor:
        """Mean over tokens, in nats."""
        ids = activations.ids[batch]
        logits = student.logits(ids, activations.hidden[batch], activations, batch)
        if distillation.loss == "next_token":
            return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        with torch.no_grad():
            expected = student.teacher_logits(ids, teacher[batch]).float().log_softmax(-1)
        return F.kl_div(logits.float().log_softmax(-1), expected, log_target=True, reduction="sum") / ids.numel()

    @torch.no_grad()
    def held_out_loss() -> float:
        return sum(loss(b).item() for b in held_out) / len(held_out)

    best = Distilled(before=held_out_loss())
    best.after = best.before
    optimizer = training.optimizer((), student.grids, student.tuned_list)
    per_epoch = len(train)
    steps = training.epochs * per_epoch
    for step, batch in enumerate(epochs(per_epoch, training.epochs, training.seed)):
        optimizer.step(loss(train[batch]), step, steps)
        tick(step + 1, steps)
        if (step + 1) % per_epoch == 0:
            now = held_out_loss()
            if now >= best.after:
                break  # the last epochs did no good, and the next ones would do worse
            best = Distilled(student.tensors(), student.tuned(), best.before, now)
    return best


class _Student:
    """The packed model as a function of its trainable parameters."""

    def __init__(
        self,
        replay: Replay,
        refined: Sequence[RefinedLayer],
        widths: Sequence[Sequence[Width]],
        sets: tuple[str, ...],
        stored: dict[str, torch.dtype],
        group_size: int,
    ):
        self.replay, self.stored = replay, stored
        layers = replay.structure.layers
        self.experts: list[list[PackedExperts]] = []
        self.parameters: list[dict[str, Tensor]] = []
        for layer, done, row in zip(layers, refined, widths, strict=True):
            found = layer.experts
            matrices = found.matrices if found else ()
            self.experts.append([PackedExperts(done, found.path, m, row, group_size) for m in matrices if found])
            self.parameters.append(self._trainable(_wanted(replay, layer, sets)))
        self.tail_original = {name: self._parameter(name) for name in _tail_norms(replay)}
        self.tail = self._trainable(list(self.tail_original) if "norms" in sets else [])
        self.grids = [g for pair in self.experts for m in pair for g in m.grids.grids()] if "grids" in sets else []
        self.tuned_list = [p for row in [*self.parameters, self.tail] for p in row.values()]
        for layer in layers:
            if layer.experts is not None:
                module = replay.model.get_submodule(layer.experts.path)
                for matrix in layer.experts.matrices:  # from here on the packed experts are the only ones
                    weight = getattr(module, matrix.name)
                    weight.data = weight.new_empty(0)

    def _parameter(self, name: str) -> Tensor:
        return self.replay.model.get_parameter(name).detach()

    def _trainable(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self._parameter(name).float().clone() for name in names}

    def _rounded(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        model = self.replay.model
        return {n: rounded_to(p, self.stored[n]).to(model.get_parameter(n).dtype) for n, p in parameters.items()}

    def logits(self, ids: Tensor, hidden: Tensor, activations: Activations, batch: int) -> Tensor:
        """[B, S, V]. Each layer is dequantized when it runs, and again when the gradient comes back."""

        def run(index: int, h: Tensor) -> Tensor:
            experts = self.replay.structure.layers[index].experts
            overrides = self._rounded(self.parameters[index])
            if experts is not None:
                weights = [m.weight() for m in self.experts[index]]
                overrides.update(expert_overrides(self.replay.model, experts, weights))
            return self.replay.run(index, h, activations.calls[batch][index], overrides)

        for index in range(len(self.experts)):
            hidden = checkpoint(run, index, hidden, use_reentrant=False)
        return self.replay.logits(ids, hidden, self._rounded(self.tail))

    def teacher_logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        return self.replay.logits(ids, hidden, self.tail_original)

    def tensors(self) -> dict[str, Tensor]:
        if not self.grids:
            return {}
        return {name: t for pair in self.experts for m in pair for name, t in m.result().items()}

    def tuned(self) -> dict[str, Tensor]:
        rows = [*self.parameters, self.tail]
        return {n: rounded_to(p.detach(), self.stored[n]).clone() for row in rows for n, p in row.items()}


def _wanted(replay: Replay, layer: Layer, sets: tuple[str, ...]) -> list[str]:
    def is_router(name: str) -> bool:
        return layer.router is not None and name.startswith(layer.router + ".")

    return [n for n in tunable_names(replay, layer) if ("routers" if is_router(n) else "norms") in sets]


def _tail_norms(replay: Replay) -> list[str]:
    """Norms behind the last layer: those outside the list of layers."""
    inside = replay.structure.layers_path + "."
    return [
        f"{path}.{name}"
        for path, module in replay.model.named_modules()
        if "norm" in type(module).__name__.lower() and not path.startswith(inside)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point()
    ]
