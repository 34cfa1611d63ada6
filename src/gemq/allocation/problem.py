"""Which width does each expert get? One program over all experts of all layers (GEMQ, arXiv:2605.23078).

Minimise ``sum c[i,w] x[i,w]`` over one-hot binaries x, subject to ``sum a[i,w] x[i,w] <= limit`` and, if
asked for, to the paper's rule that every layer keeps an expert at each of the two highest widths. That is a
multiple-choice knapsack: one price on the budget nearly solves it and proves a bound, which rules out most
choices; HiGHS gets the rest, and only when the bound is not within the gap yet. It sees numbers in units of
the decision that is left, so that costs from 1e-12 to 1e6 in one problem do not meet its absolute tolerances.

Shapes: N rows, what gets a width: the matrices of all experts, or the experts, ordered by layer and expert; W candidate
widths, ascending. A *choice* is int64 [N], indices into the widths. Amounts are exact integers: no budget is exceeded,
not even by rounding.
Knows nothing of tensors, models or files. Deterministic.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np

from gemq.allocation.knapsack import Floats, Ints, cheapest, solve, take
from gemq.errors import UserError, shown
from gemq.quant.widths import ExpertWidths, Width, nominal_bits, parse_width, plain_widths, width_name

Kind = Literal["bits", "stored_bits", "bytes"]
OF_BOTH = ", or give two in brackets: that of gate and up, that of down"
METHODS = ("global", "layerwise", "frequency", "uniform", "random")


@dataclass(frozen=True, eq=False)
class Problem:
    """What each matrix of each expert, or each expert, costs at each width, in error and in memory."""

    widths: tuple[Width, ...]  # the candidates, ascending
    layer: Ints  # [N] layer of each row, ascending; dense layers have none
    costs: Floats  # [N, W] predicted increase of the loss, finite and >= 0, any unit
    weights: Ints  # [N] weight parameters
    bytes: Ints  # [N, W] stored bytes, scales and offsets included
    counts: Ints  # [N] calibration tokens routed to the expert
    layers: int = 0  # of the model, dense ones included; 0: up to the last that has experts
    units: int = 1  # rows of an expert: 2, its matrices one after the other, or 1

    def __post_init__(self) -> None:
        experts = len(self.layer)
        assert experts and list(self.widths) == sorted(set(self.widths))  # noqa: PT018
        assert self.costs.shape == self.bytes.shape == (experts, len(self.widths))
        assert len(self.weights) == len(self.counts) == experts
        assert np.isfinite(self.costs).all(), "costs must be finite"
        assert self.costs.min() >= 0, "costs must not be negative"
        assert (np.diff(self.layer) >= 0).all(), "experts must be ordered by layer"
        object.__setattr__(self, "layers", self.layers or int(self.layer[-1]) + 1)
        assert self.layers > self.layer[-1]

    def of_experts(self) -> Problem:
        """The same with a row for each expert."""
        add = lambda table: table.reshape(-1, self.units, *table.shape[1:]).sum(1)
        tables = {name: add(getattr(self, name)) for name in ("costs", "weights", "bytes")}
        own = {name: getattr(self, name)[:: self.units] for name in ("layer", "counts")}
        return replace(self, **tables, **own, units=1)

    @property
    def by_layer(self) -> list[slice]:
        """The rows of each layer; empty for dense layers."""
        edges = np.searchsorted(self.layer, np.arange(self.layers + 1)).tolist()
        return [slice(a, b) for a, b in itertools.pairwise(edges)]

    @property
    def width_names(self) -> str:
        return ", ".join(map(width_name, self.widths))


@dataclass(frozen=True)
class Budget:
    """``bits``, ``stored_bits``: mean per expert weight, without or with scales; ``bytes``: all experts."""

    kind: Kind
    value: float

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"there is no budget in {self.kind!r}: choose from {', '.join(get_args(Kind))}")
        if not (math.isfinite(self.value) and self.value > 0):
            raise UserError(f"a budget cannot be {self.value}: give a positive number")

    def __str__(self) -> str:
        if self.kind == "bytes":
            return f"{self.value:.0f} bytes ({self.value / 1e9:.3f} GB)"
        return f"{self.value:g} {self.kind.replace('_', ' ')}"


@dataclass(frozen=True)
class Allocation:
    """A width for every row, and what that predicts and takes. Means are per expert weight."""

    widths: tuple[Width, ...]  # [N], in the problem's order
    units: int  # as in the problem
    layer_sizes: tuple[int, ...]  # rows of each layer, 0 for dense layers
    layer_bits: tuple[float, ...]  # mean nominal bits of each layer, 0 for dense layers
    method: str
    budget: Budget | None
    predicted_cost: float  # sum of the chosen costs, in their unit
    nominal_bits: float
    stored_bits: float
    stored_bytes: int
    gap: float | None = field(default=None, compare=False)
    """Proven bound on (cost - optimum) / cost. Only of method ``global``."""

    @property
    def by_layer(self) -> list[list[ExpertWidths]]:
        """Widths of the experts of each layer; empty for dense layers."""
        edges = [0, *itertools.accumulate(self.layer_sizes)]
        rows = [self.widths[a:b] for a, b in itertools.pairwise(edges)]
        return [list(zip(row[:: self.units], row[self.units - 1 :: self.units], strict=True)) for row in rows]

    def to_json(self) -> str:
        """A file to read, edit and pass back: a line for each layer, and for each of its experts the bits, or a list of
        those of its gate and up, and of its down matrix."""
        budget = json.dumps({self.budget.kind: self.budget.value} if self.budget else None)
        rows = ",\n".join(f"    {json.dumps(row)}" for row in plain_widths(self.by_layer))
        method = json.dumps(self.method)
        return f'{{\n  "budget": {budget},\n  "method": {method},\n  "widths": [\n{rows}\n  ]\n}}\n'

    @classmethod
    def from_json(cls, text: str, problem: Problem, origin: str = "allocation") -> Allocation:
        """Reads what ``to_json`` wrote; only ``widths`` is needed. Raises UserError when it does not fit.

        The figures are computed anew from ``problem``. A budget in the file is a remark: it is not enforced.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{origin} is not valid JSON ({error}): correct it or export it again") from error
        if not isinstance(data, dict) or not isinstance(data.get("widths"), list):
            raise UserError(f'{origin} has no list "widths": write {{"widths": [[2, 3, ...], ...]}}')
        if unknown := sorted(data.keys() - {"budget", "method", "widths"}):
            raise UserError(f"{origin}: unknown key {shown(unknown[0])}: the keys are budget, method and widths")
        budget = data.get("budget")
        if budget is not None:
            try:
                ((kind, value),) = budget.items()
                budget = Budget(kind, float(value))
            except (AttributeError, OverflowError, TypeError, ValueError) as error:
                raise UserError(f'{origin}: budget cannot be {shown(budget)}: write {{"bits": 2.0}}') from error
        choice = _read_widths(data["widths"], problem, origin)
        return _allocation(problem, budget, str(data.get("method", "file")), choice)


