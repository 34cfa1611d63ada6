"""Training what GPTQ leaves: codes, scales and offsets, by gradients through the rounding.

``train_layer`` trains one layer at its chosen widths, router and norms included, on the inputs that the quantized
layers before it give, towards the full-precision layer's output on full-precision inputs. ``Training`` and its
``Optimizer`` also serve the trained ladder (``rungs``) and distillation.

Held-out micro-batches decide: what did not get better on them keeps GPTQ's codes. Knows one layer at a time, no files.
Shapes: E experts, B windows, S tokens a window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemq.calibrate import Activations
from gemq.models.split import split_experts
from gemq.models.stream import Replay
from gemq.models.structure import Experts, Layer, is_norm
from gemq.quant.fused import FusedMatrices, Rates, trainable
from gemq.quant.gptq import highest_codes
from gemq.quant.grid import Quantized, dequantize_each
from gemq.quant.trainable import BETAS, EPS, TrainableMatrices, cosine_with_warmup, epochs, rounded_to
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

    def optimizer_of(
        self, matrices: Sequence[TrainableMatrices | FusedMatrices], tuned: Sequence[Tensor] = ()
    ) -> Optimizer:
        """For whole matrices, whichever way they are trained."""
        plain = [m for m in matrices if isinstance(m, TrainableMatrices)]
        optimizer = self.optimizer(
            [m.latents for m in plain if m.latents is not None], [g for m in plain for g in m.grids()], tuned
        )
        optimizer.fused = [m for m in matrices if isinstance(m, FusedMatrices)]
        optimizer.fused_rates = (self.codes, self.grids)
        return optimizer


class Optimizer:
    """AdamW over groups of parameters with their own learning rates, on one schedule.

    fused: matrices that take their steps themselves, at ``fused_rates`` of codes and grids
    """

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], float]]):
        self.rates = [rate for parameters, rate in groups if parameters and rate > 0]
        wanted = [{"params": list(parameters), "lr": rate} for parameters, rate in groups if parameters and rate > 0]
        for parameters, rate in groups:
            for parameter in parameters:
                parameter.requires_grad_(rate > 0)
        self.inner = torch.optim.AdamW(wanted, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True) if wanted else None
        self.fused: list[FusedMatrices] = []
        self.fused_rates = (0.0, 0.0)

    def step(
        self,
        loss: Tensor,
        step: int,
        steps: int,
        gradient: Tensor | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """One step down the gradient of ``loss``, number ``step`` of ``steps``.

        gradient: of what is minimised, with respect to ``loss``, which is then no scalar
        between:  called when parameters have their gradients, before these are used
        """
        if self.inner is not None:
            self.inner.zero_grad(set_to_none=True)
        loss.backward(gradient)
        between()
        self.update(step, steps)

    def update(self, step: int, steps: int) -> None:
        """The same from gradients that the parameters have already."""
        factor = cosine_with_warmup(step, steps)
        if self.inner is not None:
            for group, rate in zip(self.inner.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            self.inner.step()
        codes, grids = self.fused_rates
        for number, matrices in enumerate(self.fused):
            matrices.step(Rates(codes * factor, grids * factor, step + 1), seed=number)


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
) -> LayerResult:
    """Trains layer ``index`` to turn its inputs (of the quantized model) into ``targets`` [B, S, H] (full precision).

    ``stored`` says in which type routers and norms are kept, so that they are trained as they will be. A layer that
    did not get better keeps GPTQ's codes. ``activations`` and ``targets`` are those of all ranks; ``parameters`` of
    experts are of this rank's (see ``models.split``), and so is what is given back of them; without experts among them
    every rank does the same work. Only the first ``most`` micro-batches are used.
    """
    inputs, model, layer = activations.hidden, replay.model, replay.structure.layers[index]
    names = tunable_names(replay, layer) if training.tuned else []
    tuned = {name: model.get_parameter(name).detach().float().clone() for name in names}
    train, held_out = training.split(min(len(inputs), most or len(inputs)))
    split = layer.experts if layer.experts and any(x.name.startswith(layer.experts.path) for x in parameters) else None

    def run(batch: int, weights: Sequence[Tensor], tuned: dict[str, Tensor]) -> Tensor:
        overrides = {name: rounded_to(p, stored[name]).to(model.get_parameter(name)) for name, p in tuned.items()}
        overrides.update({x.name: as_parameter(model, x.name, w) for x, w in zip(parameters, weights, strict=True)})
        with split_experts(model, split, replay.ranks):
            return replay.run(index, inputs[batch], activations.calls[batch][index], overrides)

    @torch.no_grad()
    def error(grids: Sequence[Quantized], tuned: dict[str, Tensor]) -> float:
        weights = [
            dequantize_each(q, model.get_parameter(x.name).dtype) for q, x in zip(grids, parameters, strict=True)
        ]
        wrong = sum((run(b, weights, tuned) - targets[b]).float().square().sum().item() for b in held_out)
        return wrong / sum(targets[b].float().square().sum().item() for b in held_out)

    original = {name: p.clone() for name, p in tuned.items()}
    before = error([x.q for x in parameters], original)

    def after_training() -> list[Quantized]:
        """What is in training is gone afterwards: judging takes as much memory again."""
        matrices = [_trainable(model, x) for x in parameters]
        optimizer = training.optimizer_of(matrices, list(tuned.values()))
        alike: list[Tensor] = []  # what ranks train beside experts of their own
        if split is not None and replay.ranks.deals:
            dense = [m for m, x in zip(matrices, parameters, strict=True) if not x.name.startswith(f"{split.path}.")]
            alike = [*tuned.values(), *(p for m in dense for p in m.leaves())]

        def keep_alike() -> None:
            """On GPUs every rank has roundings of its own, and experts would be trained beside other dense codes."""
            for p in alike:
                if p.grad is not None:
                    p.grad = p.grad.contiguous()
                    replay.ranks.overwrite(p.grad, 0)

        steps = training.epochs * len(train)
        for step, batch in enumerate(epochs(len(train), training.epochs, training.seed + index)):
            target = targets[train[batch]].float()
            out = run(train[batch], [m.weight() for m in matrices], tuned)
            energy = target.square().sum(-1).mean().clamp_min(1e-20)
            optimizer.step((out.float() - target).square().sum() / energy, step, steps, between=keep_alike)
            for m in matrices:
                m.keep_in_range()
        return [m.result() for m in matrices]

    grids = after_training()
    tuned = {name: replay.ranks.broadcast(rounded_to(p.detach(), stored[name]), 0) for name, p in tuned.items()}
    after = error(grids, tuned)
    before, after = replay.ranks.agree(lambda: (before, after))  # on a GPU each rank has roundings of its own
    if after < before:
        trained = [dataclasses.replace(x, q=q) for x, q in zip(parameters, grids, strict=True)]
        return LayerResult(trained, tuned, before, after)
    return LayerResult(parameters, original, before, before)


def _trainable(model: Any, x: QuantizedParameter) -> TrainableMatrices | FusedMatrices:
    highest = highest_codes(x.widths, x.q.codes.device)
    if x.latents is None:
        return TrainableMatrices(x.q, highest, None)
    return trainable(x.q, highest, x.latents, model.get_parameter(x.name).dtype)


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
