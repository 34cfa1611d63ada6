"""The guard: is an allocation better than uniform widths of the same budget, on windows that it was not chosen on?

Scores overestimate the benefit, above all on text unlike the calibration text. So the allocation and uniform widths,
both assembled from the candidates, are compared by their KL to the full-precision model. The windows are held-out ones
of each source and new ones that the model writes. Since users' texts are none of the sources, each source is also left
out in turn: scores without it allocate again, and its windows judge the result. An allocation that fails either test
moves towards its layers' mean costs (``soften``) until it passes. If none passes, uniform widths are used.

Must not deal with reconstruction or checkpoints.

Shapes: N windows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtr

from gemq.allocation.knapsack import Floats, Ints, select
from gemq.allocation.problem import Allocation, Problem

WINDOWS_PER_SOURCE = 8
"""Held-out windows of each calibration source."""
GENERATED_WINDOWS = 16
"""Windows that the model writes for the guard alone."""
SEED_OFFSET = 1 << 20
"""Added to the recipe's seed: calibration's windows use that seed and the next one."""
SOFTENING = (0.25, 0.5, 0.75, 1.0)
"""Values of ``m`` in ``soften`` that are tried in order."""
NUM_UNIFORM_DRAWS = 3
"""Draws of uniform widths between two widths, whose mean is judged: it depends on which experts get the wider one."""
MAX_KL_RATIO = 1.03
"""A source counts as worse than uniform above this ratio of their KLs, and only if the difference is significant."""
SIGNIFICANCE_LEVEL = 0.05


def judge(allocated: Floats, uniform: Floats, source: Ints, names: Sequence[str]) -> dict[str, Any]:
    """Compares the KL of an allocation with that of uniform widths on the same windows.

    The allocation fails if its mean over sources, each counted once, is above uniform's, or if a source is worse by
    more than 3 % with p < 0.05. ``p`` is that of a paired one-sided t test over windows: the probability of a
    difference at least as large if the allocation were no worse there. A tie passes, since equal widths are equal
    models.

    Args:
        allocated: KL [N] of the allocation.
        uniform: KL [N] of uniform widths.
        source: [N], indices into ``names``.
        names: of the sources. Those without windows do not count.
    """
    sources: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(names):
        window_kl, uniform_window_kl = allocated[source == index], uniform[source == index]
        if not len(window_kl):
            continue
        kl, uniform_kl = float(window_kl.mean()), float(uniform_window_kl.mean())
        p = paired_p(window_kl - uniform_window_kl)
        sources[name] = {
            "windows": len(window_kl),
            "kl": kl,
            "uniform_kl": uniform_kl,
            "p": p,
            "worse": kl > MAX_KL_RATIO * uniform_kl and p < SIGNIFICANCE_LEVEL,
            "difference": kl - uniform_kl,
        }
    mean = sum(figures["kl"] for figures in sources.values()) / len(sources)
    uniform_mean = sum(figures["uniform_kl"] for figures in sources.values()) / len(sources)
    passed = mean <= uniform_mean and not any(figures["worse"] for figures in sources.values())
    return {"passed": passed, "kl": mean, "uniform_kl": uniform_mean, "sources": sources}


def paired_p(differences: Floats) -> float:
    """One-sided p of Student's t test that the mean of ``differences`` [n] is above zero. 1 if n is below 2."""
    n = len(differences)
    if n < 2:
        return 1.0
    standard_error = differences.std(ddof=1) / math.sqrt(n)
    if standard_error == 0:
        return 0.0 if differences[0] > 0 else 1.0
    return float(stdtr(n - 1, -differences.mean() / standard_error))


def soften(problem: Problem, m: float) -> Problem:
    """Moves costs towards their layer's mean at each width: ``c' = (1 - m) c + m mean``. At 1, all experts are equal.

    Each matrix of an expert has its own mean.
    """
    costs = problem.costs.copy()
    num_widths = costs.shape[1]
    for rows in problem.by_layer:
        if rows.stop > rows.start:
            layer_costs = costs[rows].reshape(-1, problem.units_per_expert, num_widths)
            softened = (1 - m) * layer_costs + m * layer_costs.mean(axis=0)
            costs[rows] = softened.reshape(-1, num_widths)
    return dataclasses.replace(problem, costs=costs)


