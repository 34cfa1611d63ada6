"""The allocation program: which width does each matrix of each expert get? (GEMQ, arXiv:2605.23078)

Minimize ``sum c[i,w] x[i,w]`` over one-hot binaries x, subject to ``sum a[i,w] x[i,w] <= limit`` and, if requested, to
the paper's layer rule: every layer has a row (an expert, or one of its matrices) at each of the two highest widths.
``allocation.knapsack`` solves it. Another constraint belongs there too: an infinite cost is rejected, and a large
finite one only makes a choice unlikely.

Amounts are exact integers, so that no budget is exceeded by rounding. Deterministic. Must not deal with tensors, models
or files.

Shapes: N rows, each of which gets a width: the matrices of all experts, or the experts, ordered by layer and expert. A
row is a *unit* of the glossary. W candidate widths, ascending. A *choice* is int64 [N], indices into the widths.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gemq.allocation.allocation_file import read_choice
from gemq.allocation.baselines import frequency_costs, layerwise_choice, random_choice, uniform_choice
from gemq.allocation.knapsack import Floats, Ints, cheapest, select, solve
from gemq.errors import UserError, short_repr
from gemq.quant.widths import AnyWidth, ExpertWidths, TrellisWidth, Width, plain_widths
from gemq.runtime.integers import ceil_div

Kind = Literal["bits", "stored_bits", "bytes"]
METHODS = ("global", "layerwise", "frequency", "uniform", "random")


@dataclass(frozen=True, eq=False)
class Problem:
    """What each matrix of each expert, or each expert, costs at each width, in error and in memory.

    N rows, each of which gets one of W widths: the matrices of all experts, or the experts, ordered by layer and
    expert. A matrix is gate and up together, or down. ``dataclasses.replace`` returns a copy with other costs.

    Attributes:
        widths: the W candidate widths, ascending. Numbers become widths.
        layer: layer of each row, int64 [N], ascending. Dense layers have no rows.
        costs: predicted increase of the loss, float64 [N, W], finite and at least 0, on any scale.
        weights: number of weights, int64 [N].
        bytes: stored bytes with scales and offsets, int64 [N, W].
        counts: calibration tokens that were routed to the expert, int64 [N]. Only method ``frequency`` uses them.
        layers: number of the model's layers, including dense ones. 0: up to the last one with experts.
        units_per_expert: number of rows of an expert: 2, gate and up before down, or 1 for the whole expert.

    Raises:
        UserError: ``costs`` have another shape, are negative or are not finite.
    """

    widths: tuple[AnyWidth, ...]
    layer: Ints
    costs: Floats
    weights: Ints
    bytes: Ints
    counts: Ints
    layers: int = 0
    units_per_expert: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(map(_as_width, self.widths)))
        rows = len(self.layer)
        assert rows and list(self.widths) == sorted(set(self.widths))  # noqa: PT018
        shape = (rows, len(self.widths))
        if self.costs.shape != shape:
            raise UserError(f"costs have shape {self.costs.shape}: give one for each row and width, {shape}")
        if not (np.isfinite(self.costs).all() and self.costs.min() >= 0):
            raise UserError("costs are negative or not finite: give numbers from 0 up")
        assert self.bytes.shape == shape
        assert len(self.weights) == len(self.counts) == rows
        assert (np.diff(self.layer) >= 0).all(), "rows must be ordered by layer"
        object.__setattr__(self, "layers", self.layers or int(self.layer[-1]) + 1)
        assert self.layers > self.layer[-1]

    def per_expert(self) -> Problem:
        """Return the same problem with one row for each expert: costs, weights and bytes are summed."""
        return replace(
            self,
            layer=self.layer[:: self.units_per_expert],
            costs=self._sum_per_expert(self.costs),
            weights=self._sum_per_expert(self.weights),
            bytes=self._sum_per_expert(self.bytes),
            counts=self.counts[:: self.units_per_expert],
            units_per_expert=1,
        )

    def _sum_per_expert(self, table: NDArray[Any]) -> NDArray[Any]:
        """Sums a table [N, ...] over the rows of each expert."""
        return table.reshape(-1, self.units_per_expert, *table.shape[1:]).sum(1)

    @property
    def by_layer(self) -> list[slice]:
        """The rows of each layer as slices, an empty one for a dense layer."""
        edges = np.searchsorted(self.layer, np.arange(self.layers + 1)).tolist()
        return [slice(start, stop) for start, stop in itertools.pairwise(edges)]

    @property
    def layer_weights(self) -> list[tuple[slice, int]]:
        """The rows of each layer with experts, and the number of their weights."""
        return [(rows, int(self.weights[rows].sum())) for rows in self.by_layer if rows.stop > rows.start]

    @property
    def width_names(self) -> str:
        """The candidate widths for a message."""
        return ", ".join(str(width) for width in self.widths)


@dataclass(frozen=True)
class Budget:
    """The limit of an allocation.

    Attributes:
        kind: ``bits`` and ``stored_bits`` are means per expert weight, without and with scales and offsets. ``bytes``
            are those of all experts, while ``size`` of a recipe counts the whole checkpoint.
        value: the limit, a positive number of bits or bytes.

    Raises:
        UserError: there is no such kind, or the value is not positive.
    """

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
    """A width for every row of a problem, and the predicted cost and size. ``allocate`` returns it.

    Attributes:
        widths: N widths, in the order of the problem's rows.
        units_per_expert: number of rows of an expert, as in ``Problem``.
        layer_sizes: rows of each layer, 0 for a dense one.
        layer_bits: mean nominal bits per expert weight of each layer, 0 for a dense one.
        method: the method of ``allocate``, or ``file``.
        budget: the budget, if known.
        predicted_cost: sum of the chosen costs, in their unit.
        nominal_bits: mean bits per expert weight, without scales and offsets.
        stored_bits: mean bits per expert weight, with scales and offsets.
        stored_bytes: bytes of all experts, with scales and offsets.
        gap: proven upper bound for (cost - optimum) / cost. None for methods other than ``global``.
    """

    widths: tuple[AnyWidth, ...]
    units_per_expert: int
    layer_sizes: tuple[int, ...]
    layer_bits: tuple[float, ...]
    method: str
    budget: Budget | None
    predicted_cost: float
    nominal_bits: float
    stored_bits: float
    stored_bytes: int
    gap: float | None = field(default=None, compare=False)

    @property
    def by_layer(self) -> list[list[ExpertWidths]]:
        """Widths by layer and expert, of gate and up and of down. An empty list for a dense layer."""
        layers, start = [], 0
        for size in self.layer_sizes:
            widths = self.widths[start : start + size]
            first_widths = widths[:: self.units_per_expert]
            down_widths = widths[self.units_per_expert - 1 :: self.units_per_expert]
            layers.append(list(zip(first_widths, down_widths, strict=True)))
            start += size
        return layers

    def to_json(self, tokens: Sequence[Sequence[int]] | None = None) -> str:
        """Return the text of a file for the argument ``allocation`` of ``quantize`` and ``export``.

        Each layer has a line with a width for each expert, or a list of two: that of gate and up, and that of down.

        Args:
            tokens: calibration tokens of each expert, by layer. They say which experts are used most.
        """
        budget = json.dumps({self.budget.kind: self.budget.value} if self.budget else None)
        rows = ",\n".join(f"    {json.dumps(row)}" for row in plain_widths(self.by_layer))
        method = json.dumps(self.method)
        text = f'{{\n  "budget": {budget},\n  "method": {method},\n  "widths": [\n{rows}\n  ]'
        if tokens is not None:
            rows = ",\n".join(f"    {json.dumps(list(row))}" for row in tokens)
            text += f',\n  "tokens": [\n{rows}\n  ]'
        return text + "\n}\n"

    @classmethod
    def from_json(cls, text: str, problem: Problem, origin: str = "allocation") -> Allocation:
        """Read the text of a file that ``to_json`` or a user wrote.

        Args:
            text: the file's contents. Only its key ``widths`` is required. A budget is not enforced.
            problem: the problem, from which cost and size are computed.
            origin: name of the file, for messages.

        Raises:
            UserError: the text is no such JSON, or its widths do not fit the problem.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{origin} is not valid JSON ({error}): correct it or export it again") from error
        if not isinstance(data, dict) or not isinstance(data.get("widths"), list):
            raise UserError(f'{origin} has no list "widths": write {{"widths": [[2, 3, ...], ...]}}')
        unknown = sorted(data.keys() - {"budget", "method", "widths", "tokens"})
        if unknown:
            raise UserError(
                f"{origin}: unknown key {short_repr(unknown[0])}: the keys are budget, method, widths and tokens"
            )
        budget = _read_budget(data.get("budget"), origin)
        choice = read_choice(data["widths"], problem, origin)
        return _make_allocation(problem, budget, str(data.get("method", "file")), choice)