def allocate(
    problem: Problem,
    budget: Budget,
    method: str = "global",
    *,
    layer_rule: bool = False,
    seed: int = 0,
    gap: float = 1e-4,
) -> Allocation:
    """Chooses a width for every row within ``budget``, which no method ever exceeds.

    ``global``     the paper's program over all rows at once, to a relative ``gap`` of the optimum. The others give
                   an expert's matrices one width.
    ``layerwise``  a program of its own for every layer, each with the same mean budget (PMQ style).
    ``frequency``  the global program with cost = share of the layer's tokens * 4^-bits.
    ``uniform``    one width; between two widths, the same shares of them in every layer, drawn by ``seed``.
    ``random``     drawn by ``seed`` over all experts. The budget of a width b gets equal shares of b - 1, b
                   and b + 1 where these exist (else uniform), any other budget the two widths around it.

    uniform and random mix integer widths, unless the budget is that of ternary or integers cannot bracket it;
    ``layer_rule`` does not apply to them. Raises UserError for a budget out of reach, with one that works.
    """
    if method not in METHODS:
        raise UserError(f"there is no allocation method {method!r}: choose from {', '.join(METHODS)}")
    layer_rule = layer_rule and method not in ("uniform", "random")
    if method != "global" and problem.units > 1:
        whole = allocate(problem.of_experts(), budget, method, layer_rule=layer_rule, seed=seed, gap=gap)
        choice = np.array([problem.widths.index(w) for w in whole.widths]).repeat(problem.units)
        return _allocation(problem, budget, method, choice)
    _check_reachable(problem, budget, method, layer_rule)
    amounts, limit = linear_constraint(problem, budget)
    achieved = None
    if method == "uniform":
        choice = _uniform(problem, amounts, limit, seed)
    elif method == "random":
        choice = _random(problem, amounts, limit, seed)
    elif method == "layerwise":
        choice = np.zeros(len(problem.layer), np.int64)
        total = int(problem.weights.sum())
        for rows, weights in _layer_weights(problem):
            rule = [slice(0, rows.stop - rows.start)] if _rule_layers(problem, layer_rule) else []
            choice[rows], _ = solve(problem.costs[rows], amounts[rows], limit * weights // total, rule, gap)
    else:
        costs = problem.costs if method == "global" else _frequency_costs(problem)
        choice, achieved = solve(costs, amounts, limit, _rule_layers(problem, layer_rule), gap)
    return _allocation(problem, budget, method, choice, achieved if method == "global" else None)


def linear_constraint(problem: Problem, budget: Budget) -> tuple[Ints, int]:
    """Any budget as ``sum of amounts[i, choice[i]] <= limit``: int64 [N, W] and its limit.

    The unit is an eighth of a bit for ``bits`` (ternary counts 1.625), else a byte.
    """
    value = Fraction(str(budget.value))  # the decimal that the user typed: 2.1 is not 2.0999999999999996
    total = int(problem.weights.sum())
    if budget.kind == "bits":
        eighths = np.array([8 * nominal_bits(w) for w in problem.widths]).astype(np.int64)
        return problem.weights[:, None] * eighths, math.floor(value * total * 8)
    return problem.bytes, math.floor(value if budget.kind == "bytes" else value * total / 8)


def smallest_budget(problem: Problem, kind: Kind, method: str = "global", *, layer_rule: bool = False) -> Budget:
    """The smallest budget of a kind that ``allocate`` accepts (bits are rounded up to 4 decimals)."""
    amounts, _ = linear_constraint(problem, Budget(kind, 1))
    needed = take(amounts, cheapest(amounts, _rule_layers(problem, layer_rule)))
    least, total = int(needed.sum()), int(problem.weights.sum())
    if method == "layerwise":  # each layer has to get by with its share
        shares = _layer_weights(problem)
        least = max(-(-int(needed[rows].sum()) * total // weights) for rows, weights in shares)
    if kind == "bytes":
        return Budget(kind, least)
    per_weight = Fraction(least, 8 * total) if kind == "bits" else Fraction(8 * least, total)
    return Budget(kind, math.ceil(per_weight * 10_000) / 10_000)


def _check_reachable(problem: Problem, budget: Budget, method: str, layer_rule: bool) -> None:
    names = problem.width_names + (" under layer_rule" if layer_rule else "")
    smallest = smallest_budget(problem, budget.kind, method, layer_rule=layer_rule)
    highest = nominal_bits(problem.widths[-1])
    if budget.value < smallest.value:
        raise UserError(f"no allocation of widths {names} fits into {budget}: give at least {smallest}")
    if budget.kind == "bits" and budget.value > highest:
        raise UserError(f"no allocation of widths {names} has {budget}: give at most {highest:g}")


def _rule_layers(problem: Problem, layer_rule: bool) -> list[slice]:
    """The layers in which an expert at each of the two highest widths is due."""
    if not layer_rule or len(problem.widths) == 1:
        return []
    for index, rows in enumerate(problem.by_layer):
        if rows.stop - rows.start == 1:
            raise UserError(f"layer {index} has one expert, too few for two widths: switch layer_rule off")
    return [rows for rows in problem.by_layer if rows.stop > rows.start]


def _layer_weights(problem: Problem) -> list[tuple[slice, int]]:
    return [(rows, int(problem.weights[rows].sum())) for rows in problem.by_layer if rows.stop > rows.start]


def _frequency_costs(problem: Problem) -> Floats:
    """[N, W]: an expert's share of its layer's tokens, so that layers weigh equally, times 4^-bits."""
    tokens = np.bincount(problem.layer, weights=problem.counts)[problem.layer]
    errors = 4.0 ** -np.array([nominal_bits(w) for w in problem.widths])
    return (problem.counts / np.maximum(tokens, 1))[:, None] * errors


def _allocation(
    problem: Problem, budget: Budget | None, method: str, choice: Ints, gap: float | None = None
) -> Allocation:
    total = int(problem.weights.sum())
    bits = np.array([nominal_bits(w) for w in problem.widths])[choice] * problem.weights
    weights = np.bincount(problem.layer, problem.weights, problem.layers)
    stored = int(take(problem.bytes, choice).sum())
    return Allocation(
        widths=tuple(problem.widths[w] for w in choice),
        units=problem.units,
        layer_sizes=tuple(rows.stop - rows.start for rows in problem.by_layer),
        layer_bits=tuple((np.bincount(problem.layer, bits, problem.layers) / np.maximum(weights, 1)).tolist()),
        method=method,
        budget=budget,
        predicted_cost=float(take(problem.costs, choice).sum()),
        nominal_bits=float(bits.sum()) / total,
        stored_bits=stored * 8 / total,
        stored_bytes=stored,
        gap=gap,
    )


def _read_widths(layers: list[Any], problem: Problem, origin: str) -> Ints:
    """Choice from the rows of a user's file. Raises UserError that names the layer."""
    if len(layers) != problem.layers:
        count = f"{len(layers)} layers, the model {problem.layers}"
        raise UserError(f"{origin} has {count}: give each a list, [] for a dense one")
    choice = []
    for index, (row, rows) in enumerate(zip(layers, problem.by_layer, strict=True)):
        experts = (rows.stop - rows.start) // problem.units
        if not isinstance(row, list) or len(row) != experts:
            found = f"{len(row)} widths" if isinstance(row, list) else shown(row)
            raise UserError(f"{origin}: layer {index} has {experts} experts, not {found}: give one for each")
        for expert, value in enumerate(row):
            both = value if isinstance(value, list) else [value] * problem.units
            try:
                if len(both) != problem.units:
                    raise ValueError
                choice += [problem.widths.index(parse_width(v)) for v in both]
            except ValueError as error:  # no width at all (UserError), or not among these
                raise UserError(
                    f"{origin}: layer {index}, expert {expert} cannot have width {shown(value)}: "
                    f"choose from {problem.width_names}{OF_BOTH if problem.units > 1 else ''}"
                ) from error
    return np.array(choice, np.int64)


# The baselines


def _neighbours(problem: Problem, amounts: Ints, limit: int) -> tuple[int, int]:
    """The widest width that all experts can have, and the next; twice the same if nothing is left."""
    totals = amounts.sum(axis=0)
    ladder = list(range(len(totals)))
    integers = [w for w in ladder if problem.widths[w] == int(problem.widths[w])]
    if limit not in totals and integers and totals[integers[0]] <= limit:
        ladder = integers if limit < totals[integers[-1]] else ladder
    low = max(w for w in ladder if totals[w] <= limit)
    return low, low if totals[low] == limit else min((w for w in ladder if w > low), default=low)


def _uniform(problem: Problem, amounts: Ints, limit: int, seed: int) -> Ints:
    low, high = _neighbours(problem, amounts, limit)
    choice = np.full(len(amounts), low, np.int64)
    steps = amounts[:, high] - amounts[:, low]
    rest, total = limit - int(amounts[:, low].sum()), max(int(steps.sum()), 1)
    generator = np.random.default_rng(seed)
    for rows in problem.by_layer:
        drawn = rows.start + generator.permutation(rows.stop - rows.start)
        share = rest * int(steps[rows].sum()) // total  # the same fraction of every layer's steps
        choice[drawn[np.cumsum(steps[drawn]) <= share]] = high
    return choice


def _random(problem: Problem, amounts: Ints, limit: int, seed: int) -> Ints:
    low, high = _neighbours(problem, amounts, limit)
    order = np.random.default_rng(seed).permutation(len(amounts))
    choice = np.full(len(amounts), low, np.int64)
    ladder = [low, high]
    if low == high:
        around = [problem.widths[low] + d for d in (-1, 0, 1)]
        if not set(around) <= set(problem.widths):
            return choice
        ladder = [problem.widths.index(w) for w in around]
        third = len(order) // 3
        choice[order[:third]], choice[order[third : 2 * third]] = ladder[0], ladder[2]
    # In the drawn order: steps down until the budget holds, then those steps up that still fit.
    rest = limit - int(take(amounts, choice).sum())
    for i, down in itertools.chain(((i, True) for i in order), ((i, False) for i in order)):
        place = ladder.index(int(choice[i])) + (-1 if down else 1)
        if (down and rest >= 0) or not 0 <= place < len(ladder):
            continue
        step = int(amounts[i, ladder[place]] - amounts[i, choice[i]])
        if down or step <= rest:
            choice[i], rest = ladder[place], rest - step
    return choice
