"""The routed experts' arithmetic, step by step and with any weights.

Transformers' own experts modules compute a whole block with their own weights. Calibration needs more: the input of
``down_proj`` for its Hessian, and every routed pair's output with other weights. Everything a family adds (clamps,
biases, interleaved gates, a norm behind each expert) is taken from the module itself.

Shapes: T tokens, K experts a token, P = T * K routed pairs sorted by expert, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from gemq.checkpoint.adopt import passed_on, routing_of_rows

IMPLEMENTATION = "gemq_calibration"


@dataclass(frozen=True)
class Routed:
    """The routed pairs of one call of an experts module, sorted by expert.

    token:  [P] int64, row of the call's hidden states
    expert: [P] int64
    weight: [P] routing weight, differentiable where the call's was
    counts: pairs of each expert (a list, so that slicing needs no further synchronisation)
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    counts: list[int]


def route(top_k_index: Tensor, top_k_weights: Tensor, experts: int) -> Routed:
    """Sorts a call's routing (index and weights [T, K]) by expert. Indices past the last expert are dropped."""
    flat = top_k_index.reshape(-1)
    expert, order = torch.sort(flat, stable=True)
    counts = torch.bincount(flat.clamp(max=experts), minlength=experts + 1)[:experts].tolist()
    pairs = sum(counts)
    order = order[:pairs]
    return Routed(order // top_k_index.shape[-1], expert[:pairs], top_k_weights.reshape(-1)[order], counts)


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
        hidden, *routing = (*args, *kwargs.values())[:3]
        if getattr(module, "batched_rows", False):
            routing = list(routing_of_rows(hidden, module.down_proj.shape[0]))
        index, weights = routing
        if index.is_floating_point():  # a family that passes weights before indices
            index, weights = weights, index
        calls.append(ExpertsCall(hidden.reshape(-1, hidden.shape[-1]), index, weights, output))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def oriented(module: Any, name: str) -> Tensor:
    """An experts module's weight as [E, rows, columns]: outputs by inputs, whatever the family's layout."""
    weight = getattr(module, name)
    return weight.transpose(1, 2) if module.is_transposed else weight


def expert_weight(module: Any, name: str) -> Tensor:
    """``oriented``, outside autograd."""
    return oriented(module, name).detach()


def apply_first(module: Any, name: str, weight: Tensor, x: Tensor, routed: Routed) -> Tensor:
    """Inputs x [P, H] and weights [E, rows, H] of the matrix ``name`` -> what ``down_proj`` receives, [P, I]."""
    out = _grouped(x, weight, _bias(module, name), routed)
    return module._apply_gate(out) if module.has_gate else module.act_fn(out)


def apply_down(module: Any, weight: Tensor, h: Tensor, routed: Routed) -> Tensor:
    """Intermediates h [P, I] and down weights [E, H, I] -> each pair's output [P, H], not yet times its weight."""
    out = _grouped(h, weight, _bias(module, "down_proj"), routed)
    return module.post_expert_norm(out) if getattr(module, "has_post_expert_norm", False) else out


def _bias(module: Any, name: str) -> Tensor | None:
    return getattr(module, f"{name}_bias") if module.has_bias else None


def _grouped(x: Tensor, weight: Tensor, bias: Tensor | None, routed: Routed) -> Tensor:
    """One linear per expert over its slice of the sorted pairs: [P, columns] -> [P, rows]."""
    counts = routed.counts
    most = max(counts, default=0)
    if x.device.type == "cuda" and len(counts) * most <= 4 * len(x):
        # one batched product over padded slices: launches, not arithmetic, bound small experts on a GPU
        starts = torch.tensor([0, *itertools.accumulate(counts)][:-1], device=x.device)
        place = torch.arange(len(x), device=x.device) - starts[routed.expert]
        padded = x.new_zeros(len(counts), most, x.shape[1]).index_put((routed.expert, place), x)
        out = torch.bmm(padded, weight.transpose(1, 2))[routed.expert, place]
        return out if bias is None else out + bias[routed.expert]
    parts = [
        F.linear(rows, weight[e], None if bias is None else bias[e])
        for e, rows in enumerate(x.split(counts))
        if len(rows)
    ]
    return torch.cat(parts) if parts else x.new_zeros(0, weight.shape[1])


def experts_forward(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """A whole experts block, [T, H] -> [T, H], as a Transformers experts implementation. Differentiable in weights.

    Sums over a token's experts in a fixed order. Faster here than Transformers' own: on CPU than ``grouped_mm``,
    which loops there, and for float32 on a GPU.
    """
    first = "gate_up_proj" if module.has_gate else "up_proj"
    routed = route(top_k_index, top_k_weights, module.down_proj.shape[0])
    h = apply_first(module, first, oriented(module, first), hidden.index_select(0, routed.token), routed)
    out = apply_down(module, oriented(module, "down_proj"), h, routed) * routed.weight.unsqueeze(1)
    out = torch.zeros_like(hidden).index_add(0, routed.token, out.to(hidden.dtype))
    if getattr(module, "passes_on", False):
        out = out + passed_on(hidden, top_k_index, top_k_weights, module.down_proj.shape[0])
    return out


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
    """For generation in full precision: on a GPU Transformers' ``grouped_mm``, which a CUDA graph can hold."""
    if model.device.type == "cuda":
        model.set_experts_implementation("grouped_mm")
