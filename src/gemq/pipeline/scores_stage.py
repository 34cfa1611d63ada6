"""Scores: what each width costs each expert, from one reverse pass over the layers.

``allocation.scores`` computes the scores of a layer and passes gradients through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gemq.allocation.scores import LayerScores, loss_gradients, pair_costs, reverse_layer
from gemq.calibration.activations import Activations
from gemq.calibration.windows import Windows
from gemq.models.experts import ExpertsCall
from gemq.models.replay import Replay
from gemq.models.structure import Experts, Structure
from gemq.pipeline.candidates_stage import CandidateFiles
from gemq.pipeline.context import Job
from gemq.pipeline.records import digest
from gemq.pipeline.stage_settings import score_inputs
from gemq.pipeline.workdir import Stage, layer_file
from gemq.planning.cost_model import Work, Workload
from gemq.planning.memory_model import LayerMemory, ModelMemory
from gemq.recipe import Recipe
from gemq.runtime.activation_store import ActivationStore
from gemq.runtime.integers import ceil_div
from gemq.runtime.progress import Tick

SCORES = "scores"
"""Name of the stage: of its directories, and in progress bars and the summary."""

MOMENT_BYTES = 8 + 4
"""Bytes of a number of a layer's moments of gradients: the sum in float64, and that of a micro-batch in float32."""

LayerGradients = Iterator[tuple[int, ExpertsCall | None, Tensor | None]]
"""Micro-batches of a layer: the number, the call of the experts, and the gradient [T, H] at their output."""


def gradient_bytes(structure: Structure) -> int:
    """Bytes of the moments of gradients of all layers."""
    return sum(4 * layer.experts.matrices[1].rows ** 2 for _, layer in structure.moe_layers)


def gradients_file(layer: int) -> str:
    """Name of the file with the moments of gradients at the output of a layer's experts."""
    return f"gradients-{layer:03d}.safetensors"


@dataclass(frozen=True)
class ScoredModel:
    """The model around which scores are computed: its activations, routing and gradients.

    Attributes:
        fingerprint: the inputs that made it; empty for the full-precision model.
        layer_overrides: from the index of a layer, tensors that replace its parameters, by their names in the model.
        tail_overrides: the same for what follows the layers.
    """

    fingerprint: dict[str, Any]
    layer_overrides: Callable[[int], dict[str, Tensor]]
    tail_overrides: dict[str, Tensor]


FULL_PRECISION = ScoredModel({}, lambda index: {}, {})


def run_scores(
    job: Job, replay: Replay, windows: Windows, candidates: CandidateFiles, model: ScoredModel = FULL_PRECISION
) -> Stage:
    """Scores every expert at every width, by calibration source: a file per layer with experts.

    With trellis codes a second file holds the second moment of the gradients at the output of the experts, for
    reconstruction.

    Weight errors are always relative to the full-precision weights of ``replay``, also around another ``model``.
    """
    return _run(job, replay, windows, candidates, model)


def run_gradients(job: Job, replay: Replay, windows: Windows) -> Stage:
    """Computes the moments of gradients alone, for a job whose widths need no scores."""
    return _run(job, replay, windows, None, FULL_PRECISION)


def stage_name(job: Job, windows: Windows, model: ScoredModel = FULL_PRECISION) -> str:
    """Name of the stage's directory."""
    return f"{SCORES}-{digest(_inputs(job, windows, model))[:8]}"


def _inputs(job: Job, windows: Windows, model: ScoredModel) -> dict[str, Any]:
    """What the results depend on."""
    return {**score_inputs(job, windows), "around": model.fingerprint}