def describe(verdict: dict[str, Any]) -> str:
    """The verdict of ``decide`` in one sentence, for the summary."""
    if "skipped" in verdict:
        return f"not run ({verdict['skipped']})"
    windows = sum(figures["windows"] for figures in verdict["sources"].values())
    failures = "; ".join(_describe_failure(trial) for trial in verdict["tried"] if not trial["passed"])
    if verdict["m"] is None:
        return f"uniform widths written, since no allocation was better on {windows} held-out windows ({failures})"
    figures = f"KL {verdict['kl']:.3g} against uniform's {verdict['uniform_kl']:.3g} on {windows} held-out windows"
    if not failures:
        return f"{figures}: kept"
    uniform = ", which is uniform" if verdict["is_uniform"] else ""
    return (
        f"{figures}: kept, with scores drawn {verdict['m']:.0%} towards their layer's mean{uniform}, since with less "
        f"it was worse than uniform ({failures})"
    )


def _describe_failure(trial: dict[str, Any]) -> str:
    """How far a failed trial was softened, and why it failed."""
    softening = "as scored" if trial["m"] == 0 else format(trial["m"], ".0%")
    return f"{softening}: {_reason(trial)}"


def _reason(judgement: dict[str, Any]) -> str:
    """Why a judgement failed, such as ``mean +2.1 %, prose +5.0 %``."""
    if "left_out" in judgement:
        return f"with each source left out in turn, {_reason(judgement['left_out'])}"
    reasons = []
    if judgement["kl"] > judgement["uniform_kl"]:
        reasons.append(("mean", judgement))
    for name, figures in judgement["sources"].items():
        if figures["worse"]:
            reasons.append((name, figures))
    texts = [f"{name} {figures['kl'] / figures['uniform_kl'] - 1:+.1%}" for name, figures in reasons]
    return ", ".join(texts).replace("%", " %")


def decide(
    problem: Problem,
    allocation: Allocation,
    uniform: Sequence[Allocation],
    solve: Callable[[Problem], Allocation],
    measure: Callable[[Sequence[Allocation], int | None], list[Floats]],
    source: Ints,
    names: Sequence[str],
    problems_without: Mapping[int, Problem] | None = None,
) -> tuple[Allocation, dict[str, Any]]:
    """Judges ``allocation``, and softer ones until one passes.

    Args:
        problem: the costs that the allocation was chosen by.
        allocation: the allocation to judge.
        uniform: draws of uniform widths at the same budget.
        solve: allocates at that budget by other costs.
        measure: the KL [N] of several allocations, on all windows or on those of one source, by its index.
        source: [N] int64, indices into ``names``.
        names: of the sources.
        problems_without: by index of a source, the problem with the scores of all other sources. None: no source is
            left out in turn.

    Returns:
        The first allocation that passes, or else ``uniform[0]``, and the verdict.
    """
    problems_without = problems_without or {}

    def left_out_kl(kl: Floats, m: float) -> Floats:
        """The KL [N], in which the windows of each left-out source are judged by the allocation without it."""
        kl = kl.copy()
        for index, problem_without in problems_without.items():
            (kl[source == index],) = measure([solve(soften(problem_without, m))], index)
        return kl

    kl, *uniform_kls = measure([allocation, *uniform], None)
    baseline = np.mean(uniform_kls, axis=0)
    verdict: dict[str, Any] = {"uniform_draws": len(uniform), "tried": []}
    for m in (0.0, *SOFTENING):
        if m:
            allocation = with_unsoftened_cost(solve(soften(problem, m)), problem)
            (kl,) = measure([allocation], None)
        trial = {"m": m, **judge(kl, baseline, source, names)}
        if problems_without and trial["passed"]:
            trial["left_out"] = judge(left_out_kl(kl, m), baseline, source, names)
            trial["passed"] = trial["left_out"]["passed"]
        verdict["tried"].append(trial)
        if trial["passed"]:
            verdict["is_uniform"] = any(allocation.widths == draw.widths for draw in uniform)
            return allocation, {**trial, **verdict}
    fallback = judge(uniform_kls[0], baseline, source, names)
    return uniform[0], {**fallback, "m": None, "passed": False, "is_uniform": True, **verdict}


def with_unsoftened_cost(allocation: Allocation, problem: Problem) -> Allocation:
    """The allocation with the cost that ``problem`` predicts for it, so that predictions can be compared."""
    choice = np.array([problem.widths.index(width) for width in allocation.widths])
    return dataclasses.replace(allocation, predicted_cost=float(select(problem.costs, choice).sum()))
