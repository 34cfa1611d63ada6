"""Names of the key-value cache in model code: ``cache`` from Transformers 5.24 on, ``past_key_values`` before."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

CACHE_NAMES = ("cache", "past_key_values")


def cache_name(names: Iterable[str]) -> str | None:
    """The name of the cache among the names of arguments; None if it is not there."""
    names = set(names)
    return next((name for name in CACHE_NAMES if name in names), None)


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """``cache`` as a keyword argument of ``model``, by the name that its forward declares.

    A forward that declares neither name gets the older one, which all supported versions accept.
    """
    return {cache_name(inspect.signature(model.forward).parameters) or CACHE_NAMES[-1]: cache}


def output_cache(output: Any) -> Any:
    """The cache in a model's output; None if the model made none."""
    return output.cache if hasattr(output, "cache") else output.past_key_values
