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
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gemq.calibration.activations import Activations
from gemq.models.experts import (
    ExpertsCall,
    Routed,
    apply_down,
    apply_first,
    expert_weight,
    route_in_groups,
    watch_experts,
)
from gemq.models.replay import Call, Replay
from gemq.models.structure import Experts
from gemq.runtime.activation_store import Batches
from gemq.runtime.device import FixedOrder
from gemq.runtime.ranks import Ranks

ExpertWeights = tuple[Tensor, Tensor]
"""All experts' two matrices [E, rows, columns]."""


class LayerScores:
    """Scores of one layer, kept apart by calibration source.

    costs:  [N, E, U, W] float64 of each of this rank's micro-batches
    tokens: [N, E] int64, its routed pairs
    """

    def __init__(self, sources: int, experts: int, device: torch.device):
        self.costs: list[Tensor] = []
        self.tokens = torch.zeros(sources, experts, dtype=torch.int64, device=device)

    def add(self, routed: Routed, costs: Tensor, source: Tensor) -> None:
        """The costs of a micro-batch's pairs [P, U, W]; ``source`` [T] is each token's calibration source.

        Experts that are given a row of every token for each of them route rows, not tokens: row r is that of token
        r % T.
        """
        sources, experts = self.tokens.shape
        slot = source[routed.token % len(source)] * experts + routed.expert
        kept = torch.ones_like(slot)
        if routed.kept is not None:
            kept = (torch.arange(len(slot), device=slot.device) < routed.kept).to(slot.dtype)
        own = costs.new_zeros(sources * experts, *costs.shape[1:]).index_add_(0, slot, costs)
        self.costs.append(own.unflatten(0, (sources, experts)))
        self.tokens.view(-1).index_add_(0, slot, kept)

    def total(self, ranks: Ranks, batches: int) -> tuple[Tensor, Tensor]:
        """Costs and tokens of all ranks' ``batches`` micro-batches, added up in their order: as one rank would."""
        own = torch.stack(self.costs) if self.costs else None
        parts: list[Iterator[Tensor]] = [
            iter([] if t is None else list(t)) for (t,), _ in ranks.all_gather_tensors([own])
        ]
        ordered = torch.stack([next(parts[ranks.owner(number, batches)]) for number in range(batches)])
        ranks.all_reduce(self.tokens)
        return ordered.sum(0), self.tokens


def loss_gradients(
    replay: Replay, activations: Activations, labels: str, seed: int, overrides: dict[str, Tensor] | None = None
) -> Batches:
    """Gradients [B, S, H] of the summed next-token loss at the last layer's outputs (``activations.hidden``).

    ``labels`` is ``data`` (the windows' own next tokens) or ``sampled`` (drawn from the model's own prediction, which
    makes the expected squared gradient the Fisher information). ``overrides`` are of the model's tail.
    """
    gradients = Batches(replay.memory)
    own = replay.ranks.local_batches(activations.total)
    for number, ids, hidden in zip(own, activations.ids, activations.hidden, strict=True):
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

    def backward(leaf: Tensor, arguments: Call, gradient: Tensor) -> tuple[ExpertsCall | None, tuple[Tensor, ...]]:
        """The call of the experts, and the gradients at the layer's input and at their output."""
        if module is None:
            output = replay.run(index, leaf, arguments, overrides)
            return None, torch.autograd.grad(output, leaf, gradient)
        with watch_experts(module) as watched:
            output = replay.run(index, leaf, arguments, overrides)
        (call,) = watched
        return call, torch.autograd.grad(output, (leaf, call.output), gradient)

    order = FixedOrder(replay.device)
    for i, hidden in enumerate(activations.hidden):
        run = partial(backward, replay.leaf(hidden), activations.calls[i][index], gradients[i])
        call, (gradients[i], *at_experts) = order.run(run)
        if call is None:
            yield i, None, None
            continue
        detached = ExpertsCall(
            call.hidden.detach(), call.top_k_index, call.top_k_weights.detach(), call.output.detach()
        )
        yield i, detached, at_experts[0].reshape(detached.hidden.shape)


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
    exact_first, exact_down = (expert_weight(module, m.name) for m in experts.matrices)
    routed = route_in_groups(call, (exact_first, exact_down), experts.count)
    x = call.hidden.index_select(0, routed.token)
    g = (gradient[routed.token] * routed.weight.unsqueeze(1)).to(x.dtype)

    def first(weight: Tensor) -> Tensor:
        return apply_first(module, experts.matrices[0].name, weight.to(x.dtype), x, routed)

    def down(weight: Tensor, h: Tensor) -> Tensor:
        return apply_down(module, weight.to(x.dtype), h, routed)

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
            of_units = [_along(g, down(weights[1], other), out, form)]
        else:
            of_first = (g, down(exact_down, other), out) if slope is None else (slope, other, h)
            of_units = [_along(*of_first, form), _along(g, down(weights[1], h), out, form)]
        columns.append(torch.stack(of_units, 1))
    return routed, torch.stack(columns, 2).double()


def _along(direction: Tensor, changed: Tensor, exact: Tensor, form: str) -> Tensor:
    """What a change of the rows ``exact`` [P, N] costs in a direction: float32 [P], by a form of the module's text."""
    squares = form == "elementwise"
    if direction.is_cuda:
        from gemq.kernels.training.expert_ops import projection  # triton comes with torch for CUDA, not for CPUs

        found = projection(direction, changed, exact, squares)
    else:
        products = direction.float() * (changed.float() - exact.float())
        found = (products.square() if squares else products).sum(1)
    return found if squares else found.square()


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
