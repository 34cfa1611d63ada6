"""The kind of codes that the experts get, if the recipe leaves it open.

Trellis codes are the more accurate ones. They take a GPU to search for, tiles that fit the matrices, and inputs whose
channels can be equalized, since a rotation of inputs with outliers would spread the error of small channels. The
decision is stored, so that every job on a work directory takes the same, on any device.
"""

from __future__ import annotations

import dataclasses

import torch

from gemq.models.replay import Replay
from gemq.models.structure import Experts, Layer, Structure
from gemq.pipeline.context import Job
from gemq.pipeline.workdir import CODES_FILE, WorkDir
from gemq.quant.widths import TILE_SIDE, Width
from gemq.recipe import Recipe

CODES = "codes"
"""Directory of the stage."""


@dataclasses.dataclass(frozen=True)
class CodesChoice:
    """The kind of codes of the experts, and why.

    Attributes:
        codes: ``affine`` or ``trellis``.
        reason: why codes are not trellis codes; empty otherwise, or if the recipe names the kind.
    """

    codes: str
    reason: str = ""


def run_codes(job: Job, replay: Replay) -> CodesChoice:
    """Decides on the codes, and completes the job's recipe."""
    recipe = job.recipe
    if recipe.codes != "auto":
        return CodesChoice(recipe.codes)
    stage = job.work.stage(CODES, {"model": job.fingerprint, "equalize": recipe.equalize})
    if not stage.has(CODES_FILE):
        stage.save_json(CODES_FILE, replay.ranks.run_on_first(lambda: dataclasses.asdict(_choose(job, replay))))
    choice = CodesChoice(**stage.load_json(CODES_FILE))
    job.recipe = recipe.replace(codes=choice.codes)
    return choice


def decided_recipe(work: WorkDir, recipe: Recipe) -> Recipe:
    """The recipe with the codes that an earlier job in a work directory chose, if it leaves them open."""
    if recipe.codes != "auto":
        return recipe
    for stage, _ in work.finished(CODES, [CODES_FILE]):
        return recipe.replace(codes=CodesChoice(**stage.load_json(CODES_FILE)).codes)
    return recipe


def _choose(job: Job, replay: Replay) -> CodesChoice:
    """The best kind of codes that the job can have."""
    if reason := needs_affine_codes(job.recipe, job.device, replay.structure):
        return CodesChoice("affine", reason)
    unequalized = sum(_is_unequalized(replay, index, layer) for index, layer in replay.structure.moe_layers)
    if unequalized:
        return CodesChoice("affine", f"the experts' inputs cannot be equalized in {unequalized} layers")
    return CodesChoice("trellis")


def expected_recipe(recipe: Recipe, device: torch.device, structure: Structure) -> Recipe:
    """The recipe with the codes that a job gets if its experts' inputs can be equalized. Needs no weights."""
    if recipe.codes != "auto" or needs_affine_codes(recipe, device, structure):
        return recipe
    return recipe.replace(codes="trellis")


def needs_affine_codes(recipe: Recipe, device: torch.device, structure: Structure) -> str:
    """Why a job has affine codes if its recipe leaves the kind open; empty if inputs of experts decide."""
    if device.type != "cuda":
        return "trellis codes need a GPU"
    if any(isinstance(width, Width) and width in (Width.TERNARY, Width.EIGHT_BIT) for width in recipe.widths or ()):
        return "only affine codes have the widths 1.6 and 8"
    if "rtn" in (recipe.quantizer, recipe.score_weights):
        return "only affine codes can be rounded to nearest"
    for _, layer in structure.moe_layers:
        for matrix in layer.experts.matrices:
            if matrix.rows % TILE_SIDE or matrix.columns % TILE_SIDE:
                return f"{TILE_SIDE} does not divide {matrix.rows} x {matrix.columns}"
    return ""


def _is_unequalized(replay: Replay, index: int, layer: Layer) -> bool:
    """Whether the channels of an input of the layer's experts stay as they are."""
    experts: Experts | None = layer.experts
    assert experts is not None
    if replay.layer_cache is None:
        return True
    prefix = experts.path.removeprefix(f"{layer.path}.")
    names = [f"{prefix}.{matrix.name}" for matrix in experts.matrices]
    return not all(replay.layer_cache.equalization.scales_columns(index, name) for name in names)
