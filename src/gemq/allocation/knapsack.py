"""The multiple-choice knapsack problem of the allocation: one choice per row within a limit, at the least cost.

A Lagrangian price on the limit nearly solves it. It also proves a bound, which rules out most choices. HiGHS solves
what is left, and only if the bound is not within the requested gap. It gets numbers relative to what is left to decide,
since its absolute tolerances do not suit costs from 1e-12 to 1e6 in one problem. HiGHS alone took 37 s for 60 layers of
384 experts and five widths, this takes 0.2 s.

Works on arrays. Must not deal with experts or bits.

Shapes: N rows, W choices per row. A *choice* is int64 [N]. The *layer rule* is a list of slices of rows, in each of
which one row must take the last choice and another row the last but one.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

BISECTIONS = 60
"""Steps of the search for a price over 40 decades, to one part in 1e16."""
MAX_NODES = 50
"""Limit for HiGHS's tree. The root suffices unless experts are identical, whose symmetry takes minutes."""
MIN_GAP = 1e-12
"""A smaller relative gap is float64 noise."""


def select(table: NDArray[Any], choice: Ints) -> NDArray[Any]:
    """[N]: the chosen entry of each row of ``table`` [N, W]."""
    return np.take_along_axis(table, choice[:, None], axis=1)[:, 0]


def cheapest(values: NDArray[Any], rule: list[slice]) -> Ints:
    """The choice with the smallest sum of ``values`` [N, W] under the layer rule. Among equals the last one.

    Exact: in each layer the cheapest pair of rows takes the last two choices, all other rows decide on their own.
    """
    highest = values.shape[1] - 1
    choice = highest - np.argmin(values[:, ::-1], axis=1)
    regret = values - values.min(axis=1, keepdims=True)
    for rows in rule:
        i, j = _cheapest_pair(regret[rows, highest], regret[rows, highest - 1])
        choice[rows.start + i] = highest
        choice[rows.start + j] = highest - 1
    return choice


def _cheapest_pair(a: NDArray[Any], b: NDArray[Any]) -> tuple[int, int]:
    """Different indices i and j with the smallest ``a[i] + b[j]``."""
    # the two smallest of each suffice, since at most one of them can clash
    pairs = itertools.product(a.argsort(kind="stable")[:2], b.argsort(kind="stable")[:2])
    return min((pair for pair in pairs if pair[0] != pair[1]), key=lambda pair: a[pair[0]] + b[pair[1]])


class Relaxed(NamedTuple):
    """Result of the Lagrangian relaxation.

    choice: within the limit and the layer rule
    excess: upper bound for its cost above the optimum
    regret: [N, W] what each choice of a row adds at least to the lower bound of the total cost
    """

    choice: Ints
    excess: float
    regret: Floats


def relax(costs: Floats, amounts: Ints, limit: int, rule: list[slice]) -> Relaxed:
    """Lagrangian relaxation: at a price on amounts, each row, or each layer with the layer rule, decides on its own.

    Args:
        costs: [N, W]
        amounts: [N, W], whose chosen sum must not exceed the limit.
        limit: upper bound for that sum.
        rule: the layer rule.
    """
    price = 0.0
    base = cheapest(costs, rule)
    if select(amounts, base).sum() > limit:
        price = _find_price(costs, amounts, limit, rule)
        base = cheapest(costs + price * amounts, rule)
    values = costs + price * amounts
    choice = _fill(base, costs, amounts, limit, values, rule)
    # a sum of differences, which stays exact next to costs that are 1e18 times as large; a difference of sums does not
    above_base = float((select(values, choice) - select(values, base)).sum())
    excess = above_base + price * (limit - int(select(amounts, choice).sum()))
    regret = values - values.min(axis=1, keepdims=True)
    for rows in rule:  # the bound already contains the cost of the layer's pair
        regret[rows] -= select(regret[rows], base[rows]).sum()
    return Relaxed(choice, max(excess, 0.0), regret)


def _find_price(costs: Floats, amounts: Ints, limit: int, rule: list[slice]) -> float:
    """The lowest price on amounts at which the cheapest choice is within the limit."""
    price = 8 * (float(np.ptp(costs)) or 1.0)  # amounts are integers: at this price the smallest amounts win
    low = price * 1e-40
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * price)
        if select(amounts, cheapest(costs + middle * amounts, rule)).sum() <= limit:
            price = middle
        else:
            low = middle
    return price


def _fill(base: Ints, costs: Floats, amounts: Ints, limit: int, values: Floats, rule: list[slice]) -> Ints:
    """Spends what ``base`` leaves of the limit on the best moves. Also settles ties at the price.

    Args:
        base: a choice within the limit.
        costs: [N, W]
        amounts: [N, W]
        limit: as in ``relax``.
        values: [N, W] costs with the price of amounts.
        rule: the layer rule.
    """
    choice, highest = base.copy(), costs.shape[1] - 1
    unspent = limit - int(select(amounts, base).sum())
    steps = amounts - select(amounts, base)[:, None]
    is_useful = (steps > 0) & (steps <= unspent) & (costs <= select(costs, base)[:, None])
    for rows, width in itertools.product(rule, (highest, highest - 1)):  # one row at each of these must stay
        is_useful[rows.start + int(np.argmax(base[rows] == width))] = False
    move_rows, move_widths = np.nonzero(is_useful)
    order = np.argsort((values - select(values, base)[:, None])[is_useful], kind="stable")
    smallest_step = steps[is_useful].min(initial=limit)
    for i, w in zip(move_rows[order], move_widths[order], strict=True):
        if unspent < smallest_step:
            break
        if steps[i, w] <= unspent and choice[i] == base[i]:
            choice[i] = w
            unspent -= int(steps[i, w])
    return choice


