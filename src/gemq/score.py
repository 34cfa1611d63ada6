"""Scores: what giving an expert a width costs, estimated from one reverse pass over the calibration windows.

GEMQ (arXiv:2605.23078), importance by quantization-error analysis. With g[t] the gradient of the loss at the output of
a layer's experts and D[t] = w[t, e] (f_{e,b}(x[t]) - f_e(x[t])) the change that width b makes, the cost is a sum over
the tokens routed to e: of (g[t, d] D[t, d])^2 over dimensions d in the paper (``elementwise``), or of (g[t] . D[t])^2
(``token``), which counts the change of the loss that dimensions make together. Where the two matrices of an expert get
widths of their own, each has its own D, with the other one exact.

The reverse pass walks the layers from the last to the first and keeps no gradient but the one at hand.
Knows one layer at a time, no files. Shapes: B windows, S tokens, T = B * S, P routed pairs, E experts, W widths,
U units of an expert that get a width of their own (its two matrices, or 1: the whole), N calibration sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gemq.calibrate import Activations
from gemq.models.experts import (
    ExpertsCall,
    Routed,
    apply_down,
    apply_first,
    expert_weight,
    route,
    watch_experts,
)
from gemq.models.stream import Replay
from gemq.models.structure import Experts
from gemq.quant.widths import Width
from gemq.resources.batches import Batches
from gemq.resources.ranks import Ranks, ShardedSum

ExpertWeights = tuple[Tensor, Tensor]
"""All experts' two matrices [E, rows, columns]."""


@dataclass
class LayerScores:
    """Scores of one layer, kept apart by calibration source.

    costs:  [N, E, U, W] float64; what they are of all micro-batches, ``finish`` says
    tokens: [N, E] int64, routed pairs
    """

    costs: Tensor
    tokens: Tensor
    shards: ShardedSum = field(default_factory=ShardedSum)
    closed: int = 0

    def close(self, shards: int) -> None:
        """Ends this rank's shards up to number ``shards``, counted from 1: the next costs are added up apart."""
        for _ in range(shards - self.closed):
            self.shards.add([self.costs])
            self.costs = torch.zeros_like(self.costs)
        self.closed = shards

    def finish(self, ranks: Ranks) -> None:
        """Adds up all shards of all ranks."""
        self.shards.add([self.costs])
        (self.costs,) = self.shards.total()
        ranks.add_up(self.costs, self.tokens)


def loss_gradients(
    replay: Replay, activations: Activations, labels: str, seed: int, overrides: dict[str, Tensor] | None = None
) -> Batches:
    """Gradients [B, S, H] of the summed next-token loss at the last layer's outputs (``activations.hidden``).

    ``labels`` is ``data`` (the windows' own next tokens) or ``sampled`` (drawn from the model's own prediction, which
    makes the expected squared gradient the Fisher information). ``overrides`` are of the model's tail.
    """
    gradients = Batches(replay.memory)
    first = replay.ranks.own(activations.total).start
    for number, (ids, hidden) in enumerate(zip(activations.ids, activations.hidden, strict=True), start=first):
        # a micro-batch's labels do not depend on which rank draws them, nor on those drawn before
        mixed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        generator = torch.Generator(replay.device).manual_seed(mixed)
        parts = []
        for some in replay.windows_together(ids):
            leaf = hidden[some].detach().requires_grad_()
            loss = _loss(replay.logits(ids[some], leaf, overrides).float(), ids[some], labels, generator)
            parts.append(torch.autograd.grad(loss, leaf)[0])
        gradients.append(parts[0] if len(parts) == 1 else torch.cat(parts))
    return gradients


def _loss(logits: Tensor, ids: Tensor, labels: str, generator: torch.Generator) -> Tensor:
    """The summed next-token loss of logits [B, S, V] float32."""
    if labels == "data":
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    with torch.no_grad():
        target = torch.multinomial(logits.flatten(0, 1).softmax(-1), 1, generator=generator).squeeze(1)
    return F.cross_entropy(logits.flatten(0, 1), target, reduction="sum")


