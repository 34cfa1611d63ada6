"""Sensitivity: what a layer's experts at one width cost the whole model, measured rather than estimated.

Scores compare the experts of one layer well, but layers with each other less well: they are first-order estimates, and
a change deep in the model matters less than an early one with the same estimate. So the KL to the full-precision model
is measured for every layer and width, with that layer's experts at that width and everything else exact, on a few
calibration windows. Scores are scaled to sum to it (``allocation.scores.rescale_to_kl``).

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
from gemq.calibration.windows import Windows
from gemq.layers.training import expert_overrides
from gemq.models.replay import Replay
from gemq.pipeline.candidates_stage import CandidateFiles
from gemq.pipeline.context import Job
from gemq.pipeline.stage_settings import sensitivity_inputs
from gemq.pipeline.workdir import Stage, layer_file
from gemq.planning.cost_model import Work, Workload
from gemq.runtime.activation_store import ActivationStore
from gemq.runtime.progress import Tick

SENSITIVITY = "sensitivity"
"""Name of the stage: of its directory, and in progress bars and the summary."""


@torch.no_grad()
def layer_kl(
    replay: Replay,
    start: Activations,
    expert_weights: Callable[[int], Iterable[ExpertWeights]],
    tick: Tick,
) -> dict[int, Tensor]:
    """Measures the KL of the model with all experts of one layer at one width, everything else exact.

    All measured models advance side by side, so that each layer is loaded once.

    Args:
        replay: the full-precision model.
        start: the windows in front of the first layer.
        expert_weights: from the index of a layer, its experts' weights at every width.
        tick: called after each layer.

    Returns:
        By layer with experts, the KL per token: float64 [W, N], N in the windows' stored order.
    """
    layers = replay.structure.layers
    exact = start.hidden.copy()
    states_by_layer: dict[int, list[ActivationStore]] = {}
    for i in replay.walk(range(len(layers))):
        states = _all_states(states_by_layer)
        experts = layers[i].experts
        if experts is not None:
            states_by_layer[i] = []
            for weights in expert_weights(i):
                state = exact.copy()
                start.advance_all(replay, i, [state], expert_overrides(replay.model, experts, weights))
                states_by_layer[i].append(state)
        start.advance_all(replay, i, [exact, *states])
        tick()
    measured = iter(windows_kl(replay, start, exact, _all_states(states_by_layer)))
    kl_by_layer = {}
    for i, states in states_by_layer.items():
        kl_by_layer[i] = torch.stack([next(measured) for _ in states])
    return kl_by_layer


def _all_states(states_by_layer: dict[int, list[ActivationStore]]) -> list[ActivationStore]:
    """The hidden states of all measured models, in the order of their layers."""
    return [state for states in states_by_layer.values() for state in states]


def run_sensitivity(job: Job, replay: Replay, windows: Windows, candidates: CandidateFiles) -> Stage:
    """Measures every layer at every width: a file per layer with experts, and the windows' sources."""
    stage = job.work.stage(SENSITIVITY, sensitivity_inputs(job, windows))
    moe_layers = [i for i, _ in replay.structure.moe_layers]
    if all(stage.has(layer_file(i)) for i in moe_layers):
        return stage
    measured = measured_windows(windows, measured_tokens(windows.tokens.numel()))

    def expert_weights(index: int) -> Iterator[ExpertWeights]:
        return (candidates.expert_weights(index, width) for width in job.recipe.candidate_widths)

    with job.monitor.stage(SENSITIVITY, len(replay.structure.layers)) as tick:
        start = job.start_activations(replay, measured)
        for i, kl in layer_kl(replay, start, expert_weights, tick).items():
            if not stage.has(layer_file(i)):
                stage.save_tensors(layer_file(i), {"kl": kl, "source": measured.source})
    return stage


def sensitivity_work(workload: Workload) -> Work:
    """Work of the stage: each layer at each width makes a model, which runs from that layer to the end."""
    tokens = measured_tokens(workload.tokens)
    work, models = Work(), 1
    for layer in workload.structure.layers:
        if layer.experts is not None:
            models += workload.widths
        work += workload.forward(layer, tokens) * models
    return work + workload.head(tokens) * models