def allocate(
    problem: Problem,
    budget: Budget,
    method: str = "global",
    *,
    layer_rule: bool = False,
    seed: int = 0,
    gap: float = 1e-4,
) -> Allocation:
    """Choose a width for every row within a budget, which no method ever exceeds.

    The methods:

    - ``global``: the paper's program over all rows (GEMQ, arXiv:2605.23078), to a relative ``gap`` of the optimum.
    - ``layerwise``: a separate program for every layer, each with the same mean budget (PMQ style).
    - ``frequency``: the global program with cost = fraction of the layer's tokens * 4^-bits.
    - ``uniform``: one width. Between two widths, the same fractions of them in every layer, drawn by ``seed``.
    - ``random``: drawn by ``seed`` over all experts. The budget of a width b gives equal fractions of b - 1, b and
      b + 1 if these are candidates (otherwise ``uniform``), any other budget the two widths around it.

    All methods but ``global`` give both matrices of an expert one width. ``uniform`` and ``random`` leave out
    ternary, unless the budget is that of ternary or other widths cannot bracket it.

    Args:
        problem: costs and sizes. Only ``global`` and ``layerwise`` use the costs.
        budget: the limit.
        method: ``global``, ``layerwise``, ``frequency``, ``uniform`` or ``random``.
        layer_rule: require a row (an expert, or one of its matrices) at each of the two highest widths in every layer,
            as the paper does for experts. ``uniform`` and ``random`` ignore it.
        seed: seed of ``uniform`` and ``random``.
        gap: requested relative gap between the cost and the optimum, for ``global``, ``layerwise`` and ``frequency``.

    Returns:
        The allocation. Equal arguments give equal allocations.

    Raises:
        UserError: the budget is out of reach. The message names one that works.
    """
    if method not in METHODS:
        raise UserError(f"there is no allocation method {method!r}: choose from {', '.join(METHODS)}")
    layer_rule = layer_rule and method not in ("uniform", "random")
    if method != "global" and problem.units_per_expert > 1:
        by_expert = allocate(problem.per_expert(), budget, method, layer_rule=layer_rule, seed=seed, gap=gap)
        expert_choice = np.array([problem.widths.index(width) for width in by_expert.widths])
        return _make_allocation(problem, budget, method, expert_choice.repeat(problem.units_per_expert))
    _check_reachable(problem, budget, method, layer_rule)
    amounts, limit = linear_constraint(problem, budget)
    rule = _rule_layers(problem, layer_rule)
    if method == "uniform":
        choice = uniform_choice(problem, amounts, limit, seed)
    elif method == "random":
        choice = random_choice(problem, amounts, limit, seed)
    elif method == "layerwise":
        choice = layerwise_choice(problem, amounts, limit, bool(rule), gap)
    elif method == "frequency":
        choice, _ = solve(frequency_costs(problem), amounts, limit, rule, gap)
    else:
        choice, proven_gap = solve(problem.costs, amounts, limit, rule, gap)
        return _make_allocation(problem, budget, method, choice, proven_gap)
    return _make_allocation(problem, budget, method, choice)


