"""Training what GPTQ leaves: codes, scales and offsets, by gradients through the rounding.

``train_layer`` trains one layer at its chosen widths, router and norms included, on the inputs that the quantized
layers before it give, towards the full-precision layer's output on full-precision inputs. ``Training`` and its
``Optimizer`` also serve the trained ladder (``layers.candidate_training``) and distillation.

Held-out micro-batches decide: what did not get better on them keeps GPTQ's codes. Knows one layer at a time, no files.
Shapes: E experts, B windows, S tokens a window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemq.calibration.activations import Activations
from gemq.models.expert_parallel import own_experts, split_experts
from gemq.models.replay import Call, Replay
from gemq.models.structure import Experts, Layer, is_norm
from gemq.quant.gptq import highest_codes
from gemq.quant.grid import Quantized, dequantize_each
from gemq.quant.trainable import BETAS, EPS, TrainableMatrices, cosine_factors, epochs, rounded_to
from gemq.quant.trainable_gpu import FusedMatrices, Steps, trainable
from gemq.quant.widths import Width
from gemq.runtime.cuda_graph import Replayed
from gemq.runtime.ranks import Ranks


@dataclass(frozen=True)
class Training:
    """How something is trained: AdamW, betas (0.9, 0.95), no weight decay, cosine to zero after a short warm-up.

    Learning rates are per kind: ``codes``, ``grids`` relative (scales and offsets), ``tuned`` for routers and norms. 0
    leaves a kind as it is.
    """

    epochs: int
    codes: float
    grids: float
    tuned: float
    held_out: float
    """Share of the micro-batches that is not trained on."""
    seed: int
    tell: Callable[[], None] = lambda: None
    """Called when steps could not be captured in a CUDA graph, and are launched kernel by kernel."""
    room: int | None = None
    """Bytes for the state of experts that are trained together, if not the most of
    ``layers.candidate_training.train_rooms``."""

    def split(self, batches: int) -> tuple[range, range]:
        """Micro-batches to train on, and those held out: the last ones. A single batch does both."""
        held_out = min(max(1, round(self.held_out * batches)), batches - 1)
        return range(batches - held_out), range(batches - held_out, batches) if held_out else range(batches)

    def optimizer(
        self, steps: int, codes: Sequence[Tensor], grids: Sequence[Tensor], tuned: Sequence[Tensor] = ()
    ) -> Optimizer:
        """For ``steps`` steps."""
        return Optimizer(((codes, self.codes), (grids, self.grids), (tuned, self.tuned)), cosine_factors(steps))

    def optimizer_of(
        self, steps: int, matrices: Sequence[TrainableMatrices | FusedMatrices], tuned: Sequence[Tensor] = ()
    ) -> Optimizer:
        """For whole matrices, whichever way they are trained."""
        plain = [m for m in matrices if isinstance(m, TrainableMatrices)]
        optimizer = self.optimizer(
            steps, [m.latents for m in plain if m.latents is not None], [g for m in plain for g in m.grids()], tuned
        )
        optimizer.take([m for m in matrices if isinstance(m, FusedMatrices)], self.codes, self.grids)
        return optimizer


class Optimizer:
    """AdamW over groups of parameters with their own learning rates, on one schedule.

    groups:  parameters on one device, and their learning rate
    factors: of the learning rates, step by step

    On a GPU all that differs between steps lies there, so that a step can be launched from a CUDA graph.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], float]], factors: Sequence[float]):
        self.factors = factors
        for parameters, rate in groups:
            for parameter in parameters:
                parameter.requires_grad_(rate > 0)
        wanted = [(list(parameters), rate) for parameters, rate in groups if parameters and rate > 0]
        self.rates = [rate for _, rate in wanted]
        self.inner: torch.optim.AdamW | None = None
        self.fused: Sequence[FusedMatrices] = ()
        if wanted:
            self._place(wanted[0][0][0].device)
            given = [{"params": p, "lr": torch.tensor(r, device=self.device)} for p, r in wanted]
            on_gpu = self.device.type == "cuda"
            self.inner = torch.optim.AdamW(given, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True, capturable=on_gpu)
            self.inner._warned_capturable_if_run_uncaptured = True  # it runs either way

    def _place(self, device: torch.device) -> None:
        self.device = device
        self.number = torch.zeros((), dtype=torch.int64, device=device)  # steps taken
        self._on_device = torch.tensor(self.factors, device=device)

    def take(self, fused: Sequence[FusedMatrices], codes: float, grids: float) -> None:
        """Takes matrices in that take their steps themselves, at these learning rates of codes and grids."""
        self.fused = fused
        if fused and self.inner is None:
            self._place(fused[0].leaf.device)
        if fused:
            self.steps = Steps.of(codes, grids, self.factors, self.number)

    def step(self, loss: Tensor, gradient: Tensor | None = None, between: Callable[[], None] = lambda: None) -> None:
        """The next step, down the gradient of ``loss``.

        gradient: of what is minimised, with respect to ``loss``, which is then no scalar
        between:  called when parameters have their gradients, before these are used
        """
        if self.inner is not None:
            self.inner.zero_grad(set_to_none=True)
        for matrices in self.fused:
            matrices.leaf.grad = None  # of a step that was not taken
        if loss.requires_grad:  # not where every learning rate is 0
            loss.backward(gradient)
        between()
        self.update()

    def update(self) -> None:
        """The same from gradients that the parameters have already."""
        if self.inner is None and not self.fused:
            return
        if self.inner is not None:
            factor = self._on_device.index_select(0, self.number.view(1)).squeeze(0)
            for group, rate in zip(self.inner.param_groups, self.rates, strict=True):
                torch.mul(factor, rate, out=group["lr"])
            self.inner.step()
        for place, matrices in enumerate(self.fused):
            matrices.step(self.steps, seed=place)
        self.number += 1


