"""Training what GPTQ leaves: codes, scales and offsets, by gradients through the rounding.

Two jobs, both with one layer in memory. ``train_rungs`` trains every expert at every width on its own, towards its
full-precision output on full-precision inputs: a better ladder, still independent of any allocation. ``train_layer``
trains one layer at its chosen widths, router and norms included, on the inputs that the quantized layers before it
give, towards the full-precision layer's output on full-precision inputs.

Held-out micro-batches decide: what did not get better on them keeps GPTQ's codes. Knows one layer at a time, no files.
Shapes: E experts, W widths, P routed pairs, T tokens, B windows, S tokens a window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemq.calibrate import Activations
from gemq.models.experts import ExpertsCall, Routed, apply_down, apply_first, expert_weight, route
from gemq.models.stream import Replay
from gemq.models.structure import Experts, Layer, is_norm
from gemq.quant.gptq import highest_codes
from gemq.quant.grid import Quantized, dequantize
from gemq.quant.trainable import TrainableMatrices, cosine_with_warmup, epochs, rounded_to
from gemq.quant.widths import Width


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

    def split(self, batches: int) -> tuple[range, range]:
        """Micro-batches to train on, and those held out: the last ones. A single batch does both."""
        held_out = min(max(1, round(self.held_out * batches)), batches - 1)
        return range(batches - held_out), range(batches - held_out, batches) if held_out else range(batches)

    def optimizer(self, codes: Sequence[Tensor], grids: Sequence[Tensor], tuned: Sequence[Tensor] = ()) -> Optimizer:
        return Optimizer(((codes, self.codes), (grids, self.grids), (tuned, self.tuned)))


class Optimizer:
    """AdamW over groups of parameters with their own learning rates, on one schedule."""

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], float]]):
        self.rates = [rate for parameters, rate in groups if parameters and rate > 0]
        wanted = [{"params": list(parameters), "lr": rate} for parameters, rate in groups if parameters and rate > 0]
        for parameters, rate in groups:
            for parameter in parameters:
                parameter.requires_grad_(rate > 0)
        self.inner = torch.optim.AdamW(wanted, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(self, loss: Tensor, step: int, steps: int) -> None:
        """One step down the gradient of ``loss``, number ``step`` of ``steps``."""
        self.inner.zero_grad(set_to_none=True)
        loss.backward()
        self.update(step, steps)

    def update(self, step: int, steps: int) -> None:
        """The same from gradients that the parameters have already."""
        factor = cosine_with_warmup(step, steps)
        for group, rate in zip(self.inner.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.inner.step()


def train_rungs(
    module: Any,
    experts: Experts,
    calls: Sequence[ExpertsCall],
    grids: list[Quantized],
    latents: list[Tensor],
    widths: tuple[Width, ...],
    training: Training,
    layer: int,
) -> tuple[list[Quantized], int]:
    """Trains all experts of a layer at all widths, each on its own.

    calls:   of the experts module on full-precision activations, one per micro-batch
    grids:   GPTQ's result for each of the two matrices, [W, E, ...]
    latents: [W, E, R, C] for each matrix: GPTQ's codes before rounding
    layer:   the layer's index: part of the seed

    Returns the grids, each expert and width as it was better on held-out micro-batches, and how many stayed GPTQ's.
    """
    rungs = []
    for i, width in enumerate(widths):
        highest = highest_codes([width] * experts.count, latents[0].device)
        rungs.append(
            [
                TrainableMatrices(Quantized(*(t[i] for t in q)), highest, v[i], by_range=True)
                for q, v in zip(grids, latents, strict=True)
            ]
        )
    every = [m for pair in rungs for m in pair]
    exact = [expert_weight(module, m.name).float() for m in experts.matrices]
    train, held_out = training.split(len(calls))

    def outputs(weights: Sequence[Tensor], x: Tensor, routed: Routed) -> Tensor:
        h = apply_first(module, experts.matrices[0].name, weights[0].to(x.dtype), x, routed)
        return apply_down(module, weights[1].to(x.dtype), h, routed).float() * routed.weight.float().unsqueeze(1)

    def pairs(call: ExpertsCall) -> tuple[Routed, Tensor, Tensor]:
        routed = route(call.top_k_index, call.top_k_weights, experts.count)
        x = call.hidden.index_select(0, routed.token)
        with torch.no_grad():
            return routed, x, outputs(exact, x, routed)

    @torch.no_grad()
    def errors(weights: list[list[Tensor]]) -> Tensor:
        """Held-out squared errors [W, E] float64."""
        total = torch.zeros(len(widths), experts.count, dtype=torch.float64, device=latents[0].device)
        for batch in held_out:
            routed, x, target = pairs(calls[batch])
            for i, pair in enumerate(weights):
                error = (outputs(pair, x, routed) - target).square().sum(1).double()
                total[i].index_add_(0, routed.expert, error)
        return total

    before = errors([[dequantize(Quantized(*(t[i] for t in q))) for q in grids] for i in range(len(widths))])
    optimizer = training.optimizer(
        [m.latents for m in every if m.latents is not None], [g for m in every for g in m.grids()]
    )
    steps = training.epochs * len(train)
    for step, batch in enumerate(epochs(len(train), training.epochs, training.seed + layer)):
        routed, x, target = pairs(calls[train[batch]])
        energy = target.square().sum(1).mean().clamp_min(1e-20)
        loss = sum(
            ((outputs([m.weight() for m in pair], x, routed) - target).square().sum() for pair in rungs),
            start=torch.zeros((), device=x.device),
        )
        optimizer.step(loss / energy, step, steps)
        for m in every:
            m.keep_in_range()
    results = [[m.result() for m in pair] for pair in rungs]
    after = errors([[dequantize(q) for q in pair] for pair in results])
    better = after < before
    chosen = []
    for j, q in enumerate(grids):
        parts = []
        for k, part in enumerate(q):
            trained = torch.stack([pair[j][k] for pair in results])
            parts.append(torch.where(better.view(*better.shape, 1, 1), trained, part))
        chosen.append(Quantized(*parts))
    return chosen, int((~better).sum())


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
) -> LayerResult:
    """Trains layer ``index`` to turn its inputs (of the quantized model) into ``targets`` [B, S, H] (full precision).

    ``stored`` says in which type routers and norms are kept, so that they are trained as they will be. A layer that
    did not get better keeps GPTQ's codes.
    """
    inputs, model = activations.hidden, replay.model
    trainable = [TrainableMatrices(x.q, highest_codes(x.widths, replay.device), x.latents) for x in parameters]
    names = tunable_names(replay, replay.structure.layers[index])
    tuned = {name: model.get_parameter(name).detach().float().clone() for name in names}
    train, held_out = training.split(len(inputs))

    def run(batch: int, weights: Sequence[Tensor], tuned: dict[str, Tensor]) -> Tensor:
        overrides = {name: rounded_to(p, stored[name]) for name, p in tuned.items()}
        overrides.update({x.name: as_parameter(model, x.name, w) for x, w in zip(parameters, weights, strict=True)})
        return replay.run(index, inputs[batch], activations.calls[batch][index], overrides)

    @torch.no_grad()
    def error(grids: Sequence[Quantized], tuned: dict[str, Tensor]) -> float:
        weights = [dequantize(q) for q in grids]
        wrong = sum((run(b, weights, tuned) - targets[b]).float().square().sum().item() for b in held_out)
        return wrong / sum(targets[b].float().square().sum().item() for b in held_out)

    original = {name: p.clone() for name, p in tuned.items()}
    before = error([x.q for x in parameters], original)
    codes = [m.latents for m in trainable if m.latents is not None]
    optimizer = training.optimizer(codes, [g for m in trainable for g in m.grids()], list(tuned.values()))
    steps = training.epochs * len(train)
    for step, batch in enumerate(epochs(len(train), training.epochs, training.seed + index)):
        target = targets[train[batch]].float()
        out = run(train[batch], [m.weight() for m in trainable], tuned)
        energy = target.square().sum(-1).mean().clamp_min(1e-20)
        optimizer.step((out.float() - target).square().sum() / energy, step, steps)
        for m in trainable:
            m.keep_in_range()
    grids = [m.result() for m in trainable]
    tuned = {name: rounded_to(p.detach(), stored[name]) for name, p in tuned.items()}
    after = error(grids, tuned)
    if after < before:
        trained = [dataclasses.replace(x, q=q) for x, q in zip(parameters, grids, strict=True)]
        return LayerResult(trained, tuned, before, after)
    return LayerResult(parameters, original, before, before)


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
