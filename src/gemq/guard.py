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
import torch
from scipy.special import stdtr
from torch import Tensor

from gemq.allocate import Allocation, Budget, Problem, allocate
from gemq.calibrate import Activations
from gemq.data.selfgen import OF_THE_SOURCE, Plan, added_to
from gemq.data.sources import SELF, held_out_windows
from gemq.data.windows import Windows
from gemq.divergence import windows_kl
from gemq.job import GUARD_WINDOWS_STAGE, Job, Writer
from gemq.knapsack import Floats, Ints, take
from gemq.ladder import LayerLadder
from gemq.models.stream import Replay
from gemq.progress import Tick
from gemq.quant.widths import ExpertWidths, Width
from gemq.recipe import Recipe
from gemq.records import digest
from gemq.refine import assemble_layer, layer_overrides
from gemq.stages import load_ladder
from gemq.workdir import Stage

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


# Judging: pure functions


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


# Measuring


@torch.no_grad()
def candidates_kl(
    replay: Replay,
    start: Activations,
    ladders: Callable[[int], LayerLadder],
    candidates: Sequence[list[list[ExpertWidths]]],
    dense_bits: int,
    group_size: int,
    tick: Tick,
) -> list[Tensor]:
    """Each candidate's KL per window, float64 [N] in the windows' stored order: all candidates, a layer at a time.

    start:      the windows in front of the first layer
    ladders:    gives a layer's ladder
    candidates: widths by layer and expert
    """
    layers = replay.structure.layers
    exact, states = start.hidden.copy(), [start.hidden.copy() for _ in candidates]
    for i in replay.walk(range(len(layers))):
        start.advance_all(replay, i, [exact])
        ladder = ladders(i)
        for state, by_layer in zip(states, candidates, strict=True):
            picked = assemble_layer(ladder, layers[i], by_layer[i])
            own = layer_overrides(replay.model, layers[i], picked, by_layer[i], dense_bits, group_size)
            start.advance_all(replay, i, [state], own)
        tick()
    return windows_kl(replay, start, exact, states)


# In a job


def run_guard(
    job: Job,
    replay: Replay,
    ladder: Stage,
    problem: Problem,
    budget: Budget,
    chosen: Allocation,
    leave_out: Callable[[str], Problem],
) -> tuple[Allocation, dict[str, Any]]:
    """Judges ``chosen``. Returns the allocation to write and the verdict, which is also in the work directory.

    Each candidate's KL is kept, so that a job that goes on measures none twice. ``replay`` must hold the
    full-precision weights; they are left as they are. ``leave_out`` gives the problem without a source's scores.
    """
    recipe = job.recipe
    windows = draw_guard_windows(job, replay)
    stage = job.work.stage("guard", {**job.ladder_inputs(), "windows": windows.digest()[:16]})
    uniform: dict[tuple[Width, ...], Allocation] = {}
    for seed in range(recipe.seed, recipe.seed + UNIFORM_SEEDS):
        drawn = allocate(problem, budget, "uniform", seed=seed)
        uniform.setdefault(drawn.widths, drawn)  # at an integer width all draws are one

    def solve(softened: Problem) -> Allocation:
        return allocate(softened, budget, recipe.allocate, layer_rule=recipe.layer_rule, seed=recipe.seed)

    def measure(candidates: Sequence[Allocation], only: int | None) -> list[Floats]:
        part = "" if only is None else f"-source{only}"
        files = [f"kl-{digest(c.by_layer)}{part}.safetensors" for c in candidates]
        missing = {f: c.by_layer for f, c in zip(files, candidates, strict=True) if not stage.has(f)}
        if missing:
            with job.monitor.stage("guard", len(replay.structure.layers)) as tick:
                chosen_windows = windows if only is None else windows.of(only)
                start = Activations.start(replay, chosen_windows, recipe.batch_tokens, recipe.seed)
                load = lambda i: load_ladder(job, replay.structure, ladder, i)
                found = candidates_kl(
                    replay, start, load, list(missing.values()), recipe.attention_bits, recipe.group_size, tick
                )
                for file, kl in zip(missing, found, strict=True):
                    stage.save_tensors(file, {"kl": kl})
        return [stage.load_tensors(f)["kl"].numpy() for f in files]

    draws = list(uniform.values())
    # the model's own windows are no text that a user could bring: they stay in
    counts = windows.counts()  # none of a source that calibration has taken whole
    given = [n for n in windows.names if n != SELF and counts[n]] if len(windows.names) > 1 else []
    without = {windows.names.index(name): leave_out(name) for name in given}
    kept, verdict = decide(problem, chosen, draws, solve, measure, windows.source.numpy(), windows.names, without)
    stage.save_json(f"verdict-{digest(chosen.by_layer)}.json", verdict)
    return kept, verdict


def own_plans(recipe: Recipe, windows: Windows) -> list[Plan]:
    """The windows that the model writes for the guard: as its calibration ``windows``, and as those added to them."""
    plans = [Plan(PER_SOURCE, recipe.seed + SEED, OF_THE_SOURCE)] if SELF in recipe.calib else []
    return [*plans, Plan(OWN, recipe.seed + SEED + 1, added_to(windows))]


def draw_guard_windows(job: Job, replay: Replay) -> Windows:
    """The guard's windows, drawn and written once: they are none of calibration's."""
    recipe = job.recipe

    def draw(writer: Writer) -> tuple[Windows, dict[str, int]]:
        windows = held_out_windows(job.streams, seed=recipe.seed, held_out=PER_SOURCE)
        missing = sum(PER_SOURCE - n for name, n in windows.counts().items() if name != SELF)
        for own in job.written_beside or writer.write(*own_plans(recipe, job.windows)):
            windows = windows.extended(SELF, own)
        return windows, {"guard_windows_missing": missing}

    stage = job.work.stage(GUARD_WINDOWS_STAGE, job.guard_inputs())
    return job.windows_stage(stage, "guard windows", OWN, replay, draw)