def solve(costs: Floats, amounts: Ints, limit: int, rule: list[slice], gap: float) -> tuple[Ints, float]:
    """Solves the problem within a relative gap. Runs HiGHS if the relaxation alone does not get there.

    Args:
        costs: [N, W]
        amounts: [N, W]
        limit: as in ``relax``.
        rule: the layer rule.
        gap: requested relative gap. Exceeded only if HiGHS stops at MAX_NODES: 8e-4 with 1,024 identical experts.

    Returns:
        The choice and its proven relative gap.
    """
    relaxed, excess, regret = relax(costs, amounts, limit, rule)
    cost = float(select(costs, relaxed).sum())
    if cost == 0 or excess <= max(gap, MIN_GAP) * cost:
        return relaxed, excess / cost if cost else 0.0
    is_candidate = regret <= excess * (1 + 1e-9)  # no better solution contains any other choice
    is_candidate[np.arange(len(costs)), relaxed] = True
    rows, widths = np.nonzero(is_candidate)
    solution = _run_highs(costs, amounts, limit, rule, gap, relaxed, excess, is_candidate)
    if solution.x is None:
        return relaxed, excess / cost
    chosen = solution.x[: len(rows)] > 0.5
    choice = relaxed.copy()
    choice[rows[chosen]] = widths[chosen]
    gain = float((select(costs, relaxed) - select(costs, choice)).sum())
    if select(amounts, choice).sum() > limit:  # HiGHS rounds 0.999999 of an expert to one, a budget does not
        return relaxed, excess / cost
    if gain <= 0:  # no better, and the relaxation has spent what is left of the limit
        return relaxed, min(excess / cost, float(solution.mip_gap))
    proven_gap = max(excess - gain, 0.0) / (cost - gain) if cost > gain else 0.0
    return choice, min(proven_gap, float(solution.mip_gap))


def _run_highs(
    costs: Floats,
    amounts: Ints,
    limit: int,
    rule: Sequence[slice],
    gap: float,
    start: Ints,
    excess: float,
    is_candidate: NDArray[np.bool_],
) -> OptimizeResult:
    """Solves the problem restricted to some candidates, a binary variable for each.

    One more variable, always 1, holds the cost itself, since HiGHS's gap is relative to the objective. Costs and
    amounts are relative to those of ``start``, costs in units of ``excess``, amounts in units of their common divisor.

    Args:
        costs: [N, W]
        amounts: [N, W]
        limit: as in ``relax``.
        rule: the layer rule.
        gap: requested relative gap.
        start: a choice within the limit.
        excess: upper bound for its cost above the optimum.
        is_candidate: [N, W] the choices that a solution may contain.
    """
    rows, widths = np.nonzero(is_candidate)
    n = len(rows)
    relative_costs = (costs - select(costs, start)[:, None])[is_candidate] / excess
    relative_amounts = (amounts - select(amounts, start)[:, None])[is_candidate]
    unit = int(np.gcd.reduce(relative_amounts)) or 1
    unspent = (limit - int(select(amounts, start).sum())) // unit
    one_hot = csr_array((np.ones(n), (rows, np.arange(n))), shape=(len(costs), n + 1))
    constraints = [
        LinearConstraint(one_hot, 1, 1),
        LinearConstraint(csr_array([np.append(relative_amounts / unit, 0)]), -np.inf, unspent),
    ]
    num_widths = costs.shape[1]
    for layer, width in itertools.product(rule, range(num_widths)[-2:]):
        is_required = (rows >= layer.start) & (rows < layer.stop) & (widths == width)
        constraints.append(LinearConstraint(csr_array([np.append(is_required, 0.0)]), 1, np.inf))
    cost = float(select(costs, start).sum())
    with _silent_stdout():
        return milp(
            np.append(relative_costs, cost / excess),
            integrality=1,
            bounds=Bounds(np.append(np.zeros(n), 1), 1),
            constraints=constraints,
            options={"mip_rel_gap": gap, "node_limit": MAX_NODES, "presolve": False},  # presolve gains nothing here
        )


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Drops what C code prints to standard output.

    HiGHS of SciPy 1.17 prints stray lines whatever its options say (HiGHS.jl issue 312). They would end up in the JSON
    that a script reads from our standard output.
    """
    try:
        saved = os.dup(1)
    except OSError:  # standard output is closed
        yield
        return
    flush = ctypes.CDLL(None).fflush  # of C's own buffer, which Python cannot see
    sys.stdout.flush()
    flush(None)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    try:
        yield
    finally:
        flush(None)
        os.dup2(saved, 1)
        os.close(saved)
