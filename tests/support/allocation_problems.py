"""Random allocation problems."""

from __future__ import annotations

import dataclasses

import numpy as np

from gemq.allocation.problem import Problem
from gemq.quant.widths import Width


def random_problem(sizes, widths=(1, 2, 3), seed=0, spread=2.0, shapes=None, noise=0.3) -> Problem:
    """A problem with ``sizes`` experts per layer and log-normal costs. ``shapes``: (rows, columns) to draw from."""
    draw = np.random.default_rng(seed)
    layer = np.repeat(np.arange(len(sizes)), sizes)
    n = len(layer)
    drawn = [(shapes or [(64, 256)])[i] for i in draw.integers(0, len(shapes or [0]), n)]
    widths = tuple(map(Width, widths))
    quality = 4.0 ** -np.array([width.bits for width in widths])
    return Problem(
        widths=widths,
        layer=layer,
        costs=np.exp(draw.normal(0, spread, (n, 1)) + draw.normal(0, noise, (n, len(widths)))) * quality,
        weights=np.array([r * c for r, c in drawn]),
        bytes=np.array([[w.matrix_bytes(r, c, 128) for w in widths] for r, c in drawn]),
        counts=draw.integers(1, 1000, n),
        layers=len(sizes),
    )


def matrix_problem(sizes, seed=0) -> Problem:
    """A row for each matrix of every expert: gate and up with twice the weights of down."""
    rows = random_problem([2 * n for n in sizes], seed=seed)
    weights = np.tile([32_768, 16_384], sum(sizes))
    sizes_of = rows.bytes * 2 // np.tile([[1], [2]], (sum(sizes), 1))
    return dataclasses.replace(rows, weights=weights, bytes=sizes_of, units_per_expert=2)
