"""The guard's stage: windows that the allocation has not seen, the KL of each allocation on them, and the verdict.

``allocation.guard`` describes how a verdict is reached. Shapes: N windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gemq.allocation.divergence import windows_kl
from gemq.allocation.guard import GENERATED_WINDOWS, NUM_UNIFORM_DRAWS, SEED_OFFSET, WINDOWS_PER_SOURCE, decide
from gemq.allocation.knapsack import Floats
from gemq.allocation.problem import Allocation, Budget, Problem, allocate
from gemq.calibration.activations import Activations
from gemq.calibration.self_generation import SELF_SOURCE_OPENINGS, WindowPlan, added_window_openings
from gemq.calibration.sources import SELF, held_out_windows
from gemq.calibration.windows import Windows
from gemq.layers.candidates import LayerCandidates
from gemq.layers.reconstruction import assemble_layer, layer_overrides
from gemq.layers.scheme import QuantizationScheme
from gemq.models.replay import Replay
from gemq.pipeline.allocation_stage import solve
from gemq.pipeline.candidates_stage import CandidateFiles
from gemq.pipeline.context import Job
from gemq.pipeline.records import digest
from gemq.pipeline.stage_settings import guard_inputs, guard_window_inputs
from gemq.pipeline.windows_stage import GUARD_WINDOWS_STAGE, Calibration, WindowWriter, draw_once
from gemq.pipeline.workdir import Stage
from gemq.planning.cost_model import Work, Workload
from gemq.quant.widths import AnyWidth, ExpertWidths, Width
from gemq.recipe import Recipe
from gemq.runtime.progress import Tick

GUARD, GUARD_WINDOWS = "guard", "guard windows"
"""Names of the two stages in progress bars and in the summary."""

EXPECTED_TRIES = 3
"""Allocations that the guard is expected to judge: the one that scores give, and softer ones."""


@torch.no_grad()
def allocations_kl(
    replay: Replay,
    start: Activations,
    candidates: Callable[[int], LayerCandidates],
    allocations: Sequence[list[list[ExpertWidths]]],
    dense_width: Width | None,
    tick: Tick,
) -> list[Tensor]:
    """Measures the KL of several allocations, assembled from the candidates, all of them layer by layer.

    Args:
        replay: the full-precision model.
        start: the windows in front of the first layer.
        candidates: from the index of a layer, its candidates.
        allocations: widths by layer and expert.
        dense_width: width of the dense linears; None leaves them unquantized.
        tick: called after each layer.

    Returns:
        For each allocation the KL per window: float64 [N] in the windows' stored order.
    """
    layers = replay.structure.layers
    exact = start.hidden.copy()
    states = [start.hidden.copy() for _ in allocations]
    for i in replay.walk(range(len(layers))):
        start.advance_all(replay, i, [exact])
        layer_candidates = candidates(i)
        for state, widths in zip(states, allocations, strict=True):
            quantized = assemble_layer(layer_candidates, layers[i], widths[i])
            scheme = QuantizationScheme(widths[i], dense_width)
            overrides = layer_overrides(replay.model, layers[i], quantized, scheme)
            start.advance_all(replay, i, [state], overrides)
        tick()
    return windows_kl(replay, start, exact, states)


class _Measurements:
    """The KL of allocations on the guard's windows. Kept in the work directory, so that none is measured twice."""

    def __init__(self, job: Job, replay: Replay, candidates: CandidateFiles, windows: Windows, stage: Stage):
        """``windows``: the guard's. ``stage``: where measurements are stored."""
        self._job, self._replay, self._candidates = job, replay, candidates
        self._windows, self._stage = windows, stage

    def measure(self, allocations: Sequence[Allocation], source: int | None) -> list[Floats]:
        """The KL [N] of each allocation on all windows, or on those of the source with this index."""
        suffix = "" if source is None else f"-source{source}"
        files = [f"kl-{digest(allocation.by_layer)}{suffix}.safetensors" for allocation in allocations]
        missing = {}
        for file, allocation in zip(files, allocations, strict=True):
            if not self._stage.has(file):
                missing[file] = allocation.by_layer
        if missing:
            self._measure_missing(missing, source)
        return [self._stage.load_tensors(file)["kl"].numpy() for file in files]

    def _measure_missing(self, widths_by_file: dict[str, list[list[ExpertWidths]]], source: int | None) -> None:
        """Measures allocations and stores the KL of each in its file."""
        job, replay = self._job, self._replay
        windows = self._windows if source is None else self._windows.select_source(source)
        with job.monitor.stage(GUARD, len(replay.structure.layers)) as tick:
            measured = allocations_kl(
                replay,
                job.start_activations(replay, windows),
                self._candidates.layer,
                list(widths_by_file.values()),
                job.recipe.dense_width,
                tick,
            )
            for file, kl in zip(widths_by_file, measured, strict=True):
                self._stage.save_tensors(file, {"kl": kl})