def _as_width(width: AnyWidth | float) -> AnyWidth:
    """The affine width of a plain number, or a width as it is."""
    return width if isinstance(width, TrellisWidth) else Width(width)


def linear_constraint(problem: Problem, budget: Budget) -> tuple[Ints, int]:
    """A budget as amounts int64 [N, W] and a limit, such that ``sum of amounts[i, choice[i]] <= limit``.

    The unit is an eighth of a bit for ``bits`` (ternary counts 1.625 bits), otherwise a byte.
    """
    value = Fraction(str(budget.value))  # the decimal that the user typed: 2.1 is not 2.0999999999999996
    total = int(problem.weights.sum())
    if budget.kind == "bits":
        eighths = np.array([8 * width.bits for width in problem.widths]).astype(np.int64)
        return problem.weights[:, None] * eighths, math.floor(value * total * 8)
    return problem.bytes, math.floor(value if budget.kind == "bytes" else value * total / 8)


def smallest_budget(problem: Problem, kind: Kind, method: str = "global", *, layer_rule: bool = False) -> Budget:
    """The smallest budget of a kind that ``allocate`` accepts. Bits are rounded up to 4 decimals.

    Args:
        problem: costs and sizes.
        kind: of the budget.
        method: one of METHODS.
        layer_rule: as in ``allocate``.
    """
    amounts, _ = linear_constraint(problem, Budget(kind, 1))
    needed = select(amounts, cheapest(amounts, _rule_layers(problem, layer_rule)))
    smallest, total = int(needed.sum()), int(problem.weights.sum())
    if method == "layerwise":  # each layer needs a share that suffices for it
        smallest = 0
        for rows, weights in problem.layer_weights:
            smallest = max(smallest, ceil_div(int(needed[rows].sum()) * total, weights))
    if kind == "bytes":
        return Budget(kind, smallest)
    per_weight = Fraction(smallest, 8 * total) if kind == "bits" else Fraction(8 * smallest, total)
    return Budget(kind, math.ceil(per_weight * 10_000) / 10_000)


