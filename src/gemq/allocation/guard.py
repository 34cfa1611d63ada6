"""The guard: is the allocation better than uniform widths of the same budget, on windows that chose nothing?

Scores promise more than they keep, above all on text unlike the calibration's. So the allocation and uniform, both
assembled from the ladder, are compared by their KL to the full-precision model: on windows that calibration left of
each source, and on fresh ones that the model writes. And since users' texts are none of the sources, each source is
left out in turn: scores without it allocate again, and its windows judge that. An allocation that fails either way
moves towards its layers' means (``soften``) until it passes; uniform itself is what remains. Knows nothing of refining
or of checkpoints.

Shapes: N windows, B windows in a micro-batch, S tokens, H hidden size, E experts, W widths.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtr

from gemq.allocation.knapsack import Floats, Ints, take
from gemq.allocation.problem import Allocation, Problem

PER_SOURCE = 8
"""Held-out windows of each calibration source."""
OWN = 16
"""Windows that the model writes for the guard alone."""
SEED = 1 << 20
"""Added to the recipe's seed: the guard's windows are none of calibration's, which take the seed and the next."""
SOFTENING = (0.25, 0.5, 0.75, 1.0)
UNIFORM_SEEDS = 3
"""Uniform between two widths depends on which experts get the wider one: the mean of so many draws is judged."""
WORSE = 1.03
"""A source may be worse than uniform by this factor before it counts, and then only if it is significant."""
SIGNIFICANT = 0.05


def judge(allocated: Floats, uniform: Floats, source: Ints, names: Sequence[str]) -> dict[str, Any]:
    """Compares the KL [N] of an allocation with uniform's on the same windows. ``source`` [N] indexes ``names``.

    Fails when the mean over sources, each counted once, is above uniform's, or when a source is worse by more than
    3 % with p < 0.05. ``p`` is that of a paired one-sided t test over windows: the chance of a difference at least
    as large if the allocation were no worse there. A tie passes: equal widths are equal models.
    """
    sources = {}
    for i, name in enumerate(names):
        own, other = allocated[source == i], uniform[source == i]
        if len(own):
            kl, uniform_kl = float(own.mean()), float(other.mean())
            p = paired_p(own - other)
            worse = kl > WORSE * uniform_kl and p < SIGNIFICANT
            sources[name] = {"windows": len(own), "kl": kl, "uniform_kl": uniform_kl, "p": p, "worse": worse}
            sources[name]["difference"] = kl - uniform_kl
    mean, uniform_mean = (sum(s[key] for s in sources.values()) / len(sources) for key in ("kl", "uniform_kl"))
    passed = mean <= uniform_mean and not any(s["worse"] for s in sources.values())
    return {"passed": passed, "kl": mean, "uniform_kl": uniform_mean, "sources": sources}


def paired_p(differences: Floats) -> float:
    """One-sided p of Student's t that the mean of ``differences`` [n] is above zero; 1 where nothing can be said."""
    n = len(differences)
    if n < 2:
        return 1.0
    error = differences.std(ddof=1) / math.sqrt(n)
    if error == 0:
        return 0.0 if differences[0] > 0 else 1.0
    return float(stdtr(n - 1, -differences.mean() / error))


def soften(problem: Problem, m: float) -> Problem:
    """Costs moved towards their layer's mean at each width: ``c' = (1 - m) c + m mean``. At 1, experts are alike.

    Each of an expert's matrices has a mean of its own.
    """
    costs = problem.costs.copy()
    for rows in problem.by_layer:
        if rows.stop > rows.start:
            of_layer = costs[rows].reshape(-1, problem.units, costs.shape[1])
            costs[rows] = ((1 - m) * of_layer + m * of_layer.mean(axis=0)).reshape(-1, costs.shape[1])
    return dataclasses.replace(problem, costs=costs)


def describe(verdict: dict[str, Any]) -> str:
    """The verdict in one sentence, for the summary."""
    if "skipped" in verdict:
        return f"not run ({verdict['skipped']})"
    windows = sum(s["windows"] for s in verdict["sources"].values())
    figures = f"KL {verdict['kl']:.3g} against uniform's {verdict['uniform_kl']:.3g} on {windows} held-out windows"
    failed = "; ".join(
        f"{'as scored' if t['m'] == 0 else format(t['m'], '.0%')}: {_why(t)}"
        for t in verdict["tried"]
        if not t["passed"]
    )
    if verdict["m"] is None:
        return f"uniform widths written, since no allocation was better on {windows} held-out windows ({failed})"
    if failed:
        same = ", which is uniform" if verdict["is_uniform"] else ""
        return (
            f"{figures}: kept, with scores drawn {verdict['m']:.0%} towards their layer's mean{same}, since with less "
            f"it was worse than uniform ({failed})"
        )
    return f"{figures}: kept"


def _why(judged: dict[str, Any]) -> str:
    """``mean +2.1 %, prose +5.0 %``: what made it fail."""
    if "left_out" in judged:
        return f"with each source left out in turn, {_why(judged['left_out'])}"
    reasons = [("mean", judged)] if judged["kl"] > judged["uniform_kl"] else []
    reasons += [(name, s) for name, s in judged["sources"].items() if s["worse"]]
    return ", ".join(f"{name} {x['kl'] / x['uniform_kl'] - 1:+.1%}".replace("%", " %") for name, x in reasons)


def decide(
    problem: Problem,
    chosen: Allocation,
    uniform: Sequence[Allocation],
    solve: Callable[[Problem], Allocation],
    measure: Callable[[Sequence[Allocation], int | None], list[Floats]],
    source: Ints,
    names: Sequence[str],
    without: dict[int, Problem] | None = None,
) -> tuple[Allocation, dict[str, Any]]:
    """The first allocation that passes, from ``chosen`` on through softer ones, else ``uniform[0]``; and the verdict.

    solve:   another allocation at the same budget from softened costs
    measure: the KL [N] of several allocations, on all windows or on those of one source, by its index
    source:  [N] int64, indexes ``names``
    without: the problem with scores of all sources but one, by that one; none: leaving out is skipped
    """
    without = without or {}

    def unseen(own: Floats, m: float) -> Floats:
        """The KL [N] with every left-out source's windows under the allocation that did not know it."""
        kl = own.copy()
        for s, p in without.items():
            (kl[source == s],) = measure([solve(soften(p, m))], s)
        return kl

    own, *others = measure([chosen, *uniform], None)
    baseline = np.mean(others, axis=0)
    verdict: dict[str, Any] = {"uniform_draws": len(uniform), "tried": []}
    for m in (0.0, *SOFTENING):
        if m:
            chosen = solve(soften(problem, m))
            choice = np.array([problem.widths.index(w) for w in chosen.widths])
            # what the unsoftened scores predict, so that predictions compare
            chosen = dataclasses.replace(chosen, predicted_cost=float(take(problem.costs, choice).sum()))
            (own,) = measure([chosen], None)
        judged = {"m": m, **judge(own, baseline, source, names)}
        if without and judged["passed"]:
            judged["left_out"] = judge(unseen(own, m), baseline, source, names)
            judged["passed"] = judged["left_out"]["passed"]
        verdict["tried"].append(judged)
        if judged["passed"]:
            verdict["is_uniform"] = any(chosen.widths == u.widths for u in uniform)
            return chosen, {**judged, **verdict}
    written = judge(others[0], baseline, source, names)
    return uniform[0], {**written, "m": None, "passed": False, "is_uniform": True, **verdict}
