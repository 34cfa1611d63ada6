"""What a configuration says of a model's layers, positions and tokens, whichever way a family writes it down."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def layer_configs(config: Any) -> list[Any]:
    """One configuration for each layer.

    Some families give single layers values of their own, such as Gemma 4's head_dim. The model's configuration then
    refuses to be asked for these (``AmbiguousGlobalPerLayerAttributeError``).
    """
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * (getattr(config, "num_hidden_layers", None) or 1)


def rotary_limit(config: Any) -> int | None:
    """Tokens of a sequence up to which rotary factors are the same at every length. None: at any length.

    Beyond it, ``longrope`` takes its other set of factors for all positions, and ``dynamic`` computes new ones at every
    length. Transformers' other types depend on positions alone.
    """
    limits = [limit for parameters in _rotary_parameters(config) if (limit := _limit(config, parameters)) is not None]
    return min(limits, default=None)


def _limit(config: Any, parameters: dict[str, Any]) -> int | None:
    kind = str(parameters.get("rope_type", parameters.get("type", "default")))
    if kind == "longrope":
        name = "original_max_position_embeddings"
        limit = parameters.get(name) or getattr(config, name, None) or config.max_position_embeddings
    elif "dynamic" in kind:
        limit = config.max_position_embeddings
    else:
        return None
    return int(limit)


def _rotary_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """The sets of rotary parameters: one, or one for each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):  # the second is the older name, still in code of other people
        values = getattr(config, name, None)
        if isinstance(values, dict):
            parts = [value for value in values.values() if isinstance(value, dict)]
            yield from parts or [values]


def embedding_rows(model: Any) -> int | None:
    """Tokens that the model has embeddings for: numbers from this one up end in an error. None: not known.

    The model may be on the meta device.
    """
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):
        weight = None
    if weight is not None and weight.dim() == 2:
        return int(weight.shape[0])
    return getattr(model.config.get_text_config(), "vocab_size", None)
