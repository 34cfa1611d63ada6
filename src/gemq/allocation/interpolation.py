"""Costs of widths between the candidate widths, for codes that exist at any multiple of an eighth of a bit.

The error of a matrix falls by nearly the same factor with every added bit, so the logarithm of its cost is interpolated
linearly between the candidates. Bytes are linear in bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gemq.allocation.problem import Problem
from gemq.quant.widths import AnyWidth

LEAST_COST = 1e-12
"""Costs below this share of the largest count as this share: the logarithm of zero does not exist."""

MAX_FALL = 16.0
"""Largest factor by which a cost falls with a bit. Most fall by four. Measured costs of zero would make widths next to
them seem nearly free.
"""


def interpolate(problem: Problem, widths: Sequence[AnyWidth]) -> Problem:
    """Return a problem with other candidate widths, all of them between the first and the last of ``problem``."""
    measured_bits = np.array([width.bits for width in problem.widths])
    bits = np.array([width.bits for width in widths])
    upper = np.clip(np.searchsorted(measured_bits, bits), 1, len(measured_bits) - 1)
    lower = upper - 1
    share = (bits - measured_bits[lower]) / (measured_bits[upper] - measured_bits[lower])
    costs = problem.costs
    if costs.any():
        logarithms = np.log(np.maximum(costs, LEAST_COST * costs.max()))
        for index in range(1, len(measured_bits)):
            fall = np.log(MAX_FALL) * (measured_bits[index] - measured_bits[index - 1])
            logarithms[:, index] = np.maximum(logarithms[:, index], logarithms[:, index - 1] - fall)
        costs = np.exp(logarithms[:, lower] * (1 - share) + logarithms[:, upper] * share)
    else:
        costs = np.zeros((len(costs), len(widths)))
    sizes = problem.bytes[:, lower] * (1 - share) + problem.bytes[:, upper] * share
    return dataclasses.replace(problem, widths=tuple(widths), costs=costs, bytes=np.rint(sizes).astype(np.int64))
