"""Names of the key-value cache in model code: ``cache`` from Transformers 5.24 on, ``past_key_values`` before."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

CACHE_NAMES = ("cache", "past_key_values")


def cache_name(names: Iterable[str]) -> str | None:
    """Returns the name of the cache among names of arguments, or None if it is not among them."""
    names = set(names)
    for name in CACHE_NAMES:
        if name in names:
            return name
    return None


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Returns the keyword argument that passes ``cache`` to ``model``.

    A forward that declares neither name receives the older one, which all supported versions accept.
    """
    name = cache_name(inspect.signature(model.forward).parameters) or CACHE_NAMES[-1]
    return {name: cache}


def output_cache(output: Any) -> Any:
    """Returns the cache in a model's output, or None if the model created none."""
    return output.cache if hasattr(output, "cache") else output.past_key_values
