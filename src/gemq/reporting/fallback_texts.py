"""What the summary of a job says about each kind of fallback, after their number. Must not import torch."""

from __future__ import annotations

from gemq.runtime.fallbacks import DESCRIPTIONS as ACCELERATIONS

FALLBACKS = {
    **ACCELERATIONS,
    "inputs_not_equalized": "inputs of matrices keep their outlier channels: nothing before them can take up scales",
    "experts_without_tokens": "experts saw no calibration token: they got their layer's mean statistics",
    "experts_with_few_tokens": "experts saw fewer calibration tokens than they have inputs: more windows would help",
    "rows_without_feedback": "experts are wide: errors are not fed back between the rows of gate and up",
    "hessians_damped_more": "Hessians were singular and got more dampening",
    "candidates_not_improved_by_training": (
        "experts at a width, or dense linears, were no better after training on held-out windows: GPTQ's codes kept"
    ),
    "layers_not_improved_by_training": "layers were no better after training on held-out windows: GPTQ's codes kept",
    "distillation_dropped": "distillation discarded: it gained nothing on held-out windows",
    "matrices_in_smaller_groups": "matrices got smaller groups, since the group size does not divide their inputs",
    "matrices_in_smaller_rotations": "matrices are rotated in smaller blocks, since 128 does not divide their inputs",
    "linears_not_quantized": "matrices are not quantized: gates, inputs that no group size divides, or other shapes",
    "matrices_too_small_for_scales": "matrices have only weights below 1e-5, for which scales (from 2^-24) are coarse",
    "matrices_left_out": "stored matrices do not belong to the model and are left out (such as multi-token prediction)",
    "calibration_windows_missing": "calibration windows are missing: the sources have no more text",
    "calibration_rows_empty": "rows of calibration sources have no text and were left out",
    "calibration_rows_without_template": (
        "conversations of calibration sources are without the chat template, which could not be applied to them"
    ),
    "guard_windows_missing": "held-out windows of the guard are missing: the sources have no more text",
    "chat_template_failures": "self-generated windows are without the chat template, which could not be applied",
    "training_launched_by_steps": "times a layer was trained without a CUDA graph, which model or memory did not allow",
    "source_card_unreadable": "model card of the original cannot be read: license and languages are not copied from it",
    "windows_launched_by_steps": "windows were written without a CUDA graph, which model or memory did not allow",
}