def _check_reachable(problem: Problem, budget: Budget, method: str, layer_rule: bool) -> None:
    """Raises UserError if no allocation fits into the budget, or if all fit into a smaller one."""
    names = problem.width_names + (" under layer_rule" if layer_rule else "")
    smallest = smallest_budget(problem, budget.kind, method, layer_rule=layer_rule)
    highest = problem.widths[-1].bits
    if budget.value < smallest.value:
        raise UserError(f"no allocation of widths {names} fits into {budget}: give at least {smallest}")
    if budget.kind == "bits" and budget.value > highest:
        raise UserError(f"no allocation of widths {names} has {budget}: give at most {highest:g}")


def _rule_layers(problem: Problem, layer_rule: bool) -> list[slice]:
    """The rows of the layers that the layer rule applies to."""
    if not layer_rule or len(problem.widths) == 1:
        return []
    for index, rows in enumerate(problem.by_layer):
        if rows.stop - rows.start == 1:
            raise UserError(f"layer {index} has one expert, too few for two widths: switch layer_rule off")
    return [rows for rows in problem.by_layer if rows.stop > rows.start]


def _make_allocation(
    problem: Problem, budget: Budget | None, method: str, choice: Ints, gap: float | None = None
) -> Allocation:
    """The allocation of a choice, with its cost and size."""
    total = int(problem.weights.sum())
    row_bits = np.array([width.bits for width in problem.widths])[choice] * problem.weights
    layer_weights = np.bincount(problem.layer, problem.weights, problem.layers)
    layer_bits = np.bincount(problem.layer, row_bits, problem.layers) / np.maximum(layer_weights, 1)
    stored = int(select(problem.bytes, choice).sum())
    return Allocation(
        widths=tuple(problem.widths[index] for index in choice),
        units_per_expert=problem.units_per_expert,
        layer_sizes=tuple(rows.stop - rows.start for rows in problem.by_layer),
        layer_bits=tuple(layer_bits.tolist()),
        method=method,
        budget=budget,
        predicted_cost=float(select(problem.costs, choice).sum()),
        nominal_bits=float(row_bits.sum()) / total,
        stored_bits=stored * 8 / total,
        stored_bytes=stored,
        gap=gap,
    )


def _read_budget(value: Any, origin: str) -> Budget | None:
    """The budget of a user's file."""
    if value is None:
        return None
    try:
        ((kind, amount),) = value.items()
        return Budget(kind, float(amount))
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f'{origin}: budget cannot be {short_repr(value)}: write {{"bits": 2.0}}') from error