@dataclass(frozen=True)
class QuantizedParameter:
    """A parameter of the model on its grid: a layer's experts (one matrix each) or a dense linear (one matrix).

    name:    inside the model
    widths:  of each matrix
    q:       [E, ...]
    latents: [E, R, C] codes before rounding, where training starts; None if it is not to be trained
    """

    name: str
    widths: tuple[Width, ...]
    q: Quantized
    latents: Tensor | None


class LayerResult(NamedTuple):
    """What training a layer gave.

    parameters: as given, with their trained grids
    tuned:      routers' and norms' parameters by name inside the model, float32
    before, after: mean square error of the layer's output on held-out micro-batches, relative to the target's
    """

    parameters: list[QuantizedParameter]
    tuned: dict[str, Tensor]
    before: float
    after: float


def train_layer(
    replay: Replay,
    index: int,
    activations: Activations,
    targets: Sequence[Tensor],
    parameters: list[QuantizedParameter],
    training: Training,
    stored: dict[str, torch.dtype],
    most: int | None = None,
    sharded: bool = False,
) -> LayerResult:
    """Trains layer ``index`` to turn its inputs (of the quantized model) into ``targets`` [B, S, H] (full precision).

    ``stored`` says in which type routers and norms are kept, so that they are trained as they will be. A layer that
    did not get better keeps GPTQ's codes. ``activations`` and ``targets`` are those of all ranks; ``parameters`` of
    experts are of this rank's (see ``models.expert_parallel``), and so is what is given back of them; without experts
    among them every rank does the same work. Only the first ``most`` micro-batches are used.

    sharded: ``activations`` and ``targets`` are this rank's windows of each micro-batch; gradients are added up
    """
    inputs, model, layer, ranks = activations.hidden, replay.model, replay.structure.layers[index], replay.ranks
    names = tunable_names(replay, layer) if training.tuned else []
    tuned = {name: model.get_parameter(name).detach().float().clone() for name in names}
    train, held_out = training.split(min(len(inputs), most or len(inputs)))
    split = layer.experts if layer.experts and any(x.name.startswith(layer.experts.path) for x in parameters) else None

    def run(hidden: Tensor, call: Call, weights: Sequence[Tensor], tuned: dict[str, Tensor]) -> Tensor:
        overrides = {name: rounded_to(p, stored[name]).to(model.get_parameter(name)) for name, p in tuned.items()}
        overrides.update({x.name: as_parameter(model, x.name, w) for x, w in zip(parameters, weights, strict=True)})
        with split_experts(model, split, ranks, sharded):
            return replay.run(index, hidden, call, overrides)

    @torch.no_grad()
    def error(grids: Sequence[Quantized], tuned: dict[str, Tensor]) -> float:
        weights = [
            dequantize_each(q, model.get_parameter(x.name).dtype) for q, x in zip(grids, parameters, strict=True)
        ]
        sums = torch.zeros(2, dtype=torch.float64)
        for b in held_out:
            out = run(inputs[b], activations.calls[b][index], weights, tuned)
            goal = targets[b]
            sums[0] += (out - goal).float().square().sum().item()
            sums[1] += goal.float().square().sum().item()
        if sharded:
            ranks.all_reduce(sums)
        return float(sums[0] / sums[1])

    original = {name: p.clone() for name, p in tuned.items()}
    before = error([x.q for x in parameters], original)

    def after_training() -> tuple[list[Quantized], bool]:
        """The trained grids, and whether all that was trained is finite.

        Optimizer state is freed on return: evaluation needs the same amount of memory.
        """
        shared = [split is not None and x.name.startswith(f"{split.path}.") for x in parameters]
        first = 0 if split is None else own_experts(model, split, ranks).start
        matrices = [_trainable(model, x, first * of_ranks) for x, of_ranks in zip(parameters, shared, strict=True)]
        optimizer = training.optimizer_of(training.epochs * len(train), matrices, list(tuned.values()))
        dense = [m for m, of_ranks in zip(matrices, shared, strict=True) if not of_ranks]
        alike = [p for p in (*tuned.values(), *(p for m in dense for p in m.leaves())) if p.requires_grad]

        def keep_alike() -> None:
            """Ranks have one gradient of what all of them train, beside experts of their own."""
            if sharded:
                set_gradients(alike, [p.grad for p in alike], ranks)
            elif split is not None and ranks.shards_windows:  # every GPU has roundings of its own
                for p in alike:
                    if p.grad is not None:
                        p.grad = p.grad.contiguous()
                        ranks.broadcast_into(p.grad, 0)

        def step(call: Call, hidden: Tensor, goal: Tensor) -> None:
            target = goal.float()
            out = run(hidden, call, [m.weight() for m in matrices], tuned)
            energy = target.square().sum(-1).mean().clamp_min(1e-20)
            if sharded:
                ranks.all_reduce(energy)
                energy = energy / ranks.count
            optimizer.step((out.float() - target).square().sum() / energy, between=keep_alike)
            for m in matrices:
                m.keep_in_range()

        with closing(Replayed(step, replay.device, training.tell, usable=not replay.passes_more)) as replayed:
            for batch in epochs(len(train), training.epochs, training.seed + index):
                number = train[batch]
                replayed(activations.calls[number][index], inputs[number], targets[number])
        return [m.result() for m in matrices], all_finite(p for m in matrices for p in m.trained())

    grids, finite = after_training()
    tuned = {name: ranks.broadcast(rounded_to(p.detach(), stored[name]), 0) for name, p in tuned.items()}
    after = error(grids, tuned)
    before, after = ranks.run_on_first(lambda: (before, after))  # on a GPU each rank has roundings of its own
    failed = torch.tensor(float(not (finite and all_finite(tuned.values()))), dtype=torch.float64)
    ranks.all_reduce(failed)  # each rank has experts of its own
    if after < before and not failed:
        trained = [dataclasses.replace(x, q=q) for x, q in zip(parameters, grids, strict=True)]
        return LayerResult(trained, tuned, before, after)
    return LayerResult(parameters, original, before, before)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def set_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], ranks: Ranks) -> None:
    """Gives parameters their gradients, added up over ``ranks``."""
    if ranks.count > 1:
        own = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
        gradients = ranks.all_reduce_coalesced(own)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def _trainable(model: Any, x: QuantizedParameter, first: int) -> TrainableMatrices | FusedMatrices:
    """``first``: the number of the first of the matrices among those of all ranks."""
    highest = highest_codes(x.widths, x.q.codes.device)
    if x.latents is None:
        return TrainableMatrices(x.q, highest, None)
    numbers = torch.arange(first, first + len(highest), device=highest.device)
    return trainable(x.q, highest, x.latents, model.get_parameter(x.name).dtype, numbers=numbers)


