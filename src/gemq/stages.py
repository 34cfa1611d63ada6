"""The long stages, layer by layer: every layer is written before the next begins.

A stopped job finds what it has written and only replays the layers to get past it, so a resumed stage gives the same
bytes as an uninterrupted one. What is computed for a layer stands in ``ladder``, ``score`` and ``refine``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemq.allocate import Allocation, Problem
from gemq.files import check_free_space
from gemq.job import Job
from gemq.ladder import LayerLadder, build_layer, rung_weight
from gemq.models.experts import expert_weight
from gemq.models.stream import Replay
from gemq.models.structure import Experts, Structure
from gemq.quant.gptq import round_to_nearest
from gemq.quant.grid import Quantized, dequantize
from gemq.quant.widths import Width, group_size_for
from gemq.refine import assemble_layer, install_layer, refine_layer
from gemq.score import (
    ExpertWeights,
    add_costs,
    empty_scores,
    loss_gradients,
    pair_costs,
    reverse_layer,
    smooth_usage,
)
from gemq.sizes import expert_bytes, ladder_bytes
from gemq.workdir import Stage


def run_ladder(job: Job, replay: Replay) -> Stage:
    """Every expert at every width: a file per layer."""
    stage = job.work.stage("ladder", job.ladder_inputs())
    layers = range(len(replay.structure.layers))
    missing = [i for i in layers if not stage.has(_file(i))]
    if not missing:
        return stage
    check_free_space(job.work.path, ladder_bytes(replay.structure, job.recipe) * len(missing) // len(layers))
    with job.monitor.stage("ladder", len(layers)) as tick:
        activations = job.start_activations(replay)
        for i in layers:
            if i in missing:
                ladder, activations.hidden = build_layer(
                    replay, i, activations, job.quantizer, job.recipe.ladder_widths, job.recipe.attention_bits
                )
                stage.save_tensors(_file(i), ladder.to_tensors())
            elif i < missing[-1]:
                activations.advance(replay, i)
            tick()
    return stage


def load_ladder(job: Job, structure: Structure, stage: Stage, index: int) -> LayerLadder:
    tensors = stage.load_tensors(_file(index), str(job.device))
    return LayerLadder.from_tensors(tensors, structure.layers[index], job.recipe.ladder_widths)


def run_scores(job: Job, replay: Replay, ladder: Stage) -> Stage:
    """What each width costs each expert, by calibration source: a file per layer with experts."""
    stage = job.work.stage("scores", job.score_inputs())
    recipe, structure = job.recipe, replay.structure
    missing = {i for i, _ in structure.moe_layers if not stage.has(_file(i))}
    if not missing:
        return stage
    with job.monitor.stage("scores", 2 * len(structure.layers)) as tick:
        activations = job.start_activations(replay)
        inputs = []
        for i in range(len(structure.layers)):
            inputs.append(activations.hidden)
            activations.advance(replay, i)
            tick()
        gradients = loss_gradients(replay, activations, recipe.score_labels, recipe.seed)
        for i in reversed(range(len(structure.layers))):
            activations.hidden = inputs.pop()
            experts = structure.layers[i].experts
            scores = None
            if experts is not None and i in missing:
                scores = empty_scores(len(job.windows.names), experts.count, recipe.ladder_widths, job.device)
                module = replay.model.get_submodule(experts.path)
                rungs = [_rung(job, replay, ladder, i, experts, width) for width in recipe.ladder_widths]
            for batch, call, gradient in reverse_layer(replay, i, activations, gradients):
                if scores is not None and call is not None and gradient is not None and experts is not None:
                    routed, costs = pair_costs(module, experts, call, gradient, rungs, recipe.score_form)
                    source = activations.source[batch].repeat_interleave(activations.ids[batch].shape[1])
                    add_costs(scores, routed, costs, source)
            if scores is not None:
                stage.save_tensors(_file(i), {"costs": scores.costs, "tokens": scores.tokens})
            tick()
    return stage


def run_refine(job: Job, replay: Replay, chosen: Allocation) -> Iterator[dict[str, Tensor]]:
    """Quantizes again at the chosen widths, a file per layer, and gives the layers' checkpoint tensors.

    Leaves the quantized weights in ``replay``'s model.
    """
    widths = chosen.by_layer
    inputs = {**job.refine_inputs(), "allocation": digest(widths)}
    stage = job.work.stage(f"refined-{digest(inputs)[:8]}", inputs)
    layers = range(len(replay.structure.layers))
    missing = [i for i in layers if not stage.has(_file(i))]
    if missing:
        with job.monitor.stage("refine", len(layers)) as tick:
            activations = job.start_activations(replay)
            for i in layers:
                if i in missing:
                    tensors, retries = refine_layer(
                        replay, i, activations, job.quantizer, widths[i], job.recipe.attention_bits
                    )
                    stage.save_tensors(_file(i), {**tensors, "retries": torch.tensor(retries)})
                elif i < missing[-1]:
                    install_layer(
                        replay.model,
                        replay.structure.layers[i],
                        stage.load_tensors(_file(i), str(job.device)),
                        widths[i],
                        job.recipe.attention_bits,
                        job.recipe.group_size,
                    )
                if i < missing[-1]:
                    activations.advance(replay, i)
                tick()
    return _read_layers(job, stage, layers)


def _read_layers(job: Job, stage: Stage, layers: range) -> Iterator[dict[str, Tensor]]:
    for i in layers:
        tensors = stage.load_tensors(_file(i))
        retries = int(tensors.pop("retries"))
        job.fallbacks["hessians_damped_more"] = job.fallbacks.get("hessians_damped_more", 0) + retries
        yield tensors


def assembled(job: Job, structure: Structure, ladder: Stage, chosen: Allocation) -> Iterator[dict[str, Tensor]]:
    for i, widths in enumerate(chosen.by_layer):
        yield assemble_layer(load_ladder(job, structure, ladder, i), structure.layers[i], widths)


def _rung(job: Job, replay: Replay, ladder: Stage, index: int, experts: Experts, width: Width) -> ExpertWeights:
    """All experts' matrices of a layer at one width, dequantized, in the model's compute type."""
    recipe = job.recipe
    module = replay.model.get_submodule(experts.path)
    rungs = []
    layer = load_ladder(job, replay.structure, ladder, index) if recipe.score_weights == "ladder" else None
    for matrix in experts.matrices:
        weight = expert_weight(module, matrix.name)
        if layer is not None:
            rung = rung_weight(layer, matrix.name, width, matrix.columns, recipe.group_size)
        else:
            q = round_to_nearest(weight, (width,), group_size_for(matrix.columns, recipe.group_size))
            rung = dequantize(Quantized(*(t[0] for t in q)))
        rungs.append(rung.to(weight.dtype))
    return rungs[0], rungs[1]


def make_problem(job: Job, structure: Structure, ladder: Stage, scores: Stage | None) -> Problem:
    """The allocation problem: costs from ``scores`` (zero without), bytes from shapes, counts from the ladder."""
    recipe, widths = job.recipe, job.recipe.ladder_widths
    layer, costs, weights, sizes, counts = [], [], [], [], []
    for i, info in structure.moe_layers:
        assert info.experts is not None
        experts = info.experts
        tokens = load_ladder(job, structure, ladder, i).counts.cpu()
        if scores is not None:
            found = scores.load_tensors(_file(i))
            cost = smooth_usage(found["costs"].sum(0), found["tokens"].sum(0), recipe.smoothing).numpy()
        else:
            cost = np.zeros((experts.count, len(widths)))
        bytes_per_expert = [expert_bytes(experts, w, recipe.group_size) for w in widths]
        layer += [i] * experts.count
        costs.append(cost)
        weights += [experts.weights_per_expert] * experts.count
        sizes += [bytes_per_expert] * experts.count
        counts += tokens.tolist()
    return Problem(
        widths,
        np.array(layer, np.int64),
        np.concatenate(costs),
        np.array(weights, np.int64),
        np.array(sizes, np.int64),
        np.array(counts, np.int64),
        layers=len(structure.layers),
    )


def digest(value: Any) -> str:
    """SHA-256 of plain values, shortened."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _file(layer: int) -> str:
    return f"layer-{layer:03d}.safetensors"
