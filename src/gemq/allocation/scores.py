"""Scores: the estimated cost of giving an expert a width, from one reverse pass over the calibration windows.

GEMQ (arXiv:2605.23078), importance by quantization-error analysis. Let g[t] be the gradient of the loss at the output
of a layer's experts, and D[t] = w[t, e] (f_{e,b}(x[t]) - f_e(x[t])) the change of that output with expert e at width b.
The cost is a sum over the tokens routed to e: of (g[t, d] D[t, d])^2 over dimensions d in the paper (``elementwise``),
or of (g[t] . D[t])^2 (``token``), which measures the change of the loss that all dimensions make together. If the two
matrices of an expert get separate widths, each has its own D, with the other matrix in full precision.

The reverse pass runs the layers from the last to the first, and stores the gradient of one layer at a time. Must not
import files.

Shapes: B windows, S tokens, T = B * S, P routed pairs, E experts, W widths, N calibration sources, U units per expert
that get separate widths: 2 for its matrices, or 1 for the whole expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gemq.calibration.activations import Activations
from gemq.calibration.input_recorder import cat_rows
from gemq.errors import NotFiniteError
from gemq.models.experts import (
    ExpertsCall,
    RoutedPairs,
    apply_down,
    apply_first,
    expert_weight,
    record_experts_calls,
    route_call,
)
from gemq.models.replay import Call, Replay
from gemq.models.structure import Experts
from gemq.runtime.activation_store import ActivationStore
from gemq.runtime.device import FixedOrder
from gemq.runtime.ranks import Ranks

ExpertWeights = tuple[Tensor, Tensor]
"""All experts' two matrices [E, rows, columns]."""


class LayerScores:
    """Scores of one layer, separately for each calibration source.

    Args:
        sources: number of calibration sources.
        experts: number of experts.
        device: where to sum.
        outputs: size H of the experts' output, to sum moments of gradients; 0 for none.

    Attributes:
        costs: float64 [N, E, U, W] for each of this rank's micro-batches.
        tokens: int64 [N, E], this rank's routed pairs.
        gradients: float64 [H, H], sum over tokens of g g^T for the gradients g at the experts' output.
    """

    def __init__(self, sources: int, experts: int, device: torch.device, outputs: int = 0):
        self.costs: list[Tensor] = []
        self.tokens = torch.zeros(sources, experts, dtype=torch.int64, device=device)
        self.gradients = torch.zeros(outputs, outputs, dtype=torch.float64, device=device)

    def add(self, routed: RoutedPairs, costs: Tensor, source: Tensor) -> None:
        """Adds a micro-batch.

        Args:
            routed: its routed pairs. In experts modules that receive a row for each token and expert, row r belongs to
                token r % T.
            costs: [P, U, W]
            source: [T], the calibration source of each token.
        """
        sources, experts = self.tokens.shape
        slot = source[routed.token % len(source)] * experts + routed.expert
        pair_counts = torch.ones_like(slot)
        if routed.num_valid is not None:
            pair_counts = (torch.arange(len(slot), device=slot.device) < routed.num_valid).to(slot.dtype)
        sums = costs.new_zeros(sources * experts, *costs.shape[1:]).index_add_(0, slot, costs)
        self.costs.append(sums.unflatten(0, (sources, experts)))
        self.tokens.view(-1).index_add_(0, slot, pair_counts)

    def add_gradients(self, gradients: Tensor) -> None:
        """Adds gradients [T, H] at the output of the experts to ``gradients``."""
        if len(self.gradients):
            rows = gradients.float()
            self.gradients += rows.mT @ rows

    def total_gradients(self, ranks: Ranks) -> Tensor:
        """Sums the moments of gradients of all ranks: float32 [H, H], scaled to a mean of one on the diagonal.

        Sums of float32 in float64 are exact, and therefore the same for any number of ranks.

        Raises:
            NotFiniteError: a gradient is not finite.
        """
        ranks.all_reduce(self.gradients)
        mean = self.gradients.diagonal().mean()
        if not math.isfinite(mean.item()):
            raise NotFiniteError("the gradients of the loss overflow: try --dtype float32")
        return self.gradients.div_(torch.where(mean > 0, mean, torch.ones_like(mean))).float()

    def total(self, ranks: Ranks, batches: int) -> tuple[Tensor, Tensor]:
        """Sums costs and tokens over the micro-batches of all ranks, in their order, as a job with one rank does.

        Args:
            ranks: the processes. Runs collectives.
            batches: number of micro-batches of all ranks.
        """
        local = torch.stack(self.costs) if self.costs else None
        costs_by_rank: list[Iterator[Tensor]] = []
        for (rank_costs,), _ in ranks.all_gather_tensors([local]):
            costs_by_rank.append(iter([] if rank_costs is None else list(rank_costs)))
        ordered = [next(costs_by_rank[ranks.owner(batch, batches)]) for batch in range(batches)]
        ranks.all_reduce(self.tokens)
        return torch.stack(ordered).sum(0), self.tokens