def reverse_layer(
    replay: Replay,
    index: int,
    activations: Activations,
    gradients: Batches,
    overrides: dict[str, Tensor] | None = None,
) -> Iterator[tuple[int, ExpertsCall | None, Tensor | None]]:
    """Passes gradients [B, S, H] through layer ``index``, whose inputs are ``activations.hidden``, in place.

    Yields, per micro-batch, its number, the call of the experts module and the gradient [T, H] at its output (both
    None in a dense layer). ``overrides`` as in ``Replay.run``.
    """
    experts = replay.structure.layers[index].experts
    module = replay.model.get_submodule(experts.path) if experts else None
    for i, hidden in enumerate(activations.hidden):
        leaf = replay.leaf(hidden)
        if module is None:
            output = replay.run(index, leaf, activations.calls[i][index], overrides)
            (gradients[i],) = torch.autograd.grad(output, leaf, gradients[i])
            yield i, None, None
            continue
        with watch_experts(module) as watched:
            output = replay.run(index, leaf, activations.calls[i][index], overrides)
        (call,) = watched
        below, at_experts = torch.autograd.grad(output, (leaf, call.output), gradients[i])
        gradients[i] = below
        del output, leaf
        detached = ExpertsCall(
            call.hidden.detach(), call.top_k_index, call.top_k_weights.detach(), call.output.detach()
        )
        yield i, detached, at_experts.reshape(detached.hidden.shape)


@torch.no_grad()
def pair_costs(
    module: Any,
    experts: Experts,
    call: ExpertsCall,
    gradient: Tensor,
    rungs: Sequence[ExpertWeights],
    form: str,
    units: int,
) -> tuple[Routed, Tensor]:
    """Each routed pair's cost at each width: (routing, [P, U, W] float64).

    gradient: [T, H] at the experts' output; ``rungs`` gives all experts' weights at one width after another
    units:    2 for the cost of each matrix, 1 for that of both together
    """
    routed = route(call.top_k_index, call.top_k_weights, experts.count)
    x = call.hidden.index_select(0, routed.token)
    g = gradient[routed.token].float() * routed.weight.float().unsqueeze(1)
    exact_first, exact_down = (expert_weight(module, m.name) for m in experts.matrices)

    def first(weight: Tensor) -> Tensor:
        return apply_first(module, experts.matrices[0].name, weight.to(x.dtype), x, routed)

    def down(weight: Tensor, h: Tensor) -> Tensor:
        return apply_down(module, weight.to(x.dtype), h, routed).float()

    h = first(exact_first)
    slope = None
    if units == 2 and form == "token":
        # g . (change of h, through the exact down matrix) is (g through it backwards) . (change of h): one product for
        # all widths. To first order where a norm follows.
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            out = down(exact_down, leaf)
            (slope,) = torch.autograd.grad(out, leaf, g)
        out = out.detach()
    else:
        out = down(exact_down, h)
    columns = []
    for weights in rungs:
        other = first(weights[0])
        if units == 1:
            products = [g * (down(weights[1], other) - out)]
        else:
            of_first = g * (down(exact_down, other) - out) if slope is None else slope * other.sub_(h)
            products = [of_first, g * (down(weights[1], h) - out)]
        of_units = [p.sum(1, dtype=torch.float32).square() if form == "token" else p.square().sum(1) for p in products]
        columns.append(torch.stack(of_units, 1))
    return routed, torch.stack(columns, 2).double()


def add_costs(scores: LayerScores, routed: Routed, costs: Tensor, source: Tensor) -> None:
    """Adds pairs' costs [P, U, W] to ``scores``; ``source`` [T] is each token's calibration source.

    Experts that are given a row of every token for each of them route rows, not tokens: row r is that of token r % T.
    """
    sources, experts = scores.costs.shape[:2]
    slot = source[routed.token % len(source)] * experts + routed.expert
    scores.costs.flatten(0, 1).index_add_(0, slot, costs)
    scores.tokens += torch.bincount(slot, minlength=sources * experts).view(sources, experts)


def empty_scores(
    sources: int, experts: int, units: int, widths: tuple[Width, ...], device: torch.device
) -> LayerScores:
    return LayerScores(
        torch.zeros(sources, experts, units, len(widths), dtype=torch.float64, device=device),
        torch.zeros(sources, experts, dtype=torch.int64, device=device),
    )


def rescaled(costs: Tensor, kl: Tensor) -> Tensor:
    """Costs [E, U, W] of a layer, scaled at each width so that they sum to the KL [W] measured there, in nats a token.

    Costs that are all zero stay zero.
    """
    total = costs.sum((0, 1))
    return costs * torch.where(total > 0, kl / total, 0.0)


def smooth_usage(costs: Tensor, tokens: Tensor, k: float) -> Tensor:
    """Usage smoothing: costs [E, U, W] as they would be if token counts [E] were drawn towards their mean.

    A cost is multiplied by (n + k mean n) / ((1 + k) n). Experts that saw no token get the layer's mean cost per token.
    """
    n = tokens.double().view(-1, 1, 1)
    mean = n.mean()
    if mean == 0:
        return costs
    per_token = torch.where(n > 0, costs / n.clamp_min(1), costs.sum(0) / n.sum())
    return per_token * (n + k * mean) / (1 + k)
