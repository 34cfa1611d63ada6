"""Memory that a checkpoint needs on a GPU in addition to its weights, for the report and the model card."""

from __future__ import annotations

from typing import Any

from gemq.models.structure import find_structure
from gemq.planning.serving_memory import ServingMemory
from gemq.recipe import Recipe

CONTEXTS = (4096, 32768)
"""Lengths of context that are listed, and in addition the longest that the model takes."""


def memory_rows(model: Any, *, codes: str, group_size: int, bits: float) -> list[dict[str, int]]:
    """Return what one sequence needs on a GPU in addition to the weights, for a few lengths of context. An estimate.

    Args:
        model: full-precision model, on the meta device
        codes: kind of the experts' codes, ``affine`` or ``trellis``
        group_size: weights of affine codes that share a scale and an offset
        bits: mean nominal bits per expert weight

    Returns:
        Rows in ascending order of ``context`` (tokens), with ``cache_bytes``, and ``working_bytes`` of CUDA, its
        libraries and temporary tensors.
    """
    serving = ServingMemory(model, find_structure(model), Recipe(codes=codes, group_size=group_size))
    rows = []
    for context in [*(length for length in CONTEXTS if length < serving.longest_context), serving.longest_context]:
        row = {
            "context": context,
            "cache_bytes": serving.cache_bytes(context, 1),
            "working_bytes": serving.working_bytes(bits, context, 1),
        }
        rows.append(row)
    return rows
