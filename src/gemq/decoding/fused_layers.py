"""Fused kernels in place of the small operations between the packed matrices of a decode step, without a compiler.

The family's code still runs. Modules in it are replaced while ``FusedLayers.active`` is: norms and routers by one or
two kernels, projections of one input by one launch. Rotary positions and the write into the cache are left to the
attention kernel. A decoder layer that adds the outputs of attention and MLP to its input, each after a norm, becomes
``_layer_forward``, where a sum and the norm after it are one kernel.

None of this is known from names: ``verify`` runs a step in which each layer computes twice, as the family does and
fused. Where results differ, the layer stays as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gemq.decoding.layer_parts import (
    LayerParts,
    Rotation,
    Shares,
    angle_table,
    embeds_positions,
    find_parts,
    fused_linears,
    is_close,
    linear_groups,
    norms_of_linears,
    recorded_calls,
    replayed_routing,
)
from gemq.decoding.static_cache import PromptCache, StepCache
from gemq.decoding.step_attention import attend as attend_in_cache
from gemq.kernels import dispatch
from gemq.kernels.decode import cache_write
from gemq.kernels.decode.attention import attend_and_write, can_write
from gemq.kernels.decode.launch import launch_linears
from gemq.kernels.decode.norms import SliceNorm, add, rms_norm, two_norms
from gemq.kernels.decode.norms import usable as norm_usable
from gemq.kernels.decode.router import usable as route_usable
from gemq.kernels.dispatch import MAX_DECODE_TOKENS
from gemq.kernels.modules import PackedLinear
from gemq.models.fused_norms import NormKind, RotaryFunction, fused_rotary, norm_kind, replaced_rotary, rotary_function
from gemq.models.fused_routers import RouterKind, fused_route, router_kind
from gemq.models.module_forwards import replaced_forwards
from gemq.models.structure import is_norm
from gemq.runtime.compat import torch_private


class FusedLayers:
    """Fused kernels for a decode step of one model.

    Args:
        layers: decoder layers, in order
        outer_modules: modules outside the layers, among them the last norm
        device: of the model
        position: of the step, int64 [1]
        num_positions: upper bound of positions

    Attributes:
        count: layers that are fused
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        outer_modules: Sequence[nn.Module],
        device: torch.device,
        position: Tensor,
        num_positions: int,
    ) -> None:
        self._norms: dict[nn.Module, NormKind] = {}
        self._routers: dict[nn.Module, RouterKind] = {}
        kinds: dict[Any, Any] = {}
        for module in (module for root in (*layers, *outer_modules) for module in root.modules()):
            if "forward" in vars(module):  # another program has changed it
                continue
            if is_norm(module):
                kind = norm_kind(module, device, kinds)
                if kind is not None:
                    self._norms[module] = kind
            elif (route := router_kind(module, device, kinds)) is not None:
                self._routers[module] = route
        self._layers: dict[nn.Module, LayerParts] = {}
        for layer in layers:
            layer_parts = find_parts(layer, self._norms)
            if layer_parts is not None:
                self._layers[layer] = layer_parts
        last_norms = [module for module in outer_modules if module in self._norms]
        for layer, next_module in zip(layers, [*layers[1:], *last_norms[:1]], strict=False):
            self._connect(layer, next_module)
        self._embeddings = [module for module in outer_modules if embeds_positions(module)]
        self._position, self._num_positions = position, num_positions
        self._angles: dict[Any, Tensor | None] = {}  # cosines and sines of all positions, [positions, 2, D]
        self._current: LayerParts | None = None
        self._rotary_functions: dict[RotaryFunction, RotaryFunction | None] = {}
        self._is_verifying = self._is_prompt = False
        self._uses_family_code = False
        self._normed: tuple[Tensor, Tensor] | None = None  # a layer's output, and its norm
        self._rotation: Rotation | None = None
        self._projected: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # input and output of linears that others computed
        self._shares: Shares | None = None
        self._prenormed: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # input and output of norms after such linears

    @property
    def count(self) -> int:
        """Number of fused layers."""
        return sum(layer.is_fused for layer in self._layers.values())

    def _connect(self, layer: nn.Module, following: nn.Module) -> None:
        """Remember the norm after a layer: the first one of the next layer, or that after all layers."""
        if layer not in self._layers:
            return
        if following in self._layers:
            self._layers[layer].next_norm = self._layers[following].norms[0]
        elif following in self._norms:
            self._layers[layer].next_norm = (following, self._norms[following])

    def _drop_step_state(self) -> None:
        """Drops what a step left over that was interrupted."""
        self._normed = self._rotation = self._shares = None
        self._projected.clear()
        self._prenormed.clear()

    # Contexts

    @contextmanager
    def active(self, is_prompt: bool = False) -> Iterator[None]:
        """Runs modules fused while the context is active.

        Args:
            is_prompt: whether the model runs on prompts, whose keys and values the family's code writes
        """
        self._drop_step_state()
        self._is_prompt = is_prompt
        replaced: dict[nn.Module, Callable[..., Any]] = {}
        for norm, kind in self._norms.items():
            replaced[norm] = partial(self._norm_forward, norm, kind)
        for router, route in self._routers.items():
            replaced[router] = partial(self._router_forward, router, route)
        for embedding in self._embeddings:
            replaced[embedding] = partial(self._embedding_forward, embedding)
        for layer in self._layers.values():
            replaced[layer.module] = partial(self._layer_or_family, layer)
            replaced[layer.attention] = partial(self._attention_forward, layer)
            for experts in layer.experts:
                replaced[experts] = partial(self._experts_forward, layer, experts)
            for group in layer.linears.values():
                for linear in group:
                    replaced[linear] = partial(self._linear_forward, layer, linear)
        with replaced_forwards(replaced):
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

    def prompt_cache(self, layers: list[Any]) -> PromptCache:
        """Returns the cache of prompts, whose layers write in one launch. ``layers``: of the static cache."""
        return _FusedPromptCache(layers=layers)

    def leaves_write(self, key: Tensor, value: Tensor) -> bool:
        """Whether the attention kernel will write a key and value into the cache. Called when the cache is updated."""
        if self._current is None or not self._current.writes_in_attention or self._uses_family_code or self._is_prompt:
            return False
        if self._rotation is None:
            self._rotation = Rotation(None, key, None, None)
        elif self._rotation.key is not key:
            raise RuntimeError("its attention changes rotated keys")
        self._rotation.value = value
        return True

    # Modules

    def _norm_forward(self, norm: Any, kind: NormKind, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A norm, which the layer before may have computed already."""
        normed, self._normed = self._normed, None
        prenormed = self._prenormed.pop(norm, None)
        if prenormed is not None and prenormed[0].data_ptr() == x.data_ptr() and prenormed[0].numel() == x.numel():
            return prenormed[1].view(x.shape)
        if not self._uses_family_code and not args and not kwargs:
            if normed is not None and normed[0] is x:
                return normed[1]
            weight = kind.of(norm)
            if norm_usable(x, weight):
                return rms_norm(x, weight)
        return type(norm).forward(norm, x, *args, **kwargs)

    def _router_forward(self, router: Any, kind: RouterKind, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A router in two kernels."""
        if self._uses_family_code or args or kwargs or not route_usable(x, router.weight):
            return type(router).forward(router, x, *args, **kwargs)
        return fused_route(router, kind, x)

    def _embedding_forward(self, embedding: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Rotary angles of the step or of prompts, from a table that the family's code has computed."""
        family_forward = type(embedding).forward
        positions = kwargs.get("position_ids", args[0] if args else None)
        if not isinstance(positions, Tensor) or positions.shape[-1] > self._num_positions:
            return family_forward(embedding, x, *args, **kwargs)
        options = (*args[1:], *(value for name, value in kwargs.items() if name != "position_ids"))
        key = (embedding, x.dtype, options)
        if key not in self._angles:
            self._angles[key] = angle_table(family_forward, embedding, x, self._num_positions, args, kwargs)
        table = self._angles[key]
        if table is None:
            return family_forward(embedding, x, *args, **kwargs)
        table = table[: positions.shape[-1]] if self._is_prompt else table.index_select(0, self._position)
        cos, sin = table.unbind(1)
        return cos[None], sin[None]

    def _attention_forward(self, layer: LayerParts, *args: Any, **kwargs: Any) -> Any:
        """Attention, in which the family's rotary function is a kernel, or left to the attention kernel."""
        module: Any = layer.attention
        original = None if self._uses_family_code else rotary_function(module)
        replacement: RotaryFunction | None = None
        if original is not None and self._is_prompt:
            replacement = fused_rotary(original, self._rotary_functions)
        elif original is not None and layer.writes_in_attention:
            replacement = self._leave_rotation
        if replacement is None:
            return type(module).forward(module, *args, **kwargs)
        self._rotation = None
        with replaced_rotary(type(module), replacement):
            return type(module).forward(module, *args, **kwargs)

    def _leave_rotation(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        """In place of the family's rotary function: returns query and key as they are."""
        if args or kwargs or cos.dim() != 3:
            raise RuntimeError("its rotary positions have options")
        self._rotation = Rotation(query, key, cos, sin)
        return query, key

    def _linear_forward(self, layer: LayerParts, linear: Any, x: Tensor) -> Tensor:
        """A linear that is computed together with others of the same input."""
        result = self._projected.pop(linear, None)
        if result is not None and result[0] is x:
            return result[1]
        group = layer.linears.get(linear)
        if self._uses_family_code or group is None or x.numel() // x.shape[-1] > MAX_DECODE_TOKENS:
            return type(linear).forward(linear, x)
        joint = launch_linears(x.reshape(-1, x.shape[-1]).contiguous(), fused_linears(group))
        outputs = joint.split([member.out_features for member in group], 1)
        for member, output in zip(group, outputs, strict=True):
            self._projected[member] = (x, output.view(*x.shape[:-1], member.out_features))
        self._normalize_slices(layer, group, joint)
        return self._projected.pop(linear)[1]

    def _normalize_slices(self, layer: LayerParts, group: Sequence[PackedLinear], joint: Tensor) -> None:
        """Computes the norms of two linears' outputs in one launch, where there are two of one kind."""
        slices: list[tuple[Any, SliceNorm]] = []
        start = 0
        for linear in group:
            norm = layer.linear_norms.get(linear)
            if norm is not None:
                weight = self._norms[norm].of(norm)
                if linear.out_features % len(weight.weight) == 0 and weight.weight.dtype == joint.dtype:
                    slices.append((norm, SliceNorm(start, linear.out_features, weight)))
            start += linear.out_features
        if len(slices) != 2 or slices[0][1].norm.rounds_twice != slices[1][1].norm.rounds_twice:
            return
        results = two_norms(joint, slices[0][1], slices[1][1])
        for (norm, span), result in zip(slices, results, strict=True):
            self._prenormed[norm] = (joint[:, span.start : span.start + span.columns], result)

    def _experts_forward(self, layer: LayerParts, experts: Any, hidden: Tensor, *routing: Any) -> Tensor:
        """Experts whose sum is computed later. Until then the result has no values."""
        if not self._uses_family_code and layer.leaves_sum and len(routing) == 2:
            shares = dispatch.expert_shares(experts, hidden, *routing)
            if shares is not None:
                placeholder = torch.empty_like(hidden)
                if self._is_verifying:  # a use of these values must not go unnoticed
                    placeholder.fill_(torch.nan)
                self._shares = Shares(placeholder, torch_private.write_count(placeholder), shares)
                return placeholder
        return type(experts).forward(experts, hidden, *routing)

    def _layer_or_family(self, layer: LayerParts, *args: Any, **kwargs: Any) -> Any:
        """A decoder layer, fused if it may be."""
        self._current = layer
        try:
            if self._is_verifying:
                return self._compare(layer, *args, **kwargs)
            if layer.is_fused and len(args) == 1:
                return self._layer_forward(layer, *args, **kwargs)
            return type(layer.module).forward(layer.module, *args, **kwargs)
        finally:
            self._current = None  # layers of other forms write the cache themselves

    def _layer_forward(self, layer: LayerParts, hidden: Tensor, **kwargs: Any) -> Tensor:
        """A decoder layer: attention and MLP, each after a norm and added to its input."""
        (first, _), (second, second_kind) = layer.norms
        attended = layer.attention(first(hidden), **kwargs)
        attended = attended[0] if isinstance(attended, tuple) else attended
        second_weight = second_kind.of(second)
        next_norm = None if layer.next_norm is None else layer.next_norm[1].of(layer.next_norm[0])
        if not norm_usable(hidden, second_weight) or (next_norm is not None and not norm_usable(hidden, next_norm)):
            raise RuntimeError("its norms have another dtype, or are too large")
        hidden, normed = add(attended, hidden, second_weight)
        output = layer.mlp(normed)
        output = output[0] if isinstance(output, tuple) else output
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

    def _compare(self, layer: LayerParts, *args: Any, **kwargs: Any) -> Any:
        """Runs a layer as the family does, and then fused. Accepts the most that gives the same result."""
        self._uses_family_code = True
        try:
            with recorded_calls(layer, self._norms) as calls:
                expected = type(layer.module).forward(layer.module, *args, **kwargs)
        finally:
            self._uses_family_code = False
        if not isinstance(expected, Tensor) or len(args) != 1:
            return expected
        layer.linears, layer.linear_norms = linear_groups(calls), norms_of_linears(calls)
        replaced: dict[nn.Module, Callable[..., Any]] = {}
        for group in layer.linears.values():
            for linear in group:
                replaced[linear] = partial(self._linear_forward, layer, linear)
        for layer.writes_in_attention, layer.leaves_sum in itertools.product((True, False), repeat=2):
            try:
                with replaced_forwards(replaced), replayed_routing(layer, calls):
                    result = self._layer_forward(layer, *args, **kwargs)
                layer.is_fused = is_close(result, expected, args[0])
            except torch.OutOfMemoryError:
                raise
            except Exception:  # noqa: BLE001 - family code in a form that it does not expect
                layer.is_fused = False
            self._drop_step_state()
            if layer.is_fused:
                return expected
        layer.linears, layer.linear_norms = {}, {}
        return expected


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


class _FusedPromptCache(PromptCache):
    """A cache of prompts that writes keys and values in one launch."""

    def _write(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> None:
        """Writes at the first positions."""
        if cache_write.usable(key, value, keys, values):
            cache_write.write_prompts(key, value, keys, values)
        else:
            super()._write(key, value, keys, values)
