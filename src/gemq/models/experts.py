"""The routed experts' arithmetic, step by step and with any weights.

Transformers' own experts modules compute a whole block with their own weights. Calibration needs more: the input of
``down_proj`` for its Hessian, and every routed pair's output with other weights. Everything a family adds (clamps,
biases, interleaved gates, a norm behind each expert) is taken from the module itself.

Shapes: T tokens, K experts a token, P = T * K routed pairs sorted by expert, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from gemq.kernels.expert_inputs import passed_on, routing_of_rows
from gemq.models import grouped
from gemq.models.expert_parallel import Split, split_of

IMPLEMENTATION = "gemq_calibration"
EVERY_EXPERT = "gemq_every_expert"

EVERY_BYTES = 1 << 28
"""For what every expert makes of every token: see ``every_expert_forward``."""


@dataclass
class Routed:
    """The routed pairs of one call of an experts module, sorted by expert.

    token:  [P] int64, row of the call's hidden states
    expert: [P] int64
    weight: [P] routing weight, differentiable where the call's was
    ends:   [E] int32, where each expert's pairs end, on the device
    place:  [T, K] int64, where a token's pairs lie, if all T * K are here
    owners: [E] int64, whose bias an expert's pairs get, if not their own number's (see ``stacked``)
    kept:   [1] int32 on the device, how many of the first pairs are none that should have been dropped; None: all
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    ends: Tensor
    place: Tensor | None = None
    owners: Tensor | None = None
    kept: Tensor | None = None

    @cached_property
    def counts(self) -> list[int]:
        """Pairs of each expert. Waits for the device, once."""
        return _differences(self.ends.tolist())

    def stacked(self, experts: slice, times: int) -> Routed:
        """The pairs of some experts, ``times`` times one after another, as if each time to experts of its own.

        ``experts`` has a start and a stop. For weights [times * E', ...], which are several versions of some experts'.
        """
        counts = self.counts[experts]
        start, count = sum(self.counts[: experts.start]), sum(counts)
        rows = slice(start, start + count)
        every = torch.arange(times, device=self.token.device).unsqueeze(1)
        result = Routed(
            self.token[rows].repeat(times),
            (self.expert[rows] - experts.start + every * len(counts)).flatten(),
            self.weight[rows].repeat(times),
            (self.ends[experts] - start + every.int() * count).flatten(),
            owners=torch.arange(experts.start, experts.stop, device=self.token.device).repeat(times),
        )
        result.counts = counts * times
        return result