def loss_gradients(
    replay: Replay, activations: Activations, labels: str, seed: int, overrides: dict[str, Tensor] | None = None
) -> ActivationStore:
    """Gradients [B, S, H] of the summed next-token loss with respect to the last layer's outputs.

    Args:
        replay: the model.
        activations: the last layer's outputs in ``hidden``.
        labels: ``data``, the next tokens of the windows, or ``sampled``, drawn from the model's own prediction, which
            makes the expected squared gradient the Fisher information.
        seed: of sampled labels.
        overrides: of the model's tail, as in ``Replay.logits``.
    """
    gradients = ActivationStore(replay.memory)
    local_batches = replay.ranks.local_batches(activations.total)
    for batch, ids, hidden in zip(local_batches, activations.ids, activations.hidden, strict=True):
        # labels of a micro-batch depend neither on the rank that draws them nor on those drawn before
        batch_seed = int(np.random.SeedSequence([seed, batch]).generate_state(1)[0])
        generator = torch.Generator(replay.device).manual_seed(batch_seed)
        window_gradients = []
        for windows in replay.logit_chunks(ids):
            leaf = hidden[windows].detach().requires_grad_()
            # no name for the logits, so that they are freed before the backward pass
            loss = _loss(replay.logits(ids[windows], leaf, overrides).float(), ids[windows], labels, generator)
            window_gradients.append(torch.autograd.grad(loss, leaf)[0])
        gradients.append(cat_rows(window_gradients))
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
    gradients: ActivationStore,
    overrides: dict[str, Tensor] | None = None,
) -> Iterator[tuple[int, ExpertsCall | None, Tensor | None]]:
    """Propagates gradients through layer ``index``, micro-batch by micro-batch.

    Args:
        replay: the model.
        index: of the layer.
        activations: the layer's inputs in ``hidden``.
        gradients: [B, S, H] at the layer's outputs, overwritten by those at its inputs.
        overrides: as in ``Replay.run``.

    Yields:
        The index of the micro-batch, the call of the experts module, and the gradient [T, H] at its output. The last
        two are None in a dense layer.
    """
    experts = replay.structure.layers[index].experts
    module = replay.model.get_submodule(experts.path) if experts else None

    def backward(leaf: Tensor, layer_call: Call, gradient: Tensor) -> tuple[ExpertsCall | None, tuple[Tensor, ...]]:
        """The call of the experts module, and the gradients at the layer's input and at the experts' output."""
        if module is None:
            output = replay.run(index, leaf, layer_call, overrides)
            return None, torch.autograd.grad(output, leaf, gradient)
        with record_experts_calls(module) as calls:
            output = replay.run(index, leaf, layer_call, overrides)
        (call,) = calls
        return call, torch.autograd.grad(output, (leaf, call.output), gradient)

    order = FixedOrder(replay.device)
    for batch, hidden in enumerate(activations.hidden):
        run = partial(backward, replay.leaf(hidden), activations.calls[batch][index], gradients[batch])
        call, grads = order.run(run)
        gradients[batch] = grads[0]
        if call is None:
            yield batch, None, None
            continue
        detached = ExpertsCall(
            call.hidden.detach(), call.top_k_index, call.top_k_weights.detach(), call.output.detach()
        )
        yield batch, detached, grads[1].reshape(detached.hidden.shape)


