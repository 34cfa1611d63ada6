"""The size curve's uniform line and its files."""

from __future__ import annotations

import csv
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from gemq.allocation.problem import Budget, Problem, allocate
from gemq.cli.tables import print_curve
from gemq.pipeline.size_curve import Curve, CurvePoint, uniform_cost, write_curve

POINTS = (
    CurvePoint(1.0, 1.0, 1.125, 100, 200, 4.0, 8.0),
    CurvePoint(2.0, 2.0, 2.125, 200, 300, 1.0, 2.0),
)
CURVE = Curve("model", "global", 1000, POINTS)


def problem(costs: list[list[float]]) -> Problem:
    widths = (1, 1.6, 2, 3)
    layer = np.zeros(len(costs), np.int64)
    return Problem(
        widths, layer, np.array(costs), np.full(len(costs), 64), np.ones((len(costs), 4), np.int64), layer.copy()
    )


def test_uniform_mixes_the_candidate_widths_around_a_budget():
    p = problem([[10.0, 5.0, 4.0, 1.0], [20.0, 11.0, 8.0, 3.0]])
    assert uniform_cost(p, 1) == 30
    assert uniform_cost(p, 1.625) == 16
    assert uniform_cost(p, 1.75) == pytest.approx(16 - 4 / 3)  # a third of the way from 1.625 to 2
    assert uniform_cost(p, 2) == 12
    assert uniform_cost(p, 3) == 4


def test_uniform_never_gets_worse_with_the_budget():
    """Not even where training made a width worse than the one before it."""
    p = problem([[10.0, 12.0, 4.0, 5.0]])
    costs = [uniform_cost(p, bits) for bits in np.arange(1, 3.01, 0.0625)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 4


def test_an_allocation_by_scores_is_no_worse_than_uniform():
    costs = np.random.default_rng(0).uniform(0.5, 8, (64, 1)) * 4.0 ** -np.array([1, 1.625, 2, 3])
    p = problem(costs.tolist())
    for bits in np.arange(1, 3.01, 0.125):
        assert allocate(p, Budget("bits", float(bits)), "global").predicted_cost <= uniform_cost(p, bits) * 1.0001


def test_figure_and_table_show_the_same_numbers(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    print_curve(console, CURVE, write_curve(CURVE, tmp_path))
    rows = [line.split("│")[5:7] for line in console.file.getvalue().splitlines() if line.startswith("│")]
    table = [[float(cell) for cell in row] for row in rows]
    assert table == [[0.5, 1.0], [0.125, 0.25]]
    figure = (tmp_path / "curve.svg").read_text()
    drawn = re.findall(r"data-tip='.*?cost ([\d.]+), uniform widths ([\d.]+)'", figure)
    assert [[float(number) for number in point] for point in drawn] == table
    assert ElementTree.fromstring(figure).tag.endswith("svg")
    written = list(csv.DictReader((tmp_path / "curve.csv").open()))
    assert [float(row["uniform_cost"]) for row in written] == [8.0, 2.0]
