"""The parts of a decoder layer that fused kernels compute, and what they pass on within a step."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gemq.kernels.decode.attention import NewToken
from gemq.kernels.decode.linear_fusion import MAX_LINEARS
from gemq.kernels.decode.packed_arguments import FusedLinears
from gemq.kernels.modules import PackedExperts, PackedLinear
from gemq.models.cache_names import cache_name
from gemq.models.fused_norms import NormKind
from gemq.models.structure import is_norm
from gemq.runtime.compat import torch_private

MAX_DIFFERENCE = {torch.float32: 2e-3, torch.float16: 0.03, torch.bfloat16: 0.06}
"""Largest relative difference of what a layer adds to its input. Another rounding in an early operation moves all
later ones, and experts' codes are multiplied in fixed point."""


@dataclass
class Rotation:
    """Query and key that the attention kernel is to rotate, and the value for the cache.

    Attributes:
        query: [B, H, 1, D], or None if any query will do
        key: [B, N, 1, D]
        cos: [1 or B, 1, D], or None without rotation
        sin: [1 or B, 1, D], or None without rotation
        value: [B, N, 1, D], set when the cache is updated
    """

    query: Tensor | None
    key: Tensor
    cos: Tensor | None
    sin: Tensor | None
    value: Tensor | None = None

    def new_token(self) -> NewToken:
        """Return what the attention kernel takes."""
        assert self.value is not None
        cos, sin = (None if angle is None else angle[:, 0] for angle in (self.cos, self.sin))
        return NewToken(self.key[:, :, 0], self.value[:, :, 0], cos, sin)


class Shares(NamedTuple):
    """The output of experts whose sum is computed later.

    Attributes:
        placeholder: [T, H] in place of the sum
        version: of the placeholder, which changes if it is written
        terms: [T, S, H] float32
    """

    placeholder: Tensor
    version: int
    terms: Tensor

    def are_all_of(self, output: Tensor) -> bool:
        """Whether an output of the layer's MLP is the placeholder in any shape, unchanged."""
        is_same = output.data_ptr() == self.placeholder.data_ptr() and output.numel() == self.placeholder.numel()
        return is_same and output.is_contiguous() and torch_private.write_count(output) == self.version


@dataclass
class LayerParts:
    """A decoder layer with its parts.

    Attributes:
        module: the layer
        norms: modules before attention and before the MLP, with their kinds
        attention: the module that takes the cache
        mlp: the other module
        next_norm: the norm that follows the layer
        is_fused: whether the layer runs as ``_layer_forward``
        writes_in_attention: whether its attention kernel rotates and writes the cache
        leaves_sum: whether the sum over experts is left to the kernel that adds it to the layer's input
        linears: for each linear that comes first among those of one input, all of them
        linear_norms: norms of the outputs of linears, by linear
    """

    module: nn.Module
    norms: tuple[tuple[Any, NormKind], tuple[Any, NormKind]]
    attention: nn.Module
    mlp: nn.Module
    next_norm: tuple[Any, NormKind] | None = None
    is_fused: bool = False
    writes_in_attention: bool = False
    leaves_sum: bool = False
    linears: dict[PackedLinear, list[PackedLinear]] = field(default_factory=dict)
    linear_norms: dict[PackedLinear, Any] = field(default_factory=dict)

    @property
    def experts(self) -> list[PackedExperts]:
        """Packed experts of the layer: one module, or none."""
        return [module for module in self.mlp.modules() if isinstance(module, PackedExperts)]


def find_parts(layer: nn.Module, norms: Mapping[nn.Module, NormKind]) -> LayerParts | None:
    """Returns the parts of a layer, or None if it has others than two norms, attention and MLP.

    Args:
        layer: a decoder layer
        norms: modules that kernels compute
    """
    children = list(layer.children())
    fused_norms = [(child, norms[child]) for child in children if child in norms]
    others = [child for child in children if not is_norm(child) and _has_tensors(child)]
    attentions = [child for child in others if cache_name(inspect.signature(child.forward).parameters) is not None]
    if len(fused_norms) != 2 or len(others) != 2 or len(attentions) != 1:
        return None
    mlp = next(child for child in others if child is not attentions[0])
    return LayerParts(layer, (fused_norms[0], fused_norms[1]), attentions[0], mlp)


def _has_tensors(module: nn.Module) -> bool:
    """Whether a module has parameters or buffers."""
    return next(itertools.chain(module.parameters(), module.buffers()), None) is not None