def _run(job: Job, replay: Replay, windows: Windows, candidates: CandidateFiles | None, model: ScoredModel) -> Stage:
    """Scores with the candidates; without them, computes moments of gradients alone."""
    stage = job.work.stage(stage_name(job, windows, model), _inputs(job, windows, model))
    with_gradients = job.recipe.has_output_feedback
    missing = set()
    for i, _ in replay.structure.moe_layers:
        has_scores = candidates is None or stage.has(layer_file(i))
        if not has_scores or (with_gradients and not stage.has(gradients_file(i))):
            missing.add(i)
    if not missing:
        return stage
    activations = job.start_activations(replay, windows.subsample(job.recipe.score_tokens))
    reverse_pass = ReversePass(replay, activations, job.recipe, model)
    with job.monitor.stage(SCORES, reverse_pass.steps) as tick:
        for i, micro_batches in reverse_pass.layers(tick):
            experts = replay.structure.layers[i].experts
            if experts is None or i not in missing:
                for _ in micro_batches:  # passes the gradients on
                    pass
                continue
            outputs = experts.matrices[1].rows if with_gradients else 0
            scores = LayerScores(len(windows.names), experts.count, job.device, outputs)
            if candidates is None:
                for _, _, gradient in micro_batches:
                    assert gradient is not None
                    scores.add_gradients(gradient)
            else:
                weights = [candidates.expert_weights(i, width) for width in job.recipe.candidate_widths]
                _score_layer(replay, experts, activations, micro_batches, weights, scores, job.recipe)
                del weights  # not while the next layer's are read
                costs, tokens = scores.total(replay.ranks, activations.total)
                stage.save_tensors(layer_file(i), {"costs": costs, "tokens": tokens})
            if with_gradients:
                stage.save_tensors(gradients_file(i), {"gradients": scores.total_gradients(replay.ranks)})
    return stage


def _score_layer(
    replay: Replay,
    experts: Experts,
    activations: Activations,
    micro_batches: LayerGradients,
    weights: list[tuple[Tensor, Tensor]],
    scores: LayerScores,
    recipe: Recipe,
) -> None:
    """Adds what ``weights`` (all experts at each width) cost a layer to ``scores``."""
    module = replay.model.get_submodule(experts.path)
    for number, call, gradient in micro_batches:
        assert call is not None
        assert gradient is not None
        scores.add_gradients(gradient)
        routed, costs = pair_costs(module, experts, call, gradient, weights, recipe.score_form, recipe.units_per_expert)
        seq_len = activations.ids[number].shape[1]
        token_sources = activations.source[number].repeat_interleave(seq_len)
        scores.add(routed, costs, token_sources)


class ReversePass:
    """A backward pass through the model, one layer at a time, with activation checkpointing.

    Inputs are kept of every k-th layer. When the pass reaches a segment of k layers, the inputs of its other layers are
    computed again.
    """

    def __init__(self, replay: Replay, activations: Activations, recipe: Recipe, model: ScoredModel = FULL_PRECISION):
        """Consumes ``activations``, which must be the inputs of the first layer."""
        self._replay, self._activations, self._recipe, self._model = replay, activations, recipe, model
        self._count = len(replay.structure.layers)
        state_bytes = sum(hidden.numel() * hidden.element_size() for hidden in activations.hidden)
        self._segment = segment_length(self._count, state_bytes, replay.memory.fast_bytes)
        self._order = reverse_order(self._count, self._segment)
        self._inputs: dict[int, ActivationStore] = {}
        """By layer, inputs that are kept for its backward pass."""

    @property
    def steps(self) -> int:
        """Layers to run, forward or backward."""
        return self._count + len(self._order)

    def layers(self, tick: Tick) -> Iterator[tuple[int, LayerGradients]]:
        """Yields each layer from the last to the first, with its micro-batches' calls and gradients.

        The micro-batches of a layer must be exhausted before the next layer: iterating passes the gradients through.

        Args:
            tick: called after each layer that was run.
        """
        self._run_forward(tick)
        gradients = loss_gradients(
            self._replay,
            self._activations,
            self._recipe.score_labels,
            self._recipe.seed,
            self._model.tail_overrides,
        )
        walk = self._replay.walk([i for i, _ in self._order])
        for i, (_, is_backward) in zip(walk, self._order, strict=True):
            overrides = self._model.layer_overrides(i)
            if is_backward:
                self._activations.hidden = self._inputs.pop(i)
                yield i, reverse_layer(self._replay, i, self._activations, gradients, overrides)
            else:
                self._recompute_next_inputs(i, overrides)
            tick()

    def _run_forward(self, tick: Tick) -> None:
        """Runs all layers, and keeps the inputs of every k-th one, and of all layers of the last segment."""
        last_segment = (self._count - 1) // self._segment * self._segment
        for i in self._replay.walk(range(self._count)):
            if i % self._segment == 0 or i > last_segment:
                self._inputs[i] = self._activations.hidden.copy()
            self._activations.advance(self._replay, i, self._model.layer_overrides(i))
            tick()

    def _recompute_next_inputs(self, index: int, overrides: dict[str, Tensor]) -> None:
        """Computes the inputs of the layer after ``index`` again."""
        if index % self._segment == 0:
            self._activations.hidden = self._inputs[index].copy()
        self._activations.advance(self._replay, index, overrides)
        self._inputs[index + 1] = self._activations.hidden.copy()


