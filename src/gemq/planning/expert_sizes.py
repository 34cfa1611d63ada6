"""Bytes of all experts at a budget in bits, and the budget that a number of bytes buys, from shapes alone."""

from __future__ import annotations

import numpy as np

from gemq.models.byte_sizes import expert_bytes
from gemq.models.structure import Structure
from gemq.recipe import Recipe


def experts_at(structure: Structure, recipe: Recipe, bits: float) -> int:
    """Bytes of all experts at ``bits`` nominal bits, interpolated between the two nearest widths."""
    return round(float(np.interp(bits, *_size_curve(structure, recipe))))


def bits_at(structure: Structure, recipe: Recipe, size: float) -> float:
    """Nominal bits at which all experts take ``size`` bytes: the inverse of ``experts_at``, within the widths."""
    bits, sizes = _size_curve(structure, recipe)
    return float(np.interp(size, sizes, bits))


def _size_curve(structure: Structure, recipe: Recipe) -> tuple[list[float], list[int]]:
    """Nominal bits of each width, and bytes of all experts at it, both ascending."""
    sizes = []
    for width in recipe.candidate_widths:
        layer_sizes = [
            layer.experts.count * expert_bytes(layer.experts, width, recipe.group_size)
            for _, layer in structure.moe_layers
        ]
        sizes.append(sum(layer_sizes))
    return [width.bits for width in recipe.candidate_widths], sizes
