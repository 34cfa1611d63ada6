"""Values of a configuration that families store in different ways: layers, experts, positions and tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

DEFAULT_EXPERTS_PER_TOKEN = 8
"""Where a configuration does not say how many experts a token chooses. Nearly all families choose at most this many."""

EXPERTS_PER_TOKEN_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "experts_per_token",
)
"""What families call the number of experts that a token chooses."""


def layer_configs(config: Any) -> list[Any]:
    """Returns one configuration for each layer.

    Some families have values that differ between layers, such as head_dim in Gemma 4. Reading such a value from the
    model's configuration raises ``AmbiguousGlobalPerLayerAttributeError``.
    """
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * (getattr(config, "num_hidden_layers", None) or 1)


def experts_per_token(text: Any) -> int:
    """Experts that a token chooses at most, from a text model's configuration."""
    counts = []
    for config in layer_configs(text):
        values = [getattr(config, key, None) for key in EXPERTS_PER_TOKEN_KEYS]
        counts.append(next((value for value in values if isinstance(value, int)), DEFAULT_EXPERTS_PER_TOKEN))
    return max(counts, default=DEFAULT_EXPERTS_PER_TOKEN)


def rotary_limit(config: Any) -> int | None:
    """Returns the length up to which rotary factors do not depend on the length of a sequence, or None for any length.

    Beyond it, ``longrope`` uses its second set of factors for all positions, and ``dynamic`` computes new factors for
    every length. The factors of other types depend on positions alone.
    """
    limits = []
    for parameters in _rotary_parameters(config):
        limit = _limit_of_type(config, parameters)
        if limit is not None:
            limits.append(limit)
    return min(limits, default=None)


def _limit_of_type(config: Any, parameters: dict[str, Any]) -> int | None:
    """Returns ``rotary_limit`` for one set of rotary parameters."""
    rope_type = str(parameters.get("rope_type", parameters.get("type", "default")))
    if rope_type == "longrope":
        name = "original_max_position_embeddings"
        limit = parameters.get(name) or getattr(config, name, None) or config.max_position_embeddings
        return int(limit)
    if "dynamic" in rope_type:
        return int(config.max_position_embeddings)
    return None


def _rotary_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """Yields the sets of rotary parameters: one, or one for each layer type."""
    for name in ("rope_parameters", "rope_scaling"):  # rope_scaling is the older name, still used in remote code
        values = getattr(config, name, None)
        if isinstance(values, dict):
            by_layer_type = [value for value in values.values() if isinstance(value, dict)]
            yield from by_layer_type or [values]


def embedding_rows(model: Any) -> int | None:
    """Returns the number of tokens that the model has embeddings for, or None if it is not known.

    Larger token ids raise an error. The model may be on the meta device.
    """
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):
        weight = None
    if weight is not None and weight.dim() == 2:
        return int(weight.shape[0])
    return getattr(model.config.get_text_config(), "vocab_size", None)