def embeds_positions(module: nn.Module) -> bool:
    """Whether a module computes rotary angles from positions."""
    return "position_ids" in inspect.signature(type(module).forward).parameters


def angle_table(
    forward: Callable[..., Any], module: nn.Module, x: Tensor, count: int, args: Sequence[Any], kwargs: Any
) -> Tensor | None:
    """Returns cosines and sines of the first positions, or None if a module returns something else.

    Args:
        forward: of the module's class
        module: computes rotary angles
        x: hidden states, whose dtype the angles have
        count: number of positions
        args: of the call after x
        kwargs: of the call

    Returns:
        [count, 2, D]
    """
    positions = torch.arange(count, device=x.device)[None]
    if "position_ids" in kwargs:
        angles = forward(module, x, *args, **{**kwargs, "position_ids": positions})
    else:
        angles = forward(module, x, positions, *args[1:], **kwargs)
    if not isinstance(angles, tuple) or len(angles) != 2 or angles[0].dim() != 3:
        return None
    return torch.stack([angle[0] for angle in angles], 1)


class LayerCalls(NamedTuple):
    """What modules of a layer were called with.

    Attributes:
        linears: packed linears, with input and output
        norms: norms inside attention, with their input
        routing: index and weights of experts
    """

    linears: list[tuple[PackedLinear, Tensor, Tensor]]
    norms: list[tuple[nn.Module, Tensor]]
    routing: list[tuple[Tensor, ...]]


@contextmanager
def recorded_calls(layer: LayerParts, norms: Mapping[nn.Module, NormKind]) -> Iterator[LayerCalls]:
    """Records calls of a layer's modules. ``norms``: those that kernels compute."""
    calls = LayerCalls([], [], [])
    handles = []
    for module in layer.module.modules():
        if isinstance(module, PackedLinear):
            record = lambda linear, inputs, output: calls.linears.append((linear, inputs[0], output))
            handles.append(module.register_forward_hook(record))
        elif isinstance(module, PackedExperts):
            handles.append(module.register_forward_pre_hook(lambda _, inputs: calls.routing.append(inputs[1:])))
        elif module in norms:
            record_norm = lambda norm, inputs: calls.norms.append((norm, inputs[0]))
            handles.append(module.register_forward_pre_hook(record_norm))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replayed_routing(layer: LayerParts, calls: LayerCalls) -> Iterator[None]:
    """Passes the recorded routing to the experts: the choice between equal logits may differ."""
    routing = list(calls.routing)
    handles = []
    for module in layer.module.modules():
        if isinstance(module, PackedExperts):
            replay = lambda _, inputs: (inputs[0], *routing.pop(0)) if routing else None
            handles.append(module.register_forward_pre_hook(replay))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def norms_of_linears(calls: LayerCalls) -> dict[PackedLinear, Any]:
    """Returns norms whose input is the whole output of a linear, in any shape, by linear."""
    norms = {}
    for norm, x in calls.norms:
        for linear, _, output in calls.linears:
            if x.data_ptr() == output.data_ptr() and x.numel() == output.numel():
                norms[linear] = norm
    return norms


def linear_groups(calls: LayerCalls) -> dict[PackedLinear, list[PackedLinear]]:
    """Returns linears of one input that can share a launch, by the one that is called first."""
    by_input: dict[Any, list[PackedLinear]] = {}
    for linear, x, _ in calls.linears:
        key = (id(x), linear.levels, linear.group_size, linear.bias is None)
        by_input.setdefault(key, []).append(linear)
    groups = {}
    for linears in by_input.values():
        for start in range(0, len(linears), MAX_LINEARS):
            group = linears[start : start + MAX_LINEARS]
            if len(set(group)) == len(group) > 1:
                groups[group[0]] = group
    return groups


def fused_linears(group: Sequence[PackedLinear]) -> FusedLinears:
    """Returns the arguments of a launch."""
    first = group[0]
    biases = [linear.bias for linear in group if linear.bias is not None]
    tensors = zip(*((linear.codes, linear.scales, linear.offsets) for linear in group), strict=True)
    codes, scales, offsets = (list(field_tensors) for field_tensors in tensors)
    return FusedLinears(codes, scales, offsets, biases, first.levels, first.group_size)


def is_close(result: Tensor, expected: Tensor, hidden: Tensor) -> bool:
    """Whether a layer adds the same to its input."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return False
    change = (expected.float() - hidden.float()).norm()
    return bool((result.float() - expected.float()).norm() <= MAX_DIFFERENCE[result.dtype] * change)