def route(top_k_index: Tensor, top_k_weights: Tensor, experts: int) -> Routed:
    """Sorts a call's routing (index and weights [T, K]) by expert. Indices past the last expert are dropped."""
    expert, order, ends = _sorted(top_k_index, experts)
    counts = _differences(ends.tolist())
    pairs = sum(counts)
    order = order[:pairs]
    routed = Routed(order // top_k_index.shape[-1], expert[:pairs], top_k_weights.reshape(-1)[order], ends)
    routed.counts = counts
    return routed


def route_all(top_k_index: Tensor, top_k_weights: Tensor, experts: int) -> Routed:
    """As ``route``, without waiting for the device to know how many are dropped.

    Pairs of indices past the last expert go to that expert, with a weight of zero.
    """
    expert, order, ends = _sorted(top_k_index, experts)
    weight = top_k_weights.reshape(-1)[order]
    weight = torch.where(expert < experts, weight, torch.zeros_like(weight))
    kept = ends[-1:].clone()
    ends[-1:].fill_(len(order))  # assigning a number would wait for the device
    token = order // top_k_index.shape[-1]
    return Routed(token, expert.clamp(max=experts - 1), weight, ends, _places(order, top_k_index), kept=kept)


def route_own(top_k_index: Tensor, top_k_weights: Tensor, own: slice) -> Routed:
    """The pairs of some of the experts, counted from the first of these, and behind them all others, in no group.

    Does not wait for the device. ``own`` has a start and a stop.
    """
    count = own.stop - own.start
    inside = (top_k_index >= own.start) & (top_k_index < own.stop)
    expert, order, ends = _sorted(torch.where(inside, top_k_index - own.start, count), count)
    token, weight = order // top_k_index.shape[-1], top_k_weights.reshape(-1)[order]
    owners = torch.arange(own.start, own.stop, device=order.device)
    return Routed(token, expert.clamp(max=count - 1), weight, ends, _places(order, top_k_index), owners)


def route_in_groups(call: ExpertsCall, weights: Sequence[Tensor], experts: int) -> Routed:
    """``route_all`` where products with these weights are grouped, and nothing waits for the device; else ``route``."""
    return (route_all if grouped.usable(call.hidden, *weights) else route)(
        call.top_k_index, call.top_k_weights, experts
    )


def route_to(call: ExpertsCall, own: slice, weight: Tensor) -> Routed:
    """A call's pairs with some of the experts, counted from the first of these, for products with ``weight``.

    Where products are grouped, all other pairs follow in no group, and nothing waits for the device.
    """
    routed = route_own(call.top_k_index, call.top_k_weights, own)
    if grouped.usable(call.hidden, weight):
        return routed
    pairs = int(routed.ends[-1])
    return Routed(routed.token[:pairs], routed.expert[:pairs], routed.weight[:pairs], routed.ends, owners=routed.owners)


def _places(order: Tensor, top_k_index: Tensor) -> Tensor:
    """``Routed.place`` of pairs in an order."""
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return place.view(top_k_index.shape)


def _differences(ends: list[int]) -> list[int]:
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _sorted(top_k_index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Experts of the pairs in their order, the pairs in that order, and ``Routed.ends``."""
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    numbers = torch.arange(experts, device=expert.device, dtype=expert.dtype)
    return expert, order, torch.searchsorted(expert, numbers, right=True, out_int32=True)


@dataclass
class ExpertsCall:
    """What one forward pass of a layer gave to its experts module and got back."""

    hidden: Tensor
    """[T, H]"""
    top_k_index: Tensor
    """[T, K] int64"""
    top_k_weights: Tensor
    """[T, K]"""
    output: Tensor
    """[T, H]"""


@contextmanager
def watch_experts(module: Any) -> Iterator[list[ExpertsCall]]:
    """Collects the calls of an experts module while the context is open.

    The arguments come from the call itself, never from the router's output, whose order differs between families.
    """
    calls: list[ExpertsCall] = []

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        calls.append(call_of(module, args, kwargs, output))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def call_of(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor | None = None) -> ExpertsCall:
    """The call of an experts module from its arguments, with an empty output if there is none yet."""
    hidden, *routing = (*args, *kwargs.values())[:3]
    if getattr(module, "batched_rows", False):
        routing = list(routing_of_rows(hidden, expert_count(module)))
    index, weights = routing
    if index.is_floating_point():  # a family that passes weights before indices
        index, weights = weights, index
    output = hidden.new_empty(0) if output is None else output
    return ExpertsCall(hidden.reshape(-1, hidden.shape[-1]), index, weights, output)


def expert_count(module: Any) -> int:
    """Experts of an experts module, packed or not."""
    down = module.down_proj
    return int(down.shape[0] if isinstance(down, Tensor) else down.num_experts)


def oriented(module: Any, name: str) -> Tensor:
    """An experts module's weight as [E, rows, columns]: outputs by inputs, whatever the family's layout."""
    weight = getattr(module, name)
    return weight.transpose(1, 2) if module.is_transposed else weight


def expert_weight(module: Any, name: str) -> Tensor:
    """``oriented``, outside autograd."""
    return oriented(module, name).detach()


def apply_first(module: Any, name: str, weight: Tensor, x: Tensor, routed: Routed) -> Tensor:
    """Inputs x [P, H] and weights [E, rows, H] of the matrix ``name`` -> what ``down_proj`` receives, [P, I]."""
    out = _product(x, weight, _bias(module, name, routed), routed)
    if not module.has_gate:
        return module.act_fn(out)
    return grouped.gate(module, out) if grouped.usable(x, weight) else module._apply_gate(out)


def apply_down(module: Any, weight: Tensor, h: Tensor, routed: Routed) -> Tensor:
    """Intermediates h [P, I] and down weights [E, H, I] -> each pair's output [P, H], not yet times its weight."""
    out = _product(h, weight, _bias(module, "down_proj", routed), routed)
    return module.post_expert_norm(out) if getattr(module, "has_post_expert_norm", False) else out


def _bias(module: Any, name: str, routed: Routed) -> Tensor | None:
    if not module.has_bias:
        return None
    bias = getattr(module, f"{name}_bias")
    return bias if routed.owners is None else bias[routed.owners]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, routed: Routed) -> Tensor:
    """One linear per expert over its slice of the sorted pairs: [P, columns] -> [P, rows]."""
    if grouped.usable(x, weight):
        out = grouped.linear(x, weight, routed.ends)
        return out if bias is None else out + bias[routed.expert]
    counts = routed.counts
    most = max(counts, default=0)
    if x.device.type == "cuda" and len(counts) * most <= 4 * len(x):
        # one batched product over padded slices: launches, not arithmetic, bound small experts on a GPU
        starts = F.pad(routed.ends[:-1], (1, 0))
        slot = torch.arange(len(x), device=x.device) + (routed.expert * most - starts[routed.expert])
        padded = x.new_zeros(len(counts) * most, x.shape[1]).index_copy(0, slot, x).unflatten(0, (-1, most))
        out = torch.bmm(padded, weight.transpose(1, 2)).flatten(0, 1).index_select(0, slot)
        return out if bias is None else out + bias[routed.expert]
    return grouped.looped(x, weight, bias, counts)


def experts_forward(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """A whole experts block, [T, H] -> [T, H], as a Transformers experts implementation. Differentiable in weights.

    Sums over a token's experts in a fixed order. Faster here than Transformers' own: on CPU than ``grouped_mm``,
    which loops there, and for float32 on a GPU.
    """
    first = "gate_up_proj" if module.has_gate else "up_proj"
    matrices = oriented(module, first), oriented(module, "down_proj")
    in_groups = grouped.usable(hidden, *matrices)
    split = split_of(module)
    count = len(matrices[1]) if split is None else split.count
    if split is not None:
        top_k_index = split.same(top_k_index)
    if in_groups and split is not None:
        own = route_own(split.all_gather(top_k_index), split.with_all_gradients(top_k_weights), split.own)
        out = _grouped(module, first, hidden, own, split)
    elif in_groups:
        out = _grouped(module, first, hidden, route_all(top_k_index, top_k_weights, count), None)
    else:
        routed = route(top_k_index, top_k_weights, count)
        if split is None:
            h = apply_first(module, first, matrices[0], hidden.index_select(0, routed.token), routed)
            out = apply_down(module, matrices[1], h, routed)
        else:
            out = _split_pairs(split, module, first, hidden, routed)
        out = out * routed.weight.unsqueeze(1)
        out = torch.zeros_like(hidden).index_add(0, routed.token, out.to(hidden.dtype))
    if getattr(module, "passes_on", False):
        out = out + passed_on(hidden, top_k_index, top_k_weights, count)
    return out


def _split_pairs(split: Split, module: Any, first: str, hidden: Tensor, routed: Routed) -> Tensor:
    """Every pair's output [P, H] on every rank, where the module has this rank's experts. ``hidden`` [T, H]."""
    matrices = oriented(module, first), oriented(module, "down_proj")
    own, rows = routed.stacked(split.own, 1), split.rows(routed.counts)
    x = split.take(hidden.index_select(0, routed.token), rows)
    out = apply_down(module, matrices[1], apply_first(module, first, matrices[0], x, own), own)
    if not len(x):  # no pair for this rank: zero gradients, as an expert without pairs has beside others
        out = out + x.sum() + 0 * sum(matrix.sum() for matrix in matrices)
    return split.join(out, rows)


def _grouped(module: Any, first: str, hidden: Tensor, routed: Routed, split: Split | None) -> Tensor:
    """Every token's weighted sum over its experts [T, H], in grouped products; nothing waits for the GPU.

    split: the ranks whose sums are added up, where ``routed`` are one rank's pairs
    """
    from gemq.kernels.training.expert_ops import (  # triton comes with torch for CUDA, not for CPUs
        Shared,
        combine,
        gather,
    )

    assert routed.place is not None
    shared = None if split is None else Shared(routed.ends[-1:], split.all_gather, split.reduce)
    x = gather(hidden, routed.token, routed.place, shared)
    h = apply_first(module, first, oriented(module, first), x, routed)
    out = apply_down(module, oriented(module, "down_proj"), h, routed)
    return combine(out.to(hidden.dtype), routed.weight, routed.token, routed.place, shared)


def every_expert_forward(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``experts_forward`` with every expert run on every token, as one batched product on a GPU, so that nothing waits.

    For steps of few tokens, which read all experts anyway. What is too much for that, or split over ranks, goes to
    ``experts_forward``.
    """
    first = "gate_up_proj" if module.has_gate else "up_proj"
    weight = oriented(module, first)
    tokens, count = len(hidden), len(weight)
    if split_of(module) is not None or tokens * count * sum(weight.shape[1:]) * hidden.itemsize > EVERY_BYTES:
        return experts_forward(module, hidden, top_k_index, top_k_weights)
    numbers = torch.arange(count, device=hidden.device)
    shares = hidden.new_zeros(tokens, count + 1).scatter_add_(
        1, top_k_index.clamp(max=count), top_k_weights.to(hidden.dtype)
    )[:, :count]
    every = Routed(
        torch.arange(tokens, device=hidden.device).repeat(count),
        numbers.repeat_interleave(tokens, output_size=tokens * count),
        shares.T.reshape(-1),
        ((numbers + 1) * tokens).int(),
    )
    every.counts = [tokens] * count
    h = apply_first(module, first, weight, hidden.repeat(count, 1), every)
    out = apply_down(module, oriented(module, "down_proj"), h, every) * every.weight.unsqueeze(1)
    out = out.view(count, tokens, -1).sum(0)
    if getattr(module, "passes_on", False):
        out = out + passed_on(hidden, top_k_index, top_k_weights, count)
    return out.to(hidden.dtype)


@contextmanager
def _own_forward(module: Any) -> Iterator[None]:
    """Lets an experts module run the forward of its class for the moment, whatever implementation was chosen."""
    config = getattr(module, "config", None)
    if config is None:  # no choice of implementations
        yield
        return
    chosen = config._experts_implementation
    config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._experts_implementation = chosen


@torch.no_grad()
def check_arithmetic(module: Any, call: ExpertsCall) -> float:
    """Relative difference between ``experts_forward`` and what the module's own class computes for a call.

    Small wherever this module understands the family; a clamp or a gate that it does not know shows here.
    """
    own = experts_forward(module, call.hidden, call.top_k_index, call.top_k_weights).float()
    arguments = (
        (call.hidden,)
        if getattr(module, "batched_rows", False)
        else (call.hidden, call.top_k_index, call.top_k_weights)
    )
    with _own_forward(module):
        expected = module(*arguments)
    expected = expected.reshape(own.shape).float()
    return float((own - expected).norm() / expected.norm().clamp_min(1e-12))


def use_experts_forward(model: Any) -> None:
    """Makes a model's experts modules run ``experts_forward``. Families without the interface keep their own."""
    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    model.set_experts_implementation(IMPLEMENTATION)


def use_fast_experts(model: Any) -> None:
    """For generation in full precision on a GPU: what a CUDA graph can hold.

    Transformers' ``grouped_mm`` in bfloat16; in other types it waits for the device and loops over the experts.
    """
    parameter = next(model.parameters())
    if not parameter.is_cuda:
        return
    if EVERY_EXPERT not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(EVERY_EXPERT, every_expert_forward)
    model.set_experts_implementation("grouped_mm" if parameter.dtype == torch.bfloat16 else EVERY_EXPERT)
