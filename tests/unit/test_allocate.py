"""Allocation: the optimum against brute force, the baselines' shares, and the file that users edit."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from gemq.allocation.problem import METHODS, Allocation, Budget, Problem, allocate, linear_constraint, smallest_budget
from gemq.errors import UserError
from gemq.quant.widths import Width, plain_widths
from support.allocation_problems import matrix_problem, random_problem

LADDER = (1, 1.6, 2, 3)


def amount(problem: Problem, budget: Budget, allocation: Allocation) -> tuple[int, int]:
    """The amount that an allocation uses and the limit, in the integers of the constraint."""
    amounts, limit = linear_constraint(problem, budget)
    return sum(int(amounts[i, problem.widths.index(w)]) for i, w in enumerate(allocation.widths)), limit


def keeps_rule(problem: Problem, choice) -> bool:
    high = len(problem.widths) - 1
    chosen = np.array(choice)
    return all({high, high - 1} <= set(chosen[rows]) for rows in problem.by_layer if rows.start < rows.stop)


def brute_force(problem: Problem, budget: Budget, rule: bool) -> float:
    amounts, limit = linear_constraint(problem, budget)
    experts = range(len(problem.layer))
    return min(
        sum(problem.costs[i, w] for i, w in zip(experts, choice, strict=True))
        for choice in itertools.product(range(len(problem.widths)), repeat=len(problem.layer))
        if sum(amounts[i, w] for i, w in zip(experts, choice, strict=True)) <= limit
        and (not rule or keeps_rule(problem, choice))
    )


@pytest.mark.parametrize("rule", [False, True])
@pytest.mark.parametrize("kind", ["bits", "stored_bits", "bytes"])
@pytest.mark.parametrize("shapes", [[(64, 256)], [(64, 256), (40, 128), (24, 384)]])
def test_global_is_the_optimum(kind, rule, shapes):
    for seed, share in itertools.product(range(3), (0.2, 0.55, 0.9)):
        problem = random_problem([3, 0, 3], (1, 2, 3) if seed else LADDER, seed, shapes=shapes)
        low = smallest_budget(problem, kind, layer_rule=rule).value
        high = {"bits": 3, "stored_bits": 3.25, "bytes": int(problem.bytes[:, -1].sum())}[kind]
        value = low + share * (high - low)
        budget = Budget(kind, int(value) if kind == "bytes" else value)
        allocation = allocate(problem, budget, layer_rule=rule, gap=0)
        assert allocation.predicted_cost == pytest.approx(brute_force(problem, budget, rule), rel=1e-9)
        used, limit = amount(problem, budget, allocation)
        assert used <= limit
        assert allocation.gap is not None and allocation.gap < 1e-9  # noqa: PT018


def test_the_gap_is_proven():
    problem = random_problem([64] * 4, LADDER, spread=1)
    loose, tight = (allocate(problem, Budget("bits", 2.1), gap=gap) for gap in (1e-2, 1e-7))
    assert loose.gap is not None and loose.gap <= 1e-2  # noqa: PT018
    assert tight.gap is not None and tight.gap <= 1e-7  # noqa: PT018
    assert tight.predicted_cost <= loose.predicted_cost
    assert loose.predicted_cost * (1 - loose.gap) <= tight.predicted_cost


def test_more_budget_never_costs_more():
    problem = random_problem([16, 0, 24, 8], LADDER)
    budgets = [Budget("bits", b) for b in np.linspace(1, 3, 21).round(2)]
    costs = [allocate(problem, b, gap=0).predicted_cost for b in budgets]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(costs))


def test_whole_range_of_each_budget():
    problem = random_problem([4, 4], LADDER)
    assert set(allocate(problem, Budget("bits", 1)).widths) == {1}
    top = dataclasses.replace(problem, costs=np.sort(problem.costs, axis=1)[:, ::-1])
    for budget in (Budget("bits", 3), Budget("stored_bits", 9), Budget("bytes", 10**9)):
        for method in METHODS:
            assert set(allocate(top, budget, method).widths) == {3}


@pytest.mark.parametrize("factor", [1e-9, 1.0, 1e9])
def test_units_of_cost_do_not_matter(factor):
    """HiGHS compares with absolute tolerances near 1e-7; these costs span 1e-12 to 1e6."""
    problem = random_problem([16] * 4, LADDER, spread=6)
    assert problem.costs.max() / problem.costs.min() > 1e12
    scaled = dataclasses.replace(problem, costs=problem.costs * factor)
    for rule, gap in itertools.product((False, True), (1e-4, 0)):
        expected = allocate(problem, Budget("bits", 2.1), layer_rule=rule, gap=gap)
        assert allocate(scaled, Budget("bits", 2.1), layer_rule=rule, gap=gap).widths == expected.widths


def test_differences_of_tiny_costs_count_next_to_huge_costs():
    """Among experts that cost 1e-12, the width still goes to the one that gains most from it."""
    costs = np.array([[1e6, 1.0], [1e6, 1.0], [3e-12, 1e-13], [9e-12, 1e-13], [5e-12, 1e-13]])
    ones = np.ones(5, np.int64)
    problem = Problem((1, 2), ones * 0, costs, ones * 128, ones[:, None] * [20, 36], ones)
    assert allocate(problem, Budget("bits", 1.6)).widths == (2, 2, 1, 2, 1)


def test_unused_experts_and_equal_experts():
    """Zero costs everywhere, or the same costs everywhere: the budget is still spent."""
    problem = random_problem([8, 8])
    for costs in (np.zeros((16, 3)), np.tile([4.0, 2.0, 1.0], (16, 1))):
        allocation = allocate(dataclasses.replace(problem, costs=costs), Budget("bits", 2))
        assert allocation.nominal_bits == 2


def test_layer_rule():
    problem = random_problem([6, 0, 6, 6])
    problem.costs[:6] *= 1e-6  # without the rule, layer 0 gets 1 bit throughout
    plain, ruled = (allocate(problem, Budget("bits", 1.7), layer_rule=rule) for rule in (False, True))
    assert set(plain.by_layer[0]) == {(1, 1)}
    assert all({(2, 2), (3, 3)} <= set(row) for row in ruled.by_layer if row)
    assert ruled.by_layer[1] == []
    assert ruled.predicted_cost >= plain.predicted_cost
    with pytest.raises(UserError, match="layer 1 has one expert"):
        allocate(random_problem([4, 1]), Budget("bits", 2), layer_rule=True)


def test_layerwise_gives_each_layer_the_same_budget():
    problem = random_problem([16, 0, 16, 16], spread=1)
    problem.costs[:16] *= 1e6
    allocation = allocate(problem, Budget("bits", 1.5), "layerwise")
    assert allocation.layer_bits == (1.5, 0, 1.5, 1.5)
    assert allocation.predicted_cost > allocate(problem, Budget("bits", 1.5)).predicted_cost


def test_matrices_get_widths_of_their_own():
    """Only by the global program, at no higher cost than by expert. All other methods keep experts whole."""
    problem = matrix_problem([8, 0, 8])
    by_expert = problem.per_expert()
    assert len(by_expert.weights) == 16
    np.testing.assert_allclose(by_expert.costs[3], problem.costs[6] + problem.costs[7])
    for budget in (Budget("bits", 1.5), Budget("stored_bits", 2.5), Budget("bytes", 130_000)):
        allocation = allocate(problem, budget)
        used, limit = amount(problem, budget, allocation)
        assert used <= limit
        assert any(gate_up != down for row in allocation.by_layer for gate_up, down in row)
        assert allocation.predicted_cost < allocate(by_expert, budget).predicted_cost
        for method in ("uniform", "random", "layerwise", "frequency"):
            matrix_allocation, expert_allocation = (allocate(p, budget, method) for p in (problem, by_expert))
            assert matrix_allocation.by_layer == expert_allocation.by_layer
            assert matrix_allocation.stored_bytes == expert_allocation.stored_bytes
            assert (matrix_allocation.nominal_bits, matrix_allocation.layer_bits) == (
                expert_allocation.nominal_bits,
                expert_allocation.layer_bits,
            )


def test_frequency_prefers_frequent_experts():
    problem = random_problem([8, 8])
    allocation = allocate(problem, Budget("bits", 1.5), "frequency")
    for rows in problem.by_layer:
        widths = allocation.widths[rows]
        ranked = [widths[i] for i in np.argsort(problem.counts[rows])]
        assert ranked == sorted(ranked)
    problem.counts[:8] *= 1000  # shares within a layer count, not tokens
    assert allocate(problem, Budget("bits", 1.5), "frequency").widths == allocation.widths


def test_uniform():
    problem = random_problem([8, 0, 8], LADDER)
    assert set(allocate(problem, Budget("bits", 2), "uniform").widths) == {2}
    assert set(allocate(problem, Budget("stored_bits", 2.125), "uniform").widths) == {2}
    assert set(allocate(problem, Budget("bits", 1.625), "uniform").widths) == {1.6}
    mixed = allocate(problem, Budget("bits", 2.5), "uniform")
    assert [sorted(row) for row in mixed.by_layer] == [[(2, 2)] * 4 + [(3, 3)] * 4, [], [(2, 2)] * 4 + [(3, 3)] * 4]
    assert mixed == allocate(problem, Budget("bits", 2.5), "uniform")
    assert mixed.widths != allocate(problem, Budget("bits", 2.5), "uniform", seed=1).widths
    only_ternary_below = random_problem([8], (1.6, 2, 3))
    assert set(allocate(only_ternary_below, Budget("bits", 1.9), "uniform").widths) == {1.6, 2}


def test_random():
    problem = random_problem([9, 0, 9, 12], LADDER)
    shares = {1.5: {1: 15, 2: 15}, 2.0: {1: 10, 2: 10, 3: 10}, 2.5: {2: 15, 3: 15}, 1.625: {1.6: 30}}
    for bits, expected in shares.items():
        allocation = allocate(problem, Budget("bits", bits), "random")
        assert {w: allocation.widths.count(w) for w in sorted(set(allocation.widths))} == expected
        assert allocation.nominal_bits == bits
    third = allocate(problem, Budget("stored_bits", 2.125), "random")
    assert third.widths == allocate(problem, Budget("bits", 2), "random").widths
    assert third.widths != allocate(problem, Budget("bits", 2), "random", seed=1).widths
    assert len({tuple(sorted(row)) for row in third.by_layer}) > 2  # over the model, not within layers


@pytest.mark.parametrize("method", METHODS)
def test_no_method_exceeds_a_budget(method):
    """Experts of different sizes: random and uniform are fair baselines at equal bytes."""
    problem = random_problem([40, 0, 56], (1, 1.6, 2, 3, 4), shapes=[(64, 256), (40, 128), (24, 384)])
    total = int(problem.bytes[:, 2].sum())
    budgets = [Budget("bits", b) for b in (1.3, 2, 2.1, 3)]
    budgets += [Budget("stored_bits", 2.3), Budget("stored_bits", 3.25), Budget("bytes", total)]
    for budget in budgets:
        used, limit = amount(problem, budget, allocate(problem, budget, method))
        assert 0.97 * limit < used <= limit


def test_figures():
    problem = random_problem([2, 2], LADDER)
    allocation = allocate(problem, Budget("bits", 1.625), "uniform")
    assert allocation.nominal_bits == 1.625
    assert allocation.stored_bytes == 4 * Width.TERNARY.matrix_bytes(64, 256, 128)
    assert allocation.stored_bits == allocation.stored_bytes * 8 / (4 * 64 * 256)
    assert allocation.predicted_cost == pytest.approx(problem.costs[:, 1].sum())


@pytest.mark.parametrize("rule", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["bits", "stored_bits", "bytes"])
def test_errors_of_infeasible_budgets_name_a_feasible_one(kind, method, rule):
    problem = random_problem([5, 0, 3], shapes=[(64, 256), (40, 128)], seed=3)
    smallest = smallest_budget(problem, kind, method, layer_rule=rule and method not in ("uniform", "random"))
    allocate(problem, smallest, method, layer_rule=rule)
    with pytest.raises(UserError, match="give at least") as caught:
        allocate(problem, Budget(kind, smallest.value * 0.99), method, layer_rule=rule)
    assert str(smallest) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("costs", [np.zeros((8, 2)), np.full((8, 3), -1.0), np.full((8, 3), np.nan)])
def test_costs_that_cannot_be_used_are_rejected(costs):
    with pytest.raises(UserError, match=r"^costs .*: give "):
        dataclasses.replace(random_problem([4, 4]), costs=costs)


def test_other_mistakes():
    problem = random_problem([4])
    with pytest.raises(UserError, match="has 4 bits: give at most 3"):
        allocate(problem, Budget("bits", 4))
    with pytest.raises(UserError, match="no allocation method 'best'"):
        allocate(problem, Budget("bits", 2), "best")
    with pytest.raises(UserError, match="positive number"):
        Budget("bits", float("nan"))


def test_json_round_trip():
    problem = random_problem([3, 0, 2, 0], LADDER)
    for budget in (Budget("bits", 2.0), Budget("bytes", 20_000)):
        allocation = allocate(problem, budget)
        text = allocation.to_json()
        assert Allocation.from_json(text, problem) == allocation
        assert json.loads(text)["widths"] == plain_widths(allocation.by_layer)
    assert allocate(problem, Budget("bits", 1.625), "uniform").to_json() == (
        '{\n  "budget": {"bits": 1.625},\n  "method": "uniform",\n'
        '  "widths": [\n    [1.6, 1.6, 1.6],\n    [],\n    [1.6, 1.6],\n    []\n  ]\n}\n'
    )
    apart = matrix_problem([3, 0, 2])
    allocation = allocate(apart, Budget("bits", 2.0))
    assert len(set(allocation.by_layer[0])) > 1
    assert Allocation.from_json(allocation.to_json(), apart) == allocation
    read = Allocation.from_json('{"widths": [[1, [2, 3], 2], [], [[1, 1], 3]]}', apart)
    assert read.by_layer == [[(1, 1), (2, 3), (2, 2)], [], [(1, 1), (3, 3)]]
    assert plain_widths(read.by_layer) == [[1, [2, 3], 2], [], [1, 3]]
    edited = Allocation.from_json('{"widths": [[1, 2, 3], [], [1, 1.6], []]}', problem)
    assert (edited.widths, edited.method, edited.budget) == ((1, 2, 3, 1, 1.6), "file", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a.json is not valid JSON"),
        ("[]", 'a.json has no list "widths"'),
        ('{"widths": 2}', 'a.json has no list "widths"'),
        ('{"widths": [], "bits": 2}', "unknown key 'bits'"),
        ('{"widths": [[1, 2]]}', "a.json has 1 layers, the model 2"),
        ('{"widths": [[1, 2, 3], []]}', "layer 0 has 2 experts, not 3 widths"),
        ('{"widths": [[1, 2], [2]]}', "layer 1 has 0 experts, not 1 widths"),
        ('{"widths": [2, []]}', "layer 0 has 2 experts, not 2: "),
        ('{"widths": [[1, 4], []]}', "layer 0, expert 1 cannot have width 4: choose from 1, 2, 3"),
        ('{"widths": [[5, 1], []]}', "layer 0, expert 0 cannot have width 5"),
        ('{"widths": [[null, 1], []]}', "layer 0, expert 0 cannot have width None"),
        ('{"widths": [[1, 2], []], "budget": 2}', "budget cannot be 2"),
        ('{"widths": [[1, 2], []], "budget": {"bit": 2}}', "budget cannot be"),
    ],
)
def test_bad_files(text, message):
    with pytest.raises(UserError) as caught:
        Allocation.from_json(text, random_problem([2, 0]), origin="a.json")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
