"""Simpler allocations within a limit, for comparison: uniform, random, layerwise and by frequency.

Shapes: N rows, W candidate widths. A *choice* is int64 [N], indices into the widths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gemq.allocation.knapsack import Floats, Ints, select, solve
from gemq.quant.widths import Width

if TYPE_CHECKING:
    from gemq.allocation.problem import Problem


def _bracketing_widths(problem: Problem, amounts: Ints, limit: int) -> tuple[int, int]:
    """Indices of the widest width that all rows can have and of the next one. Twice the same if nothing is left."""
    totals = amounts.sum(axis=0)
    candidates = list(range(len(totals)))
    not_ternary = [index for index in candidates if problem.widths[index] is not Width.TERNARY]
    if limit not in totals and not_ternary and totals[not_ternary[0]] <= limit < totals[not_ternary[-1]]:
        candidates = not_ternary
    low = max(index for index in candidates if totals[index] <= limit)
    if totals[low] == limit:
        return low, low
    return low, min((index for index in candidates if index > low), default=low)


def uniform_choice(problem: Problem, amounts: Ints, limit: int, seed: int) -> Ints:
    """The lower of two widths for all rows, and the higher one for the same fraction of every layer.

    Args:
        problem: its rows.
        amounts: int64 [N, W], see ``allocation.problem.linear_constraint``.
        limit: for the sum of the chosen amounts.
        seed: of the draw in each layer.
    """
    low, high = _bracketing_widths(problem, amounts, limit)
    choice = np.full(len(amounts), low, np.int64)
    steps = amounts[:, high] - amounts[:, low]
    unspent = limit - int(amounts[:, low].sum())
    total_step = max(int(steps.sum()), 1)
    generator = np.random.default_rng(seed)
    for rows in problem.by_layer:
        drawn = rows.start + generator.permutation(rows.stop - rows.start)
        layer_share = unspent * int(steps[rows].sum()) // total_step
        choice[drawn[np.cumsum(steps[drawn]) <= layer_share]] = high
    return choice


def random_choice(problem: Problem, amounts: Ints, limit: int, seed: int) -> Ints:
    """Two or three widths, drawn by ``seed`` over all rows. Arguments as in ``uniform_choice``."""
    low, high = _bracketing_widths(problem, amounts, limit)
    order = np.random.default_rng(seed).permutation(len(amounts))
    choice = np.full(len(amounts), low, np.int64)
    candidates = [low, high]
    if low == high:
        index_by_bits = {width.bits: index for index, width in enumerate(problem.widths)}
        bits = problem.widths[low].bits
        if not {bits - 1, bits + 1} <= index_by_bits.keys():
            return choice
        candidates = [index_by_bits[bits - 1], low, index_by_bits[bits + 1]]
        third = len(order) // 3
        choice[order[:third]] = candidates[0]
        choice[order[third : 2 * third]] = candidates[2]
    return _step_within_limit(choice, candidates, amounts, limit, order)


def _step_within_limit(choice: Ints, candidates: list[int], amounts: Ints, limit: int, order: Ints) -> Ints:
    """Moves rows in ``order`` to the next lower candidate until the limit holds, then to the next higher if that fits.

    Overwrites ``choice``.
    """
    unspent = limit - int(select(amounts, choice).sum())
    for direction in (-1, 1):
        for i in order:
            if direction < 0 and unspent >= 0:
                break
            position = candidates.index(int(choice[i])) + direction
            if not 0 <= position < len(candidates):
                continue
            step = int(amounts[i, candidates[position]] - amounts[i, choice[i]])
            if direction < 0 or step <= unspent:
                choice[i] = candidates[position]
                unspent -= step
    return choice


def layerwise_choice(problem: Problem, amounts: Ints, limit: int, layer_rule: bool, gap: float) -> Ints:
    """Solves each layer on its own. Layers share the limit in proportion to their weights.

    Args:
        problem: its rows and costs.
        amounts: int64 [N, W].
        limit: for the sum of the chosen amounts.
        layer_rule: as in ``allocation.problem.allocate``.
        gap: requested relative gap between the cost of a layer and its optimum.
    """
    choice = np.zeros(len(problem.layer), np.int64)
    total = int(problem.weights.sum())
    for rows, weights in problem.layer_weights:
        rule = [slice(0, rows.stop - rows.start)] if layer_rule else []
        choice[rows], _ = solve(problem.costs[rows], amounts[rows], limit * weights // total, rule, gap)
    return choice


def frequency_costs(problem: Problem) -> Floats:
    """[N, W]: an expert's fraction of its layer's tokens, so that layers weigh equally, times 4^-bits."""
    tokens = np.bincount(problem.layer, weights=problem.counts)[problem.layer]
    errors = 4.0 ** -np.array([width.bits for width in problem.widths])
    return (problem.counts / np.maximum(tokens, 1))[:, None] * errors
