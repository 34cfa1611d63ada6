"""Static caches of Transformers: which models support one, and the cache itself.

Relies on interfaces of Transformers that change between releases. Whatever fails here is reported as ``Unsupported``,
and the caller decodes without a static cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from gemq.models.config_values import layer_configs, rotary_limit
from gemq.runtime.compat import transformers_private
from gemq.runtime.fallbacks import first_line

MASKED_ATTENTION = ("eager", "sdpa")
"""Attention implementations that take an additive mask."""

SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}

ALL_LAYERS = "all"
"""Key of the mask in families that have one mask for all layers."""


class Unsupported(Exception):
    """A decode step of fixed shapes cannot serve the model. The message says why."""


@contextmanager
def as_unsupported() -> Iterator[None]:
    """Turns exceptions into ``Unsupported``, except OutOfMemoryError: the model may work without a static cache."""
    try:
        yield
    except (Unsupported, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise Unsupported(first_line(error)) from error


def single_device(model: nn.Module) -> torch.device:
    """Returns the device of the model's tensors. Raises Unsupported if there are several or none."""
    devices = {parameter.device for parameter in model.parameters()}
    devices |= {buffer.device for buffer in model.buffers()}
    if len(devices) != 1 or torch.device("meta") in devices:
        raise Unsupported("it lies on several devices")
    return devices.pop()


def attention_windows(model: Any, config: Any) -> dict[str, int | None]:
    """Returns the sliding window of each layer type: the tokens that a token attends to, or None for all.

    The keys are those of the masks that the model takes: layer types, or only ``ALL_LAYERS``.

    Raises:
        Unsupported: the attention needs more than these masks.
    """
    if not transformers_private.supports_static_cache(model):
        raise Unsupported(f"Transformers does not run {type(model).__name__} with a static cache")
    attention = transformers_private.attention_implementation(config)
    if attention not in MASKED_ATTENTION:
        raise Unsupported(f"its attention ({attention}) takes no additive mask")
    layers = layer_configs(config)
    sliding_windows = [getattr(layer, "sliding_window", None) for layer in layers]
    windows: set[tuple[str, int | None]] = set()
    if hasattr(config, "layer_types"):
        unsupported = set(config.layer_types) - SUPPORTED_LAYER_TYPES
        if unsupported:
            raise Unsupported(f"it has layers of type {', '.join(sorted(unsupported))}")
        for layer_type, window in zip(config.layer_types, sliding_windows, strict=False):
            windows.add((layer_type, window if layer_type == "sliding_attention" else None))
    else:
        if any(getattr(layer, "attention_chunk_size", None) is not None for layer in layers):
            raise Unsupported("it attends in chunks")
        windows.update((ALL_LAYERS, window) for window in sliding_windows)
    window_by_type = dict(sorted(windows, key=lambda item: item[0]))
    if len(window_by_type) != len(windows):
        raise Unsupported("its layers of one type have sliding windows of several lengths")
    return window_by_type


def check_rotary(config: Any, length: int) -> None:
    """Raises Unsupported if rotary factors change within ``length`` tokens: the whole cache is recomputed then."""
    limit = rotary_limit(config)
    if limit is not None and length > limit:
        raise Unsupported(f"its rotary factors change at {limit} tokens, and prompt and answer may have {length}")


def static_cache(config: Any, length: int) -> Any:
    """Returns a cache of ``length`` tokens in each layer. Raises Unsupported if it needs more than keys and values."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    cache = StaticCache(config=config, max_cache_len=length)
    if {type(layer) for layer in cache.layers} - {StaticLayer, StaticSlidingWindowLayer}:
        raise Unsupported("its cache holds more than keys and values")
    # A sliding layer keeps its length in Python, where a CUDA graph cannot follow. A full layer under a sliding mask is
    # equivalent.
    cache.layers = [StaticLayer(max_cache_len=length) for _ in cache.layers]
    return cache


class StepCache(Cache):
    """View of a static cache for one decode step: writes keys and values at the same position in all layers.

    With a single layer, every layer index refers to that layer. Then the index is no constant of compiled code.

    Args:
        layers: of the static cache
        position: where keys and values are written, int64 [1]
    """

    def __init__(self, layers: Sequence[Any], position: Tensor) -> None:
        super().__init__(layers=list(layers))
        self._position = position

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Writes keys and values of the step's token. Returns all keys and values of the layer."""
        layer: Any = self.layers[layer_idx if len(self.layers) > 1 else 0]
        layer.keys.index_copy_(2, self._position, key_states)
        layer.values.index_copy_(2, self._position, value_states)
        return layer.keys, layer.values


class PromptCache(Cache):
    """View of a static cache for prompts: writes keys and values from the first position on.

    ``StaticLayer`` writes at any position, by an index, which takes several times as long. Its length is a tensor for
    which the host would wait, and that cannot be captured. It also returns positions after the prompts, for which
    attention needs a mask.
    """

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns 0: no tokens come before the prompts."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Returns the number of keys that ``update`` returns, and the position of the first one."""
        return query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Writes keys and values of the prompts. Returns them as they lie in the cache."""
        layer: Any = self.layers[layer_idx]
        tokens = key_states.shape[2]
        self._write(key_states, value_states, layer.keys, layer.values)
        return layer.keys[:, :, :tokens], layer.values[:, :, :tokens]

    def _write(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> None:
        """Writes keys and values [B, N, S, D] at the first positions of a layer's [B, N, L, D]."""
        keys[:, :, : key.shape[2]].copy_(key)
        values[:, :, : value.shape[2]].copy_(value)


def last_logits_argument(model: Any, positions: int | Tensor = 1) -> dict[str, Any]:
    """Returns the argument that restricts logits, where the family has one.

    Args:
        model: a causal language model
        positions: number of last positions, or their indices
    """
    return {"logits_to_keep": positions} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def decoder_layers(model: Any, count: int) -> list[nn.Module]:
    """Returns the model's ``count`` decoder layers. Raises RuntimeError if they cannot be found."""
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != count:
        raise RuntimeError(f"{type(model).__name__} has no list of {count} decoder layers")
    return list(layers)


def modules_around_layers(model: Any) -> list[nn.Module]:
    """Returns the modules outside the layers that consist of many small kernels: last norm and rotary embedding."""
    children = model.get_decoder().children()
    return [child for child in children if not isinstance(child, nn.ModuleList | nn.Embedding)]
