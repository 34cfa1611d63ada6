"""The long stages, layer by layer: every layer is written before the next ends.

A stopped job finds what it has written and only replays the layers to get past it, so a resumed stage gives the same
bytes as an uninterrupted one. What is computed for a layer stands in ``layers.candidates``, ``allocation.scores`` and
``layers.refinement``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gemq.allocation.knapsack import Floats
from gemq.allocation.problem import Allocation, Problem
from gemq.allocation.scores import (
    ExpertWeights,
    LayerScores,
    loss_gradients,
    pair_costs,
    rescaled,
    reverse_layer,
    smooth_usage,
)
from gemq.calibration.activations import Activations
from gemq.layers.candidates import LayerLadder, build_layer
from gemq.layers.refinement import RefinedLayer, assemble_layer
from gemq.models.byte_sizes import ladder_bytes, matrix_sizes
from gemq.models.experts import expert_weight
from gemq.models.replay import Replay
from gemq.models.structure import Experts, Structure
from gemq.pipeline.context import Job
from gemq.pipeline.records import digest
from gemq.pipeline.workdir import Stage
from gemq.quant.gptq import round_to_nearest
from gemq.quant.grid import Quantized, dequantize_each
from gemq.quant.packing import PackedMatrix
from gemq.quant.widths import Width, group_size_for, width_name
from gemq.recipe import Recipe
from gemq.runtime.activation_store import Batches
from gemq.runtime.files import check_free_space
from gemq.runtime.progress import Tick


def run_ladder(job: Job, replay: Replay) -> Stage:
    """Every expert at every width: a file per layer."""
    stage = job.work.stage("ladder", job.ladder_inputs())
    layers = range(len(replay.structure.layers))
    missing = [i for i in layers if not stage.has(layer_file(i))]
    if not missing:
        return stage
    check_free_space(job.work.path, ladder_bytes(replay.structure, job.recipe) * len(missing) // len(layers))
    training = job.training(job.recipe.ladder_epochs, job.recipe.rate_ladder)
    of_linears = job.training(job.recipe.ladder_epochs, job.recipe.rate_codes, tuned=False)
    alone = replay.alone()

    def build(index: int, inputs: Activations, with_outputs: bool) -> tuple[dict[str, Tensor], Batches]:
        widths, bits = job.recipe.ladder_widths, job.recipe.attention_bits
        ladder, outputs = build_layer(
            alone, index, inputs, job.quantizer, widths, bits, training, of_linears, with_outputs
        )
        return ladder.to_tensors(), outputs

    with job.monitor.stage("ladder", missing[-1] + 1) as tick, stage.writing_behind(each=True) as save:
        activations = job.start_activations(replay)
        if replay.ranks.count > 1:
            _ladder_in_turns(replay, missing, activations, build, save, tick)
            return stage
        for i in replay.walk(range(missing[-1] + 1)):
            if i in missing:
                made, activations.hidden = build(i, activations, True)
                save(layer_file(i), made)
                del made  # not beside the next one
            else:
                activations.advance(replay, i)
            tick()
    return stage


def _ladder_in_turns(
    replay: Replay,
    missing: list[int],
    activations: Activations,
    build: Callable[[int, Activations, bool], tuple[dict[str, Tensor], Batches]],
    save: Callable[[str, dict[str, Tensor] | None], None],
    tick: Tick,
) -> None:
    """The ladder's layers by several ranks, each of which builds one of a round as if it were alone.

    Before that they run the round's layers, a rank its own micro-batches, and give each other what each layer receives.
    """
    ranks, start = replay.ranks, 0
    rounds: list[tuple[range, list[int], list[int]]] = []
    for number in range(0, len(missing), ranks.count):
        some = missing[number : number + ranks.count]
        rounds.append((range(start, some[-1] + 1), some, some[ranks.rank :][:1]))
        start = some[-1] + 1
    walk = replay.walk([i for passed, _, own in rounds for i in (*passed, *own)])
    for passed, some, own in rounds:
        inputs: Activations | None = None
        for i in passed:
            next(walk)
            if i in own:
                inputs = activations.to_train(replay)
            elif i in some:
                activations.give(replay)
            if i < missing[-1]:
                activations.advance(replay, i)
        made = None
        if inputs is not None:
            made, _ = build(next(walk), inputs, False)
        save(layer_file(own[0]) if own else "", made)
        for _ in passed:
            tick()


def load_ladder(job: Job, structure: Structure, stage: Stage, index: int, device: str | None = None) -> LayerLadder:
    """A layer of the ladder on ``device``, by default the job's."""
    tensors = stage.load_tensors(layer_file(index), device or str(job.device))
    return LayerLadder.from_tensors(tensors, structure.layers[index], job.recipe.ladder_widths)


