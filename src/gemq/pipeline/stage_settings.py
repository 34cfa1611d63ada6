"""How the recipe's keys reach the stages: settings of quantizer and training, and the inputs of each stage.

The inputs of a stage (``*_inputs``) are plain values that name everything that its results depend on, and nothing else.
The work directory compares them with the recorded ones, so that results are reused exactly as long as they are valid.
They include the results of earlier stages, as digests or as the inputs of those stages. If one is left out, outdated
results are reused: candidates, for example, would not notice that a new stage before them has changed its result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemq.calibration.windows import Windows
from gemq.checkpoint.format import FORMAT_VERSIONS
from gemq.layers.quantizer import Quantizer
from gemq.layers.scheme import QuantizationScheme
from gemq.layers.training import Training
from gemq.models.source import pick_dtype
from gemq.pipeline.context import Job
from gemq.quant import trellis
from gemq.quant.widths import ExpertWidths
from gemq.recipe import Recipe

QUANTIZER_KEYS = (
    "equalize",
    "group_size",
    "dense_bits",
    "quantizer",
    "dampening",
    "hessian_shrinkage",
    "micro_batch_tokens",
    "seed",
)
TRAINING_KEYS = ("lr_candidates", "lr_codes", "lr_grids", "lr_tuned", "val_fraction")
SCORE_KEYS = ("score_form", "score_labels", "score_weights", "score_tokens", "allocate_by", "seed")


# Settings


def quantizer_settings(recipe: Recipe) -> Quantizer:
    """How matrices are quantized."""
    return Quantizer(
        recipe.quantizer,
        recipe.group_size,
        recipe.dampening,
        recipe.hessian_shrinkage,
        compensates=recipe.compensate and recipe.quantizer != "rtn",
    )


def layer_scheme(recipe: Recipe, widths: Sequence[ExpertWidths]) -> QuantizationScheme:
    """The scheme of a layer whose experts have these widths."""
    return QuantizationScheme(widths, recipe.dense_width)


def training_settings(job: Job, epochs: int, code_lr: float, train_parameters: bool = True) -> Training | None:
    """How a stage trains; None when it does not.

    Args:
        job: the job, whose recipe has all other settings.
        epochs: of this stage.
        code_lr: learning rate of the codes.
        train_parameters: whether routers and norms are trained as well.
    """
    if epochs == 0:
        return None
    recipe = job.recipe
    parameter_lr = recipe.lr_tuned if train_parameters else 0.0
    return Training(
        epochs,
        code_lr,
        recipe.lr_grids,
        parameter_lr,
        recipe.val_fraction,
        recipe.seed,
        lambda: job.count_fallback("training_launched_by_steps"),
        job.training_bytes,
    )


# Inputs


def window_inputs(job: Job) -> dict[str, Any]:
    """What the calibration windows depend on."""
    recipe = job.recipe
    inputs = {
        "model": job.fingerprint,
        "calibration": list(job.calibration),
        "windows": recipe.num_windows,
        "seq_len": job.seq_len,
        "total_tokens": recipe.total_tokens,
        "seed": recipe.seed,
        "equalize": recipe.equalize,
    }
    # both are absent in directories that older versions made
    if recipe.generator_width is not None:
        inputs["generator_width"] = recipe.generator_width.value
    if recipe.calibration_column is not None:
        inputs["calibration_column"] = recipe.calibration_column
    return inputs


def guard_window_inputs(job: Job, windows: Windows) -> dict[str, Any]:
    """What the guard's windows depend on. They are disjoint from the calibration ``windows``."""
    return {**window_inputs(job), "taken": _short_digest(windows)}


def guard_inputs(job: Job, windows: Windows, guard_windows: Windows) -> dict[str, Any]:
    """What the guard's measurements depend on."""
    return {**candidate_inputs(job, windows), "windows": _short_digest(guard_windows)}


def candidate_inputs(job: Job, windows: Windows) -> dict[str, Any]:
    """What the candidates depend on."""
    training = _training_inputs(job.recipe, job.recipe.candidate_epochs)
    return {
        **_quantizer_inputs(job, windows),
        "widths": [width.value for width in job.recipe.candidate_widths],
        **training,
    }


def sensitivity_inputs(job: Job, windows: Windows) -> dict[str, Any]:
    """What the layers' sensitivities depend on."""
    return {**candidate_inputs(job, windows), "score_weights": job.recipe.score_weights}


def score_inputs(job: Job, windows: Windows) -> dict[str, Any]:
    """What scores depend on, apart from the model that they are computed around."""
    return {**candidate_inputs(job, windows), **_values(job.recipe, SCORE_KEYS)}


def reconstruction_inputs(job: Job, windows: Windows) -> dict[str, Any]:
    """What reconstructed layers depend on, apart from the allocation."""
    inputs = {
        **_quantizer_inputs(job, windows),
        **_training_inputs(job.recipe, job.recipe.reconstruction_epochs),
    }
    if quantizer_settings(job.recipe).compensates:
        inputs["compensate"] = True
    return {**inputs, "output_feedback": True} if job.recipe.has_output_feedback else inputs


def distillation_inputs(job: Job, windows: Windows) -> dict[str, Any]:
    """What the distilled model depends on, apart from the allocation."""
    recipe = job.recipe
    inputs = reconstruction_inputs(job, windows)
    if recipe.distill_epochs:
        inputs |= {"distill_loss": recipe.distill_loss, "distill_parameters": list(recipe.distill_parameters)}
    return {**inputs, "distill_epochs": _training_inputs(recipe, recipe.distill_epochs)}


def _quantizer_inputs(job: Job, windows: Windows) -> dict[str, Any]:
    """What codes depend on, apart from widths and training."""
    inputs = {
        "format": FORMAT_VERSIONS[job.recipe.codes],
        "model": job.fingerprint,
        "calibration": _short_digest(windows),
        "dtype": str(pick_dtype(job.recipe.dtype, job.device)),
        **_values(job.recipe, QUANTIZER_KEYS),
    }
    if job.recipe.codes == "trellis":
        inputs["state_bits"] = trellis.STATE_BITS
    return inputs


def _training_inputs(recipe: Recipe, epochs: int) -> dict[str, Any]:
    """What training for ``epochs`` epochs depends on; learning rates do not matter where nothing is trained."""
    return {"epochs": epochs, **_values(recipe, TRAINING_KEYS)} if epochs else {"epochs": 0}


def _values(recipe: Recipe, keys: tuple[str, ...]) -> dict[str, Any]:
    """Some keys of a recipe and their values."""
    return {key: getattr(recipe, key) for key in keys}


def _short_digest(windows: Windows) -> str:
    """A digest of calibration windows, as inputs hold it."""
    return windows.digest()[:16]