def tunable_names(replay: Replay, layer: Layer) -> list[str]:
    """Names of a layer's router and norm parameters inside the model."""
    prefix = layer.path + "."
    names = []
    for path, module in replay.model.named_modules():
        if not path.startswith(prefix):
            continue
        if is_norm(module) or path == layer.router or (layer.router and path.startswith(layer.router + ".")):
            names += [f"{path}.{n}" for n, p in module.named_parameters(recurse=False) if p.is_floating_point()]
    return names


def as_parameter(model: Any, name: str, weight: Tensor) -> Tensor:
    """Matrices [E, R, C] in the layout and type of the parameter that they stand for."""
    parameter = model.get_parameter(name)
    module = model.get_submodule(name.rpartition(".")[0])
    if hasattr(module, "is_transposed"):  # an experts module
        oriented = weight.transpose(1, 2) if module.is_transposed else weight
    else:
        oriented = weight.reshape(parameter.shape)
    return oriented.to(parameter.dtype)


def expert_overrides(model: Any, experts: Experts, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """Experts' weights [E, R, C] under their parameters' names, in their layout and type."""
    names = [f"{experts.path}.{matrix.name}" for matrix in experts.matrices]
    return {name: as_parameter(model, name, weight) for name, weight in zip(names, weights, strict=True)}