@dataclass(frozen=True)
class Around:
    """The quantized model around which scores are computed: its activations, routing and gradients.

    made_from: names it in fingerprints
    layer:     index -> what stands in place of that layer's parameters, by their names inside the model
    tail:      the same for what is behind the layers
    """

    made_from: dict[str, Any]
    layer: Callable[[int], dict[str, Tensor]]
    tail: dict[str, Tensor]


FULL_PRECISION = Around({}, lambda index: {}, {})


def run_scores(job: Job, replay: Replay, ladder: Stage, around: Around = FULL_PRECISION) -> Stage:
    """What each width costs each expert, by calibration source: a file per layer with experts.

    Errors of weights are against the full-precision weights, which ``replay`` holds, whatever the model is scored
    ``around``.
    """
    inputs = {**job.score_inputs(), "around": around.made_from}
    stage = job.work.stage(f"scores-{digest(inputs)[:8]}", inputs)
    recipe, structure = job.recipe, replay.structure
    missing = {i for i, _ in structure.moe_layers if not stage.has(layer_file(i))}
    if not missing:
        return stage
    count = len(structure.layers)
    activations = job.start_activations(replay, job.windows.share(recipe.score_tokens))
    each = sum(h.numel() * h.element_size() for h in activations.hidden)
    segment = segment_length(count, each, replay.memory.quick_bytes)
    passes = reverse_order(count, segment)
    with job.monitor.stage("scores", count + len(passes)) as tick:
        inputs_of: dict[int, Batches] = {}
        last = (count - 1) // segment * segment  # needs no recomputing: its inputs are kept as they come
        for i in replay.walk(range(count)):
            if i % segment == 0 or i > last:
                inputs_of[i] = activations.hidden.copy()
            activations.advance(replay, i, around.layer(i))
            tick()
        gradients = loss_gradients(replay, activations, recipe.score_labels, recipe.seed, around.tail)
        for i, (_, backward) in zip(replay.walk([i for i, _ in passes]), passes, strict=True):
            if not backward:
                if i % segment == 0:
                    activations.hidden = inputs_of[i].copy()
                activations.advance(replay, i, around.layer(i))
                inputs_of[i + 1] = activations.hidden.copy()
                tick()
                continue
            activations.hidden = inputs_of.pop(i)
            experts = structure.layers[i].experts
            scores = None
            if experts is not None and i in missing:
                scores = LayerScores(len(job.windows.names), experts.count, job.device)
                module = replay.model.get_submodule(experts.path)
                rungs = [rung_weights(job, replay, ladder, i, experts, width) for width in recipe.ladder_widths]
            for batch, call, gradient in reverse_layer(replay, i, activations, gradients, around.layer(i)):
                if scores is not None and call is not None and gradient is not None and experts is not None:
                    routed, costs = pair_costs(module, experts, call, gradient, rungs, recipe.score_form, recipe.units)
                    source = activations.source[batch].repeat_interleave(activations.ids[batch].shape[1])
                    scores.add(routed, costs, source)
            if scores is not None:
                costs, tokens = scores.total(replay.ranks, activations.total)
                stage.save_tensors(layer_file(i), {"costs": costs, "tokens": tokens})
            rungs = []
            tick()
    return stage


