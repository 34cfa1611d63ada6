"""The guard's stage: windows that nothing was chosen on, the KL of each candidate on them, and the verdict.

See ``allocation.guard`` for how a verdict is reached.

Shapes: N windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gemq.allocation.divergence import windows_kl
from gemq.allocation.guard import OWN, PER_SOURCE, SEED, UNIFORM_SEEDS, decide
from gemq.allocation.knapsack import Floats
from gemq.allocation.problem import Allocation, Budget, Problem, allocate
from gemq.calibration.activations import Activations
from gemq.calibration.self_generation import OF_THE_SOURCE, Plan, added_to
from gemq.calibration.sources import SELF, held_out_windows
from gemq.calibration.windows import Windows
from gemq.layers.candidates import LayerLadder
from gemq.layers.refinement import assemble_layer, layer_overrides
from gemq.layers.scheme import QuantizationScheme
from gemq.models.replay import Replay
from gemq.pipeline.context import GUARD_WINDOWS_STAGE, Job, Writer
from gemq.pipeline.layer_stages import load_ladder
from gemq.pipeline.records import digest
from gemq.pipeline.workdir import Stage
from gemq.quant.widths import ExpertWidths, Width
from gemq.recipe import Recipe
from gemq.runtime.progress import Tick


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
            scheme = QuantizationScheme(by_layer[i], dense_bits, group_size)
            own = layer_overrides(replay.model, layers[i], picked, scheme)
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
