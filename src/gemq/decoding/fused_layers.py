"""Fused kernels in place of the small operations between the packed matrices of a decode step, without a compiler.

The family's code still runs. Modules in it are replaced while ``FusedLayers.active`` is: norms and routers by one or
two kernels, projections of one input by one launch. Rotary positions and the write into the cache are left to the
attention kernel. A decoder layer that adds the outputs of attention and MLP to its input, each after a norm, becomes
``_layer_forward``, where a sum and the norm after it are one kernel.

None of this is known from names: ``verify`` runs a step in which each layer computes twice, as the family does and
fused. Where results differ, the layer stays as it is.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gemq.decoding.static_cache import StepCache
from gemq.decoding.step_attention import attend as attend_in_cache
from gemq.kernels import dispatch
from gemq.kernels.decode.attention import NewToken, attend_and_write, can_write
from gemq.kernels.decode.launch import launch_linears
from gemq.kernels.decode.linear_fusion import MAX_LINEARS
from gemq.kernels.decode.norms import add, rms_norm
from gemq.kernels.decode.norms import usable as norm_usable
from gemq.kernels.decode.packed_arguments import FusedLinears
from gemq.kernels.dispatch import MAX_DECODE_TOKENS
from gemq.kernels.modules import PackedExperts, PackedLinear
from gemq.models.cache_names import cache_name
from gemq.models.fused_norms import NormKind, norm_kind, replaced_rotary, rotary_function
from gemq.models.fused_routers import RouterKind, fused_route, router_kind
from gemq.models.structure import is_norm

MAX_DIFFERENCE = {torch.float32: 2e-3, torch.float16: 0.03, torch.bfloat16: 0.06}
"""Largest relative difference of what a layer adds to its input. Another rounding in an early operation moves all
later ones, and experts' codes are multiplied in fixed point."""