def segment_length(layers: int, state_bytes: int, available_bytes: int) -> int:
    """The number of layers of a segment: only the inputs of a segment's first layer are kept for the reverse pass.

    The smallest that fits, since a longer segment computes more layers again. If none fits, the one that keeps
    the fewest inputs.

    Args:
        layers: of the model.
        state_bytes: inputs of one layer.
        available_bytes: for all inputs that are kept.
    """

    def kept_states(length: int) -> int:
        """Most states at the same time: the segments' inputs, one segment's layers, the current one, the gradients."""
        segments = ceil_div(layers, length)
        return segments + (length - 1) + 2

    for length in range(1, layers + 1):
        if kept_states(length) * state_bytes <= available_bytes:
            return length
    return min(range(1, layers + 1), key=kept_states)


def reverse_order(layers: int, segment: int) -> list[tuple[int, bool]]:
    """The reverse pass as (layer, is backward), segment by segment from the last.

    All layers of a segment but its last run forward again, then all of them backward. The inputs of the last segment
    are kept by the forward pass.
    """
    order: list[tuple[int, bool]] = []
    for start in reversed(range(0, layers, segment)):
        stop = min(start + segment, layers)
        if stop < layers:
            order += [(i, False) for i in range(start, stop - 1)]
        order += [(i, True) for i in reversed(range(start, stop))]
    return order


# Costs


def scores_work(workload: Workload, with_costs: bool = True) -> Work:
    """Work of the stage: forward, forward again, backward, and every routed pair exactly and at each width.

    ``with_costs``: False: of ``run_gradients``.
    """
    tokens = min(workload.tokens, workload.recipe.score_tokens or workload.tokens)
    batches = tokens / workload.micro_batch_tokens
    work = workload.head(tokens) * 3  # forward, backward, and drawing labels
    for layer in workload.structure.layers:
        work += workload.forward(layer, tokens) + workload.forward(layer, tokens, batches) * 2
        if with_costs:
            work += workload.experts(layer, tokens, batches) * (1 + workload.widths)
    return work


def scores_peak_bytes(model: ModelMemory) -> int:
    """Most device memory that the stage computes with."""
    return max(model.loss(float32_bytes=12, copies=3), model.largest_layer(_layer_bytes))


def _layer_bytes(memory: LayerMemory) -> int:
    """Bytes for the scores of one layer: its candidates dequantized, and a micro-batch's pairs."""
    if memory.layer.experts is None:
        return 0
    weights = len(memory.recipe.candidate_widths) * memory.expert_weights * memory.dtype.itemsize
    pairs = max(memory.routed_pairs(backward=True), memory.forward_pairs)
    moments = 0
    if memory.recipe.has_output_feedback:
        moments = MOMENT_BYTES * memory.experts.matrices[1].rows ** 2
    return weights + moments + max(pairs, 3 * memory.largest_matrices)