@torch.no_grad()
def pair_costs(
    module: Any,
    experts: Experts,
    call: ExpertsCall,
    gradient: Tensor,
    candidates: Sequence[ExpertWeights],
    form: str,
    units_per_expert: int,
) -> tuple[RoutedPairs, Tensor]:
    """The cost of each routed pair at each width.

    Args:
        module: the experts module.
        experts: its description.
        call: a call of the module.
        gradient: [T, H] at the output of that call.
        candidates: weights of all experts at each of the W widths.
        form: ``elementwise`` or ``token``, see the module's docstring.
        units_per_expert: 2 for the cost of each matrix, 1 for that of both together.

    Returns:
        The routed pairs, and their costs float64 [P, U, W].
    """
    exact_first, exact_down = (expert_weight(module, matrix.name) for matrix in experts.matrices)
    routed = route_call(call, (exact_first, exact_down), experts.count)
    x = call.hidden.index_select(0, routed.token)
    grad_pair = (gradient[routed.token] * routed.weight.unsqueeze(1)).to(x.dtype)

    def run_first(weight: Tensor) -> Tensor:
        return apply_first(module, experts.matrices[0].name, weight.to(x.dtype), x, routed)

    def run_down(weight: Tensor, h: Tensor) -> Tensor:
        return apply_down(module, weight.to(x.dtype), h, routed)

    h = run_first(exact_first)
    grad_h = None
    if units_per_expert == 2 and form == "token":
        # g . (change of h, passed through the exact down matrix) equals (g, passed backward through it) . (change of
        # h), which takes one product for all widths. It is a first-order approximation if a norm follows.
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            out = run_down(exact_down, leaf)
            (grad_h,) = torch.autograd.grad(out, leaf, grad_pair)
        out = out.detach()
    else:
        out = run_down(exact_down, h)
    costs_by_width = []
    for first_weight, down_weight in candidates:
        quantized_h = run_first(first_weight)
        if units_per_expert == 1:
            unit_costs = [_change_cost(grad_pair, run_down(down_weight, quantized_h), out, form)]
        else:
            if grad_h is None:
                first_cost = _change_cost(grad_pair, run_down(exact_down, quantized_h), out, form)
            else:
                first_cost = _change_cost(grad_h, quantized_h, h, form)
            unit_costs = [first_cost, _change_cost(grad_pair, run_down(down_weight, h), out, form)]
        costs_by_width.append(torch.stack(unit_costs, 1))
    return routed, torch.stack(costs_by_width, 2).double()


def _change_cost(gradient: Tensor, changed: Tensor, exact: Tensor, form: str) -> Tensor:
    """The cost of a change of the rows ``exact`` [P, N] with ``gradient`` [P, N]: float32 [P]."""
    is_elementwise = form == "elementwise"
    if gradient.is_cuda:
        from gemq.kernels.training.expert_ops import projection  # triton comes with torch for CUDA, not for CPUs

        sums = projection(gradient, changed, exact, is_elementwise)
    else:
        products = gradient.float() * (changed.float() - exact.float())
        sums = (products.square() if is_elementwise else products).sum(1)
    return sums if is_elementwise else sums.square()


def rescale_to_kl(costs: Tensor, kl: Tensor) -> Tensor:
    """Scales the costs [E, U, W] of a layer at each width, so that they sum to the KL [W] measured there.

    The KL is in nats per token. Costs that are all zero stay zero.
    """
    total = costs.sum((0, 1))
    return costs * torch.where(total > 0, kl / total, 0.0)


def smooth_usage(costs: Tensor, tokens: Tensor, k: float) -> Tensor:
    """Usage smoothing: costs [E, U, W] as if token counts [E] were moved towards their mean.

    A cost is multiplied by (n + k mean n) / ((1 + k) n). Experts that saw no token get the layer's mean cost per token.
    """
    n = tokens.double().view(-1, 1, 1)
    mean = n.mean()
    if mean == 0:
        return costs
    per_token = torch.where(n > 0, costs / n.clamp_min(1), costs.sum(0) / n.sum())
    return per_token * (n + k * mean) / (1 + k)