@dataclass
class _Rotation:
    """Query and key that the attention kernel is to rotate, and the value for the cache.

    Attributes:
        query: [B, H, 1, D], or None if any query will do
        key: [B, N, 1, D]
        cos: [1 or B, 1, D], or None without rotation
        sin: [1 or B, 1, D], or None without rotation
        value: [B, N, 1, D], known when the cache is updated
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


class _Shares(NamedTuple):
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
        return is_same and output.is_contiguous() and output._version == self.version


@dataclass
class _Layer:
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

    @property
    def experts(self) -> list[PackedExperts]:
        """Packed experts of the layer: one module, or none."""
        return [module for module in self.mlp.modules() if isinstance(module, PackedExperts)]


class FusedLayers:
    """Fused kernels for a decode step of one model.

    Args:
        layers: decoder layers, in order
        after: modules that may follow the last layer, among them its norm
        device: of the model

    Attributes:
        count: layers that are fused
    """

    def __init__(self, layers: Sequence[nn.Module], after: Sequence[nn.Module], device: torch.device) -> None:
        self._modules = list(layers)
        self._norms: dict[nn.Module, NormKind] = {}
        self._routers: dict[nn.Module, RouterKind] = {}
        kinds: dict[Any, Any] = {}
        for module in [m for root in (*layers, *after) for m in root.modules() if "forward" not in vars(m)]:
            if is_norm(module):
                kind = norm_kind(module, device, kinds)
                if kind is not None:
                    self._norms[module] = kind
            elif (route := router_kind(module, device, kinds)) is not None:
                self._routers[module] = route
        self._layers = {layer: parts for layer in layers if (parts := self._parts(layer)) is not None}
        following = [*layers[1:], *after[:1]]
        for layer, next_module in zip(layers, following, strict=False):
            self._connect(layer, next_module)
        self._current: _Layer | None = None
        self._is_verifying = False
        self._is_off = False  # whether everything runs as in the family's code
        self._normed: tuple[Tensor, Tensor] | None = None  # a layer's output, and its norm
        self._rotation: _Rotation | None = None
        self._projected: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # input and output of linears that others computed
        self._shares: _Shares | None = None
        self._routing: list[tuple[Tensor, ...]] = []  # index and weights of the experts, to run a layer twice

    @property
    def count(self) -> int:
        """Number of fused layers."""
        return sum(layer.is_fused for layer in self._layers.values())

    def _parts(self, layer: nn.Module) -> _Layer | None:
        """Return the parts of a layer, or None if it has others than two norms, attention and MLP."""
        children = list(layer.children())
        norms = [(child, self._norms[child]) for child in children if child in self._norms]
        others = [child for child in children if not is_norm(child) and next(child.parameters(), None) is not None]
        others += [c for c in children if c not in others and not is_norm(c) and next(c.buffers(), None) is not None]
        attentions = [c for c in others if cache_name(inspect.signature(c.forward).parameters) is not None]
        if len(norms) != 2 or len(others) != 2 or len(attentions) != 1:
            return None
        mlp = next(child for child in others if child is not attentions[0])
        return _Layer(layer, (norms[0], norms[1]), attentions[0], mlp)

    def _connect(self, layer: nn.Module, following: nn.Module) -> None:
        """Remember the norm after a layer: the first one of the next layer, or that after all layers."""
        if layer not in self._layers:
            return
        if following in self._layers:
            self._layers[layer].next_norm = self._layers[following].norms[0]
        elif following in self._norms:
            self._layers[layer].next_norm = (following, self._norms[following])

    def _forget(self) -> None:
        """Drops what a step left over that was interrupted."""
        self._normed = self._rotation = self._shares = None
        self._projected.clear()

    # Contexts

    @contextmanager
    def active(self) -> Iterator[None]:
        """Runs modules fused while the context is active."""
        self._forget()
        replaced: dict[nn.Module, Callable[..., Any]] = {}
        for norm, kind in self._norms.items():
            replaced[norm] = partial(self._norm_forward, norm, kind)
        for router, route in self._routers.items():
            replaced[router] = partial(self._router_forward, router, route)
        for layer in self._layers.values():
            replaced[layer.module] = partial(self._layer_or_family, layer)
            replaced[layer.attention] = partial(self._attention_forward, layer)
            for experts in layer.experts:
                replaced[experts] = partial(self._experts_forward, layer, experts)
            for group in layer.linears.values():
                for linear in group:
                    replaced[linear] = partial(self._linear_forward, layer, linear)
        with _forwards(replaced):
            yield

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attention with the signature of ``step_attention.attend``, after ``update``."""
        rotation, self._rotation = self._rotation, None
        if rotation is None or rotation.value is None:
            return attend_in_cache(module, query, key, value, *args, **kwargs)
        new = rotation.new_token()
        if rotation.query is not None and query is not rotation.query:
            raise RuntimeError("its attention changes rotated queries")
        if not can_write(query[:, :, 0], key, value, new):
            raise RuntimeError("its attention has keys of another size or layout")
        write = partial(attend_and_write, new=new)
        return attend_in_cache(module, query, key, value, *args, **{**kwargs, "kernel": write})

    def cache(self, cache: StepCache) -> StepCache:
        """Returns the cache of a step whose layers write in the attention kernel."""
        return _FusedCache(cache, self)

    def leaves_write(self, key: Tensor, value: Tensor) -> bool:
        """Whether the attention kernel will write a key and value into the cache. Called when the cache is updated."""
        if self._current is None or not self._current.writes_in_attention or self._is_off:
            return False
        if self._rotation is None:
            self._rotation = _Rotation(None, key, None, None)
        elif self._rotation.key is not key:
            raise RuntimeError("its attention changes rotated keys")
        self._rotation.value = value
        return True

    # Modules

    def _norm_forward(self, norm: Any, kind: NormKind, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A norm, which the layer before may have computed already."""
        normed, self._normed = self._normed, None
        if not self._is_off and not args and not kwargs:
            if normed is not None and normed[0] is x:
                return normed[1]
            weight = kind.of(norm)
            if norm_usable(x, weight):
                return rms_norm(x, weight)
        return type(norm).forward(norm, x, *args, **kwargs)

    def _router_forward(self, router: Any, kind: RouterKind, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A router in two kernels."""
        if self._is_off or args or kwargs or x.dtype != router.weight.dtype:
            return type(router).forward(router, x, *args, **kwargs)
        return fused_route(router, kind, x)

    def _attention_forward(self, layer: _Layer, *args: Any, **kwargs: Any) -> Any:
        """Attention, in which calls of the family's rotary function are left to the kernel."""
        module: Any = layer.attention
        original = None if self._is_off or not layer.writes_in_attention else rotary_function(module)
        if original is None:
            return type(module).forward(module, *args, **kwargs)
        self._rotation = None
        with replaced_rotary(type(module), self._leave_rotation):
            return type(module).forward(module, *args, **kwargs)

    def _leave_rotation(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        """In place of the family's rotary function: returns query and key as they are."""
        if args or kwargs or cos.dim() != 3:
            raise RuntimeError("its rotary positions have options")
        self._rotation = _Rotation(query, key, cos, sin)
        return query, key

    def _linear_forward(self, layer: _Layer, linear: Any, x: Tensor) -> Tensor:
        """A linear that is computed together with others of the same input."""
        result = self._projected.pop(linear, None)
        if result is not None and result[0] is x:
            return result[1]
        group = layer.linears.get(linear)
        if self._is_off or group is None or x.numel() // x.shape[-1] > MAX_DECODE_TOKENS:
            return type(linear).forward(linear, x)
        joint = launch_linears(x.reshape(-1, x.shape[-1]).contiguous(), _fused_linears(group))
        outputs = joint.split([member.out_features for member in group], 1)
        for member, output in zip(group, outputs, strict=True):
            self._projected[member] = (x, output.view(*x.shape[:-1], member.out_features))
        return self._projected.pop(linear)[1]

    def _experts_forward(self, layer: _Layer, experts: Any, hidden: Tensor, *routing: Any) -> Tensor:
        """Experts whose sum is computed later. Until then the result has no values."""
        if not self._is_off and layer.leaves_sum and len(routing) == 2:
            shares = dispatch.expert_shares(experts, hidden, *routing)
            if shares is not None:
                placeholder = torch.empty_like(hidden)
                if self._is_verifying:  # a use of these values must not go unnoticed
                    placeholder.fill_(torch.nan)
                self._shares = _Shares(placeholder, placeholder._version, shares)
                return placeholder
        return type(experts).forward(experts, hidden, *routing)

    def _layer_or_family(self, layer: _Layer, *args: Any, **kwargs: Any) -> Any:
        """A decoder layer, fused if it may be."""
        self._current = layer
        if self._is_verifying:
            return self._compare(layer, *args, **kwargs)
        if layer.is_fused and not self._is_off and len(args) == 1:
            return self._layer_forward(layer, *args, **kwargs)
        return type(layer.module).forward(layer.module, *args, **kwargs)

    def _layer_forward(self, layer: _Layer, hidden: Tensor, **kwargs: Any) -> Tensor:
        """A decoder layer: attention and MLP, each after a norm and added to its input."""
        (first, _), (second, second_kind) = layer.norms
        attended = layer.attention(first(hidden), **kwargs)
        attended = attended[0] if isinstance(attended, tuple) else attended
        hidden, normed = add(attended, hidden, second_kind.of(second))
        output = layer.mlp(normed)
        output = output[0] if isinstance(output, tuple) else output
        next_norm = None if layer.next_norm is None else layer.next_norm[1].of(layer.next_norm[0])
        shares, self._shares = self._shares, None
        if shares is None:
            hidden, normed = add(output, hidden, next_norm)
        elif shares.are_all_of(output):
            hidden, normed = add(shares.terms, hidden, next_norm, terms=shares.terms.shape[1])
        else:
            raise RuntimeError("its layers use the output of the experts")
        if next_norm is not None:
            self._normed = (hidden, normed)
        return hidden

    # Verification

    def verify(self, step: Callable[[], None]) -> None:
        """Finds out which layers can be fused.

        Args:
            step: runs a step of the model in which ``active`` and ``attend`` are used
        """
        self._is_verifying = True
        try:
            step()
        finally:
            self._is_verifying = False

    def _compare(self, layer: _Layer, *args: Any, **kwargs: Any) -> Any:
        """Runs a layer as the family does, and then fused. Accepts the most that gives the same result."""
        self._is_off = True
        try:
            with self._recorded(layer) as linears:
                expected = type(layer.module).forward(layer.module, *args, **kwargs)
        finally:
            self._is_off = False
        if not isinstance(expected, Tensor) or len(args) != 1:
            return expected
        layer.linears = _groups(linears)
        replaced: dict[nn.Module, Callable[..., Any]] = {}
        for group in layer.linears.values():
            for linear in group:
                replaced[linear] = partial(self._linear_forward, layer, linear)
        for layer.writes_in_attention, layer.leaves_sum in itertools.product((True, False), repeat=2):
            try:
                with _forwards(replaced), self._replayed(layer):
                    result = self._layer_forward(layer, *args, **kwargs)
                layer.is_fused = _is_close(result, expected, args[0])
            except torch.OutOfMemoryError:
                raise
            except Exception:  # noqa: BLE001 - family code in a form that it does not expect
                layer.is_fused = False
            self._forget()
            if layer.is_fused:
                return expected
        layer.linears = {}
        return expected

    @contextmanager
    def _recorded(self, layer: _Layer) -> Iterator[list[tuple[PackedLinear, Tensor]]]:
        """Records the inputs of packed linears, and the routing of the experts."""
        linears: list[tuple[PackedLinear, Tensor]] = []
        routing: list[tuple[Tensor, ...]] = []
        handles = []
        for module in layer.module.modules():
            if isinstance(module, PackedLinear):
                record = lambda linear, inputs: linears.append((linear, inputs[0]))
                handles.append(module.register_forward_pre_hook(record))
            elif isinstance(module, PackedExperts):
                record = lambda _, inputs: routing.append(inputs[1:])
                handles.append(module.register_forward_pre_hook(record))
        try:
            yield linears
        finally:
            for handle in handles:
                handle.remove()
        self._routing = routing

    @contextmanager
    def _replayed(self, layer: _Layer) -> Iterator[None]:
        """Passes the recorded routing to the experts: the choice between equal logits may differ."""
        routing = list(self._routing)
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


class _FusedCache(StepCache):
    """A step's cache in which the attention kernel may write."""

    def __init__(self, cache: StepCache, fused: FusedLayers) -> None:
        super().__init__(cache.layers, cache._position)
        self._fused = fused

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Writes keys and values, unless the attention kernel will."""
        if self._fused.leaves_write(key_states, value_states):
            layer: Any = self.layers[layer_idx]
            return layer.keys, layer.values
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@contextmanager
def _forwards(replaced: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replaces the ``forward`` of modules while the context is active."""
    before = {module: vars(module).get("forward") for module in replaced}
    for module, forward in replaced.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, original in before.items():
            if original is None:
                del module.forward
            else:
                module.forward = original


def _groups(calls: Sequence[tuple[PackedLinear, Tensor]]) -> dict[PackedLinear, list[PackedLinear]]:
    """Returns linears of one input that can share a launch, by the one that is called first."""
    by_input: dict[Any, list[PackedLinear]] = {}
    for linear, x in calls:
        key = (id(x), linear.levels, linear.group_size, linear.bias is None)
        by_input.setdefault(key, []).append(linear)
    groups = {}
    for linears in by_input.values():
        for start in range(0, len(linears), MAX_LINEARS):
            group = linears[start : start + MAX_LINEARS]
            if len(set(group)) == len(group) > 1:
                groups[group[0]] = group
    return groups


def _fused_linears(group: Sequence[PackedLinear]) -> FusedLinears:
    """Returns the arguments of a launch."""
    first = group[0]
    biases = [linear.bias for linear in group if linear.bias is not None]
    tensors = zip(*((linear.codes, linear.scales, linear.offsets) for linear in group), strict=True)
    codes, scales, offsets = (list(parts) for parts in tensors)
    return FusedLinears(codes, scales, offsets, biases, first.levels, first.group_size)


def _is_close(result: Tensor, expected: Tensor, hidden: Tensor) -> bool:
    """Whether a layer adds the same to its input."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return False
    change = (expected.float() - hidden.float()).norm()
    return bool((result.float() - expected.float()).norm() <= MAX_DIFFERENCE[result.dtype] * change)
