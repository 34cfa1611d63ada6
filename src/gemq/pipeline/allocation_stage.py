"""The allocation: which width every matrix of every expert gets. It is solved anew in every run, in seconds."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch

from gemq.allocation.interpolation import interpolate
from gemq.allocation.knapsack import Floats
from gemq.allocation.problem import Allocation, Budget, Problem, allocate
from gemq.allocation.scores import rescale_to_kl, smooth_usage
from gemq.calibration.windows import Windows
from gemq.models.byte_sizes import matrix_sizes
from gemq.models.structure import Structure
from gemq.pipeline.candidates_stage import CandidateFiles
from gemq.pipeline.workdir import Stage, layer_file
from gemq.recipe import Recipe

ALLOCATE = "allocate"
"""Name of the stage in progress bars and in the summary."""


class Costs(NamedTuple):
    """The stages that costs are read from: scores, and sensitivities that scores are scaled to, if any."""

    scores: Stage
    sensitivity: Stage | None


def make_problem(
    structure: Structure,
    recipe: Recipe,
    windows: Windows,
    candidates: CandidateFiles,
    costs: Costs | None,
    leave_out: str | None = None,
) -> Problem:
    """The allocation problem of a model.

    Args:
        structure: bytes of the candidates follow from its shapes.
        recipe: the candidate widths, and how costs are smoothed.
        windows: the calibration windows, for the names of their sources.
        candidates: token counts of the experts.
        costs: None for an allocation that needs none; costs are zero then.
        leave_out: name of a calibration source whose windows do not count.
    """
    sources = [i for i, name in enumerate(windows.names) if name != leave_out]
    problem = shape_problem(structure, recipe)
    counts = [candidates.counts(i).numpy() for i, _ in structure.moe_layers]
    expert_counts = np.concatenate(counts).astype(np.int64)
    problem = dataclasses.replace(problem, counts=expert_counts.repeat(problem.units_per_expert))
    if costs is None:
        return problem
    cost_tables = [layer_costs(costs, i, recipe.smoothing, sources) for i, _ in structure.moe_layers]
    return dataclasses.replace(problem, costs=np.concatenate(cost_tables))


def layer_costs(costs: Costs, layer: int, smoothing: float, sources: list[int] | None = None) -> Floats:
    """The costs of a layer with usage smoothing: [E * U, W] for E experts of U units each, at W widths.

    Args:
        costs: where they are stored.
        layer: index of the layer.
        smoothing: k of usage smoothing.
        sources: indices of the calibration sources that count; None for all.
    """
    tensors = costs.scores.load_tensors(layer_file(layer))
    scores, tokens = tensors["costs"], tensors["tokens"]
    if sources is not None:
        scores, tokens = scores[sources], tokens[sources]
    smoothed = smooth_usage(scores.sum(0), tokens.sum(0), smoothing)
    if costs.sensitivity is not None:
        measured = costs.sensitivity.load_tensors(layer_file(layer))
        kl = measured["kl"]
        if sources is not None:
            kl = kl[:, torch.isin(measured["source"], torch.tensor(sources))]
        smoothed = rescale_to_kl(smoothed, kl.mean(1).clamp_min(0))
    return smoothed.flatten(0, 1).numpy()


def shape_problem(structure: Structure, recipe: Recipe) -> Problem:
    """The part of the allocation problem that follows from shapes alone: costs and token counts are zero."""
    widths = recipe.candidate_widths
    layers, weights, sizes = [], [], []
    for i, info in structure.moe_layers:
        experts = info.experts
        matrix_weights = [m.rows * m.columns for m in experts.matrices]
        matrix_bytes = [np.array(matrix_sizes(m, widths, recipe.group_size)) for m in experts.matrices]
        if recipe.units_per_expert == 1:  # both matrices of an expert get the same width
            matrix_weights = [sum(matrix_weights)]
            matrix_bytes = [sum(matrix_bytes[1:], start=matrix_bytes[0])]
        layers += [i] * (len(matrix_weights) * experts.count)
        weights += matrix_weights * experts.count
        sizes += matrix_bytes * experts.count
    return Problem(
        widths,
        np.array(layers, np.int64),
        np.zeros((len(layers), len(widths))),
        np.array(weights, np.int64),
        np.array(sizes, np.int64),
        np.zeros(len(layers), np.int64),
        layers=len(structure.layers),
        units_per_expert=recipe.units_per_expert,
    )


def with_all_widths(problem: Problem, recipe: Recipe) -> Problem:
    """The problem with all widths that a reconstructed model can have. Others have the candidates' alone."""
    widths = recipe.allocated_widths
    return problem if widths == problem.widths else interpolate(problem, widths)


def solve(problem: Problem, budget: Budget, recipe: Recipe) -> Allocation:
    """Allocates as the recipe says."""
    return allocate(problem, budget, recipe.allocate, layer_rule=recipe.layer_rule, seed=recipe.seed)
