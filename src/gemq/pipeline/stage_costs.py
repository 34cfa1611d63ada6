"""Which stages a job has, and what they cost. ``plan``, the progress bar and the memory bounds read it from here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from gemq.allocation.guard import GENERATED_WINDOWS, WINDOWS_PER_SOURCE
from gemq.calibration.sources import SELF
from gemq.errors import UserError
from gemq.layers.candidate_training import train_state_sizes
from gemq.pipeline.candidates_stage import CANDIDATES, candidates_peak_bytes, candidates_work
from gemq.pipeline.codes_stage import expected_recipe
from gemq.pipeline.guard_stage import GUARD, GUARD_WINDOWS, guard_work
from gemq.pipeline.reconstruction_stage import (
    DISTILL,
    RECONSTRUCTION,
    distillation_peak_bytes,
    distillation_work,
    reconstruction_peak_bytes,
    reconstruction_work,
)
from gemq.pipeline.scores_stage import SCORES, scores_peak_bytes, scores_work
from gemq.pipeline.sensitivity_stage import SENSITIVITY, sensitivity_work
from gemq.pipeline.windows_stage import CALIBRATION_WINDOWS, windows_work
from gemq.planning.cost_model import Work, Workload
from gemq.planning.memory_model import ModelMemory, check_staging, held_bytes, text_note
from gemq.recipe import Recipe
from gemq.runtime.device import measure
from gemq.runtime.memory import MemoryBudget, gigabytes

SCORING_METHODS = ("global", "layerwise")
"""Allocation methods that need scores."""


@dataclass(frozen=True)
class JobStages:
    """The optional stages of a job, decided before its first stage.

    Attributes:
        scores: widths are allocated by scores.
        guard_skipped: why the guard does not run; empty if it does.
        reconstruct: the model is reconstructed at the chosen widths, instead of assembled from the candidates.
    """

    scores: bool
    guard_skipped: str
    reconstruct: bool

    @classmethod
    def of(cls, recipe: Recipe, allocation: Path | None, reconstruct: bool, plain_export: bool = False) -> JobStages:
        """The stages of a job.

        Args:
            recipe: of the job.
            allocation: file with the widths of all experts, if any.
            reconstruct: whether the model is reconstructed.
            plain_export: the job takes the candidates as they are, in seconds, which leaves no time for the guard.
        """
        scores = allocation is None and recipe.allocate in SCORING_METHODS
        guard_skipped = ""
        if not scores:
            guard_skipped = "it judges the allocations that scores make"
        elif not recipe.guard:
            guard_skipped = "switched off in the recipe"
        elif plain_export:
            guard_skipped = "a plain export takes seconds; --reconstruct runs it"
        return cls(scores, guard_skipped, reconstruct)

    @property
    def guard(self) -> bool:
        """Whether the guard runs."""
        return not self.guard_skipped


# Time


def stage_work(workload: Workload, stages: JobStages) -> dict[str, Work]:
    """The work of each stage that computes something, in order, by its name in progress bars."""
    recipe = workload.recipe
    steps = max(1, len(recipe.progressive))
    calibration_windows, guard_windows = _generated_windows(workload, stages)
    work = {
        CALIBRATION_WINDOWS: windows_work(workload, calibration_windows),
        CANDIDATES: candidates_work(workload),
    }
    if stages.scores and recipe.rescale:
        work[SENSITIVITY] = sensitivity_work(workload)
    if stages.scores:
        work[SCORES] = scores_work(workload) * steps
    elif stages.reconstruct and recipe.has_output_feedback:
        work[SCORES] = scores_work(workload, with_costs=False)
    if stages.guard:
        work[GUARD_WINDOWS] = windows_work(workload, guard_windows)
        work[GUARD] = guard_work(workload)
    if stages.reconstruct:
        work[RECONSTRUCTION] = reconstruction_work(workload) * steps
    if stages.reconstruct and recipe.distill_epochs:
        work[DISTILL] = distillation_work(workload) * steps
    return {name: stage for name, stage in work.items() if stage != Work()}


def stage_seconds(workload: Workload, stages: JobStages) -> dict[str, float]:
    """The expected time of each stage on the workload's device, which is measured for a second."""
    matrix = workload.structure.moe_layers[0][1].experts.matrices[0]
    rates = measure(workload.device, workload.dtype, matrix.rows, matrix.columns)
    return {name: work.seconds(rates) for name, work in stage_work(workload, stages).items()}


