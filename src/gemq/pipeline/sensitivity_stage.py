"""Sensitivity: what a layer's experts at one width cost the whole model, measured rather than estimated.

Scores compare the experts of one layer well, and layers with each other less well: they are of first order, and a
change deep in the model is worth less than one at its start that predicts as much. So for every layer and width the KL
to the full-precision model is measured with that layer's experts at that width and all else as it was, on a few
calibration windows, and scores are scaled to sum to it (``allocation.scores.rescaled``).

Shapes: N windows, W widths, S tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from gemq.allocation.divergence import windows_kl
from gemq.allocation.scores import ExpertWeights
from gemq.allocation.sensitivity import measured_tokens, measured_windows
from gemq.calibration.activations import Activations
from gemq.layers.training import expert_overrides
from gemq.models.replay import Replay
from gemq.pipeline.context import Job
from gemq.pipeline.layer_stages import layer_file, rung_weights
from gemq.pipeline.workdir import Stage
from gemq.runtime.activation_store import Batches
from gemq.runtime.progress import Tick


@torch.no_grad()
def layer_kl(
    replay: Replay,
    start: Activations,
    rungs: Callable[[int], Iterable[ExpertWeights]],
    tick: Tick,
) -> dict[int, Tensor]:
    """KL per token, float64 [W, N], by layer with experts: all experts of that layer at one width, all else exact.

    start: the windows in front of the first layer; N is in their stored order
    rungs: a layer's experts at every width
    All measured models advance together, so that each layer is needed once.
    """
    layers = replay.structure.layers
    exact = start.hidden.copy()
    states: dict[int, list[Batches]] = {}
    for i in replay.walk(range(len(layers))):
        experts, running = layers[i].experts, [exact, *(state for changed in states.values() for state in changed)]
        if experts is not None:
            states[i] = []
            for weights in rungs(i):
                states[i].append(exact.copy())
                start.advance_all(replay, i, states[i][-1:], expert_overrides(replay.model, experts, weights))
        start.advance_all(replay, i, running)
        tick()
    found = iter(windows_kl(replay, start, exact, [state for changed in states.values() for state in changed]))
    return {i: torch.stack([next(found) for _ in changed]) for i, changed in states.items()}


def run_sensitivity(job: Job, replay: Replay, ladder: Stage) -> Stage:
    """Every layer's KL at every width, by window: a file per layer with experts, and the windows' sources."""
    stage = job.work.stage("sensitivity", job.sensitivity_inputs())
    moe = [i for i, _ in replay.structure.moe_layers]
    if all(stage.has(layer_file(i)) for i in moe):
        return stage
    windows = measured_windows(job.windows, measured_tokens(job.windows.tokens.numel()))
    with job.monitor.stage("sensitivity", len(replay.structure.layers)) as tick:
        start = Activations.start(replay, windows, job.recipe.batch_tokens, job.recipe.seed)

        def rungs(index: int) -> Iterator[ExpertWeights]:
            experts = replay.structure.layers[index].experts
            assert experts is not None
            return (rung_weights(job, replay, ladder, index, experts, w) for w in job.recipe.ladder_widths)

        for i, kl in layer_kl(replay, start, rungs, tick).items():
            if not stage.has(layer_file(i)):
                stage.save_tensors(layer_file(i), {"kl": kl, "source": windows.source})
    return stage
