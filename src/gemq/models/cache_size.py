"""Bytes of the cache that a model keeps of a text, from its own code: keys, values, latents and recurrent states.

The model runs on the meta device on a few lengths, and the tensors of its cache are counted. So grouped heads, latent
attention, sliding windows and linear attention are counted as the installed Transformers stores them. Where that is not
possible, or only a configuration is at hand, the cache is estimated from the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemq.models.cache_names import cache_argument
from gemq.models.config_values import layer_configs
from gemq.models.module_forwards import replaced_forwards
from gemq.models.structure import Structure
from gemq.runtime.integers import ceil_div

SHORT_TOKENS, LONG_TOKENS = 32, 512
"""Tokens between two measured texts: of short ones, shorter than sliding windows, and of longer ones beyond them, where
some families store a compressed token for a hundred or more.
"""

MAX_WINDOW = 1 << 17
"""Longer windows count as unlimited."""


@dataclass(frozen=True)
class CacheSize:
    """Bytes of the cache of one sequence, as a function of its tokens.

    A sliding window makes the cache grow more slowly beyond the window. So the bytes of a layer are the smaller of two
    lines.

    Attributes:
        lines: for each layer two lines, of short and of long texts: fixed bytes and bytes a token.
        windowed_layers: layers that keep only a window of tokens.
        estimated_layers: layers whose cache could not be measured. They count as full attention.
    """

    lines: tuple[tuple[tuple[float, float], tuple[float, float]], ...]
    windowed_layers: int = 0
    estimated_layers: int = 0

    def sequence_bytes(self, tokens: int) -> int:
        """Bytes of the cache of one sequence with ``tokens`` tokens."""
        total = 0.0
        for line_pair in self.lines:
            total += min(fixed + slope * tokens for fixed, slope in line_pair)
        return round(total)

    def unbounded_bytes(self, tokens: int) -> int:
        """The same where a sliding window saves nothing, as in a static cache."""
        return round(sum(fixed + slope * tokens for (fixed, slope), _ in self.lines))


def cache_size(model: Any, structure: Structure, dtype: torch.dtype, gpus: int = 1) -> CacheSize:
    """Measures the cache of a model on the meta device.

    Args:
        model: the skeleton.
        structure: of the model.
        dtype: of activations.
        gpus: number of GPUs that share the heads. What has fewer heads is held by all of them.

    Returns:
        The cache on one GPU.
    """
    try:
        short = _line(model, structure, dtype, gpus, SHORT_TOKENS, 2 * SHORT_TOKENS)
        windows = [getattr(layer, "sliding_window", None) or 0 for layer in _new_cache(model).layers]
        windows = [window if window < MAX_WINDOW else 0 for window in windows]
        long, longest = short, max(windows, default=0)
        if longest:
            long = _line(model, structure, dtype, gpus, longest + LONG_TOKENS, longest + 2 * LONG_TOKENS)
    except Exception:  # noqa: BLE001 - model code raises all kinds of errors on the meta device
        return estimated_cache(model.config.get_text_config(), dtype, gpus, len(structure.layers))
    if not any(fixed or slope for fixed, slope in short):
        return estimated_cache(model.config.get_text_config(), dtype, gpus, len(structure.layers))
    windowed_layers = sum(window > 0 for window in windows)
    return CacheSize(tuple(zip(short, long, strict=True)), windowed_layers=windowed_layers)


def _line(
    model: Any, structure: Structure, dtype: torch.dtype, gpus: int, tokens: int, more_tokens: int
) -> tuple[tuple[float, float], ...]:
    """Fixed bytes and bytes a token of each layer: the line through texts of ``tokens`` and ``more_tokens``."""
    shorter = _layer_bytes(model, structure, dtype, gpus, tokens)
    longer = _layer_bytes(model, structure, dtype, gpus, more_tokens)
    lines = []
    for low, high in zip(shorter, longer, strict=True):
        slope = (high - low) / (more_tokens - tokens)
        lines.append((low - slope * tokens, slope))
    return tuple(lines)


def _layer_bytes(model: Any, structure: Structure, dtype: torch.dtype, gpus: int, tokens: int) -> list[float]:
    """Bytes of each layer's cache after a text of ``tokens`` tokens, on one of ``gpus`` GPUs."""
    cache = _new_cache(model)
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with torch.no_grad(), _without_experts(model, structure):
        model(input_ids=ids, use_cache=True, **cache_argument(model, cache))
    sizes = []
    for layer in cache.layers:
        size = 0.0
        for tensor in _tensors(list(vars(layer).values())):
            itemsize = dtype.itemsize if tensor.dtype == model.dtype else tensor.element_size()
            size += tensor.numel() * itemsize * _share(tensor, gpus)
        sizes.append(size)
    return sizes


def _new_cache(model: Any) -> Any:
    """An empty cache with the layers that the model's configuration asks for."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _without_experts(model: Any, structure: Structure) -> AbstractContextManager[None]:
    """Replaces the experts, whose code depends on the values of the routing, by functions that only keep the shape."""
    modules = [model.get_submodule(layer.experts.path) for _, layer in structure.moe_layers]
    return replaced_forwards(dict.fromkeys(modules, lambda hidden_states, *_, **__: torch.empty_like(hidden_states)))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _share(tensor: Tensor, gpus: int) -> float:
    """The share of a cache tensor [batch, heads or channels, ...] that one of ``gpus`` GPUs holds."""
    heads = tensor.shape[1] if tensor.dim() > 1 else 1
    return ceil_div(heads, gpus) / heads if heads else 1.0


def estimated_cache(config: Any, dtype: torch.dtype, gpus: int = 1, num_layers: int | None = None) -> CacheSize:
    """The cache of full attention in all layers, from the configuration of the language model alone.

    Does not depend on the model's code, so that batches that are chosen by it are the same with every release.

    Args:
        config: of the language model.
        dtype: of keys and values.
        gpus: number of GPUs that share the heads.
        num_layers: None: as many as the configuration says.
    """
    configs = layer_configs(config)
    lines = []
    for index in range(num_layers or len(configs)):
        line = (0.0, 2.0 * dtype.itemsize * _key_numbers(configs[min(index, len(configs) - 1)], gpus))
        lines.append((line, line))
    return CacheSize(tuple(lines), estimated_layers=len(lines))


def _key_numbers(config: Any, gpus: int) -> int:
    """Numbers in the key of a token in one layer, on one of ``gpus`` GPUs. Its value has as many."""
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    has_latent_cache = isinstance(getattr(config, "kv_lora_rank", None), int)
    if not heads or has_latent_cache:  # sizes of heads say nothing about a latent cache
        return config.hidden_size
    queries = getattr(config, "num_attention_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // queries
    return head_dim * ceil_div(heads, gpus)