def stage_rounds(recipe: Recipe) -> dict[str, int]:
    """How many times each stage runs that a progressive recipe runs more than once."""
    steps = len(recipe.progressive)
    if steps < 2:
        return {}
    names = [SCORES, RECONSTRUCTION]
    if recipe.distill_epochs:
        names.append(DISTILL)
    return dict.fromkeys(names, steps)


def _generated_windows(workload: Workload, stages: JobStages) -> tuple[int, int]:
    """Windows that the model writes for calibration, and in the guard's stage.

    Where the effort adds windows to those of texts, the guard's are written along with them.
    """
    recipe = workload.recipe
    calibration = workload.added_windows
    if SELF in recipe.calibration:
        calibration += recipe.num_windows // len(recipe.calibration)
    guard = 0
    if stages.guard:
        guard = GENERATED_WINDOWS + WINDOWS_PER_SOURCE * (SELF in recipe.calibration)
    if workload.added_windows and recipe.calibration != (SELF,):
        return calibration + guard, 0
    return calibration, guard


# Memory


class Footprint(ModelMemory):
    """Device memory that a job computes with, apart from layers and activations that are kept."""

    def peak_bytes_by_stage(self, training_bytes: int) -> dict[str, int]:
        """The most bytes that each stage takes, of those that quantize, score or train.

        Scores and reconstruction count even where a job has none. Sensitivity and the guard are left out: they only run
        the model forward, with each expert at one width at a time, and scores take about as much or more.

        Args:
            training_bytes: for the state of experts that are trained at the same time.
        """
        peaks = {
            CANDIDATES: candidates_peak_bytes(self, training_bytes),
            RECONSTRUCTION: reconstruction_peak_bytes(self),
            SCORES: scores_peak_bytes(self),
        }
        if self.recipe.distill_epochs:
            peaks[DISTILL] = distillation_peak_bytes(self)
        return peaks

    def working_bytes(self, training_bytes: int) -> int:
        """The most that any stage takes."""
        peak = max(self.peak_bytes_by_stage(training_bytes).values())
        expected = expected_recipe(self.recipe, self.device, self.structure)
        if expected is not self.recipe:  # the job decides, once it has seen the model
            peak = max(peak, dataclasses.replace(self, recipe=expected).working_bytes(training_bytes))
        return peak

    @property
    def min_working_bytes(self) -> int:
        """``working_bytes`` with the fewest experts trained at the same time."""
        return self.working_bytes(train_state_sizes(self.device)[-1])

    def training_bytes(self, available_bytes: int) -> int:
        """Bytes for the state of experts that are trained at the same time.

        Args:
            available_bytes: for all that the job computes with.

        Returns:
            The largest size with which all stages fit, or the smallest if none does.
        """
        sizes = train_state_sizes(self.device)
        for size in sizes:
            if self.working_bytes(size) <= available_bytes:
                return size
        return sizes[-1]


def check_bounds(memory: MemoryBudget, footprint: Footprint, model: torch.nn.Module, texts: int = 0) -> None:
    """Checks that a job fits into its bounds.

    Args:
        memory: the bounds.
        footprint: what the job computes with.
        model: may be on the meta device.
        texts: bytes of host memory for the tokens of the calibration texts.

    Raises:
        UserError: it does not. The message says which bound would do.
    """
    structure = footprint.structure
    check_staging(memory, model, structure, texts)
    resident_bytes = held_bytes(model, structure, footprint.dtype)
    working_bytes = footprint.min_working_bytes
    required = resident_bytes + working_bytes
    note = ""
    if memory.device.type != "cuda":
        required += texts
        note = text_note(texts)
    if required > memory.on_device.limit:
        raise UserError(
            f"{memory.flag} {gigabytes(memory.on_device.limit)} is too small for the model's embeddings and two of its "
            f"layers ({gigabytes(resident_bytes)}) and for computing one layer ({gigabytes(working_bytes)}){note}: "
            f"give at least {memory.flag} {gigabytes(required)}"
        )