def run_guard(
    job: Job,
    replay: Replay,
    calibration: Calibration,
    candidates: CandidateFiles,
    problem: Problem,
    budget: Budget,
    chosen: Allocation,
    leave_out: Callable[[str], Problem],
) -> tuple[Allocation, dict[str, Any]]:
    """Judges the allocation ``chosen``.

    Args:
        job: the job.
        replay: the full-precision model. Its weights stay as they are.
        calibration: the calibration windows, and the guard's windows that were written along with them.
        candidates: from which allocations are assembled.
        problem: the allocation problem.
        budget: of the allocation.
        chosen: the allocation to judge.
        leave_out: from the name of a calibration source, the problem without that source's scores.

    Returns:
        The allocation to write, and the verdict, which is also in the work directory.
    """
    recipe = job.recipe
    windows = run_guard_windows(job, replay, calibration)
    stage = job.work.stage(GUARD, guard_inputs(job, calibration.windows, windows))
    measurements = _Measurements(job, replay, candidates, windows, stage)
    problems_without = {windows.names.index(name): leave_out(name) for name in _sources_to_leave_out(windows)}
    allocation, verdict = decide(
        problem,
        chosen,
        _uniform_allocations(problem, budget, recipe),
        lambda softened: solve(softened, budget, recipe),
        measurements.measure,
        windows.source.numpy(),
        windows.names,
        problems_without,
    )
    stage.save_json(f"verdict-{digest(chosen.by_layer)}.json", verdict)
    return allocation, verdict


def _uniform_allocations(problem: Problem, budget: Budget, recipe: Recipe) -> list[Allocation]:
    """Uniform allocations of some seeds, without duplicates: at the bits of a candidate width all draws are equal."""
    uniform: dict[tuple[AnyWidth, ...], Allocation] = {}
    for seed in range(recipe.seed, recipe.seed + NUM_UNIFORM_DRAWS):
        allocation = allocate(problem, budget, "uniform", seed=seed)
        uniform.setdefault(allocation.widths, allocation)
    return list(uniform.values())


def _sources_to_leave_out(windows: Windows) -> list[str]:
    """The texts that the guard leaves out in turn.

    Windows that the model wrote stay in: they are not a text that a user could bring. Neither does a text without
    guard windows count, all of whose windows calibration has taken.
    """
    if len(windows.names) == 1:
        return []
    counts = windows.counts()
    return [name for name in windows.names if name != SELF and counts[name]]


def guard_plans(recipe: Recipe, windows: Windows) -> list[WindowPlan]:
    """The windows that the model writes for the guard.

    They open like the windows of the source ``self``, if it is one of the sources, and like those that the effort adds
    to the calibration ``windows``.
    """
    plans = []
    if SELF in recipe.calibration:
        plans.append(WindowPlan(WINDOWS_PER_SOURCE, recipe.seed + SEED_OFFSET, SELF_SOURCE_OPENINGS))
    plans.append(WindowPlan(GENERATED_WINDOWS, recipe.seed + SEED_OFFSET + 1, added_window_openings(windows)))
    return plans


def run_guard_windows(job: Job, replay: Replay, calibration: Calibration) -> Windows:
    """Draws and generates the guard's windows. Calibration has none of them."""
    recipe = job.recipe

    def draw(writer: WindowWriter) -> tuple[Windows, dict[str, int]]:
        windows = held_out_windows(job.streams, seed=recipe.seed, per_source=WINDOWS_PER_SOURCE)
        counts = windows.counts()
        missing = sum(WINDOWS_PER_SOURCE - count for name, count in counts.items() if name != SELF)
        written = calibration.guard_tokens or writer.write(*guard_plans(recipe, calibration.windows))
        for tokens in written:
            windows = windows.extended(SELF, tokens)
        return windows, {"guard_windows_missing": missing}

    stage = job.work.stage(GUARD_WINDOWS_STAGE, guard_window_inputs(job, calibration.windows))
    return draw_once(job, replay, stage, GUARD_WINDOWS, GENERATED_WINDOWS, draw)


def guard_work(workload: Workload) -> Work:
    """Work of the stage: windows run exactly, with uniform allocations, and twice with every softer allocation.

    The second time, each source's windows run with the allocation that leaves that source out.
    """
    recipe = workload.recipe
    texts = [name for name in recipe.calibration if name != SELF]
    windows = WINDOWS_PER_SOURCE * len(recipe.calibration) + GENERATED_WINDOWS
    runs = windows * (2 + NUM_UNIFORM_DRAWS + EXPECTED_TRIES - 1) + EXPECTED_TRIES * WINDOWS_PER_SOURCE * len(texts)
    tokens = runs * workload.seq_len
    work = workload.head(tokens)
    for layer in workload.structure.layers:
        work += workload.forward(layer, tokens)
    return work