def segment_length(layers: int, each: int, room: int) -> int:
    """Every how many layers the inputs are kept for the reverse pass; those between are computed again.

    each: bytes of one layer's inputs; ``room``: bytes for all that are kept
    The least that fits, since each layer computed again costs a forward pass; where none fits, what keeps least.
    """

    def kept(k: int) -> int:
        """Inputs at once: of every k-th layer and of a segment's layers, the state in motion, and the gradients."""
        return -(-layers // k) + (k - 1) + 2

    lengths = range(1, layers + 1)
    return next((k for k in lengths if kept(k) * each <= room), min(lengths, key=kept))


def reverse_order(layers: int, segment: int) -> list[tuple[int, bool]]:
    """The reverse pass as (layer, backward): a segment's layers but its last forward again, then all of it backward.

    The last segment is not computed again.
    """
    order: list[tuple[int, bool]] = []
    for start in reversed(range(0, layers, segment)):
        stop = min(start + segment, layers)
        if stop < layers:
            order += [(i, False) for i in range(start, stop - 1)]
        order += [(i, True) for i in reversed(range(start, stop))]
    return order


def assembled(job: Job, structure: Structure, ladder: Stage, chosen: Allocation) -> Iterator[RefinedLayer]:
    """The layers of an allocation as the ladder has them."""
    for i, widths in enumerate(chosen.by_layer):
        yield assemble_layer(load_ladder(job, structure, ladder, i, "cpu"), structure.layers[i], widths)


def rung_weights(job: Job, replay: Replay, ladder: Stage, index: int, experts: Experts, width: Width) -> ExpertWeights:
    """All experts' matrices of a layer at one width, dequantized, in the model's compute type; ranks read their own."""
    recipe, ranks = job.recipe, replay.ranks
    module = replay.model.get_submodule(experts.path)
    rungs = []
    found: dict[str, Tensor] = {}
    if recipe.score_weights == "ladder":
        at = f":{width_name(width)}."  # the other widths stay in the file
        rows = ranks.local_slice(experts.count) if ranks.count > 1 else None
        own = ladder.load_tensors(layer_file(index), str(job.device), lambda key: at in key, rows)
        found = dict(zip(own, ranks.all_gather_cat(list(own.values())), strict=True))
    for matrix in experts.matrices:
        weight = expert_weight(module, matrix.name)
        if found:
            prefix = f"expert:{matrix.name}:{width_name(width)}"
            packed = PackedMatrix(*(found[f"{prefix}.{part}"] for part in PackedMatrix._fields))
            rung = dequantize_each(
                packed.unpack(width, group_size_for(matrix.columns, recipe.group_size)), weight.dtype
            )
        else:
            q = round_to_nearest(weight, (width,), group_size_for(matrix.columns, recipe.group_size))
            rung = dequantize_each(Quantized(*(t[0] for t in q)), weight.dtype)
        rungs.append(rung)
    return rungs[0], rungs[1]


class Judged(NamedTuple):
    """What tells the cost of widths: the scores, and the sensitivities that they are scaled to, if any."""

    scores: Stage
    measured: Stage | None


def make_problem(
    job: Job,
    structure: Structure,
    ladder: Stage,
    judged: Judged | None,
    leave_out: str | None = None,
) -> Problem:
    """The allocation problem: costs as ``judged`` (zero without), bytes from shapes, counts from the ladder.

    leave_out: calibration source that does not count
    """
    kept = [i for i, name in enumerate(job.windows.names) if name != leave_out]
    problem = shape_problem(structure, job.recipe)
    costs, counts = [], []
    for i, _ in structure.moe_layers:
        counts.append(ladder.load_tensor(layer_file(i), "counts").numpy())
        if judged is not None:
            costs.append(layer_costs(judged, i, job.recipe.smoothing, kept))
    return dataclasses.replace(
        problem,
        costs=np.concatenate(costs) if costs else problem.costs,
        counts=np.concatenate(counts).astype(np.int64).repeat(problem.units),
    )


def layer_costs(judged: Judged, layer: int, smoothing: float, kept: list[int] | None = None) -> Floats:
    """A layer's costs [E * U, W] by the calibration sources ``kept`` (None: all), with usage smoothing."""
    found = judged.scores.load_tensors(layer_file(layer))
    costs, tokens = (found[name] if kept is None else found[name][kept] for name in ("costs", "tokens"))
    cost = smooth_usage(costs.sum(0), tokens.sum(0), smoothing)
    if judged.measured is not None:
        own = judged.measured.load_tensors(layer_file(layer))
        kl = own["kl"] if kept is None else own["kl"][:, torch.isin(own["source"], torch.tensor(kept))]
        cost = rescaled(cost, kl.mean(1).clamp_min(0))
    return cost.flatten(0, 1).numpy()


def shape_problem(structure: Structure, recipe: Recipe) -> Problem:
    """What is known of the allocation problem before anything is computed: zero costs and counts."""
    widths = recipe.ladder_widths
    layer, weights, sizes = [], [], []
    for i, info in structure.moe_layers:
        experts = info.experts
        assert experts is not None
        each = [np.array([m.rows * m.columns, *matrix_sizes(m, widths, recipe.group_size)]) for m in experts.matrices]
        rows = each if recipe.units == 2 else [sum(each[1:], start=each[0])]
        for row in rows * experts.count:
            layer.append(i)
            weights.append(row[0])
            sizes.append(row[1:])
    return Problem(
        widths,
        np.array(layer, np.int64),
        np.zeros((len(layer), len(widths))),
        np.array(weights, np.int64),
        np.array(sizes, np.int64),
        np.zeros(len(layer), np.int64),
        layers=len(structure.layers),
        units=recipe.units,
    )


def layer_file(layer: int) -> str:
    return f"layer-{layer:03d}.safetensors"
