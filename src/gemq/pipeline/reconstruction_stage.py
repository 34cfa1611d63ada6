"""The model at its chosen widths: every layer quantized again and trained, then the whole model distilled.

Resumable by layer. Distillation, the short last step, starts again. ``layers.reconstruction``, ``layers.training`` and
``distillation.distill`` do the computing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemq.allocation.problem import Allocation
from gemq.calibration.windows import Windows
from gemq.distillation.distill import Distilled, distill
from gemq.distillation.settings import Distillation
from gemq.kernels.training.differentiable_dequantize import MAX_CHUNK_WEIGHTS
from gemq.layers.expert_reconstruction import compensation_passes
from gemq.layers.output_hessians import is_practical
from gemq.layers.quantizer import OUTPUT_COPIES
from gemq.layers.reconstruction import QuantizedLayer, Targets, assemble_layer, layer_overrides, reconstruct_layer
from gemq.models.replay import Replay
from gemq.models.structure import Structure
from gemq.pipeline.candidates_stage import CandidateFiles
from gemq.pipeline.context import Job
from gemq.pipeline.records import digest
from gemq.pipeline.scores_stage import ScoredModel, gradients_file
from gemq.pipeline.stage_settings import (
    distillation_inputs,
    layer_scheme,
    quantizer_settings,
    reconstruction_inputs,
    training_settings,
)
from gemq.pipeline.workdir import Stage, layer_file
from gemq.planning.cost_model import Work, Workload
from gemq.planning.memory_model import LayerMemory, ModelMemory
from gemq.quant.widths import ExpertWidths
from gemq.runtime.activation_store import ActivationStore

RECONSTRUCTION, DISTILL = "reconstruct", "distill"
"""Names of the two stages in progress bars and in the summary."""

DISTILLED_FILE = "distilled.safetensors"
"""What distillation changed, in its stage's directory."""

PARAMETER_PREFIX = "tuned:"
"""Of the names of routers and norms in that file."""

DEQUANTIZING_BYTES = 20
"""Bytes a weight of the temporary tensors while distillation dequantizes a chunk of weights."""


@dataclass
class ReconstructedModel:
    """A quantized model, layer by layer from the work directory.

    Attributes:
        stage: the reconstructed layers.
        layer_count: of the model.
        distilled: what distillation changed; empty without distillation.
        inputs: what the model was made from.
        tuned: every trained router and norm by its name inside the model, float32.
        gains: what training gained on held-out windows, for the summary.
    """

    stage: Stage
    layer_count: int
    distilled: Distilled
    inputs: dict[str, Any]
    tuned: dict[str, Tensor] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)

    def layers(self) -> Iterator[QuantizedLayer]:
        """The layers in order, on the CPU."""
        return (self.layer(i) for i in range(self.layer_count))

    def layer(self, index: int, device: str = "cpu") -> QuantizedLayer:
        """A reconstructed layer, with what distillation changed in it."""
        layer = _load_layer(self.stage, index, device)
        for name, tensor in self.distilled.tensors.items():
            if name in layer.tensors:
                layer.tensors[name] = tensor.to(device)
        for name, tensor in self.distilled.tuned.items():
            if name in layer.tuned:
                layer.tuned[name] = tensor.to(device)
        return layer

    def scored(self, job: Job, replay: Replay, widths: list[list[ExpertWidths]]) -> ScoredModel:
        """This model as one to compute scores around. ``replay`` holds the full-precision one."""
        structure = replay.structure

        def overrides(index: int) -> dict[str, Tensor]:
            layer = self.layer(index, str(job.device))
            scheme = layer_scheme(job.recipe, widths[index])
            return layer_overrides(replay.model, structure.layers[index], layer, scheme)

        tail = {}
        for name, tensor in self.tuned.items():
            if not name.startswith(f"{structure.layers_path}."):
                tail[name] = tensor.to(replay.model.get_parameter(name))
        return ScoredModel(self.inputs, overrides, tail)


def assembled_layers(replay: Replay, candidates: CandidateFiles, allocation: Allocation) -> Iterator[QuantizedLayer]:
    """The layers of an allocation with the codes of the candidates, without reconstruction."""
    for i, widths in enumerate(allocation.by_layer):
        yield assemble_layer(candidates.layer(i, "cpu"), replay.structure.layers[i], widths)


def run_reconstruction(
    job: Job,
    replay: Replay,
    stored_dtypes: dict[str, torch.dtype],
    windows: Windows,
    allocation: Allocation,
    scores: Stage | None = None,
) -> ReconstructedModel:
    """Reconstructs every layer at the chosen widths, then distills the model.

    Args:
        job: the job.
        replay: the full-precision model. It has its weights again afterwards.
        stored_dtypes: the type in which each parameter is stored.
        windows: the calibration windows.
        allocation: the chosen widths.
        scores: with the moments of gradients at the output of each layer's experts, which trellis codes need.
    """
    widths = allocation.by_layer
    chosen = {"allocation": digest(widths)}
    if scores is not None:
        chosen["gradients"] = scores.directory.name
    inputs = {**reconstruction_inputs(job, windows), **chosen}
    stage = job.work.stage(f"reconstructed-{digest(inputs)[:8]}", inputs)
    inputs = {**distillation_inputs(job, windows), **chosen}
    distillation_stage = job.work.stage(f"distilled-{digest(inputs)[:8]}", inputs)
    layer_count = len(replay.structure.layers)
    missing = [i for i in range(layer_count) if not stage.has(layer_file(i))]
    distills = bool(job.recipe.distill_epochs) and not distillation_stage.has(DISTILLED_FILE)
    if missing or distills:
        end = layer_count if distills else missing[-1] + 1
        teacher = _reconstruct_layers(job, replay, stored_dtypes, windows, stage, widths, missing, end, scores)
        if distills:
            _distill(job, replay, stored_dtypes, windows, stage, distillation_stage, widths, teacher)
    distilled = _load_distilled(distillation_stage) if job.recipe.distill_epochs else Distilled()
    model = ReconstructedModel(stage, layer_count, distilled, inputs)
    _summarize(job, replay.structure, model)
    return model


def _reconstruct_layers(
    job: Job,
    replay: Replay,
    stored_dtypes: dict[str, torch.dtype],
    windows: Windows,
    stage: Stage,
    widths: list[list[ExpertWidths]],
    missing: list[int],
    end: int,
    scores: Stage | None,
) -> ActivationStore:
    """Reconstructs the missing layers. Returns the full-precision hidden states after the last layer that was run.

    Args:
        missing: indices of the layers that are not in ``stage``.
        end: number of layers to run. Distillation needs the full-precision model's last hidden states.
        scores: with the moments of gradients at the output of each layer's experts, if any.
    """
    recipe, structure = job.recipe, replay.structure
    training = training_settings(job, recipe.reconstruction_epochs, recipe.lr_codes)
    quantizer = quantizer_settings(recipe)
    with_teacher = training is not None or bool(recipe.distill_epochs)
    with (
        job.monitor.stage(RECONSTRUCTION, end) as tick,
        stage.background_writer() as save,
    ):
        activations = job.start_activations(replay, windows)
        exact = activations.hidden.copy() if with_teacher else ActivationStore(replay.memory)
        # Training a layer uses the memory that the next one would take (see ``reconstruction_peak_bytes``).
        for i in replay.walk(range(end), prefetch=training is None):
            if with_teacher:
                activations.advance_all(replay, i, [exact])
            if i in missing:
                targets = Targets(exact, stored_dtypes, training) if training is not None else None
                gradients = None
                if scores is not None and structure.layers[i].experts is not None:
                    gradients = scores.load_tensors(gradients_file(i), str(job.device))["gradients"]
                layer = reconstruct_layer(
                    replay, i, activations, quantizer, widths[i], recipe.dense_width, targets, gradients
                )
                save(layer_file(i), layer.to_tensors())
                activations.advance(replay, i)
                replay.restore(i)  # later stages use the full-precision model
            elif missing and i < missing[-1]:
                layer = _load_layer(stage, i, str(job.device))
                scheme = layer_scheme(recipe, widths[i])
                overrides = layer_overrides(replay.model, structure.layers[i], layer, scheme)
                activations.advance(replay, i, overrides)
            tick()
    return exact


def _distill(
    job: Job,
    replay: Replay,
    stored_dtypes: dict[str, torch.dtype],
    windows: Windows,
    layers: Stage,
    stage: Stage,
    widths: list[list[ExpertWidths]],
    teacher: ActivationStore,
) -> None:
    """Distills the reconstructed model into ``stage``.

    Args:
        layers: the stage with the reconstructed layers.
        teacher: the full-precision model's last hidden states, per micro-batch.
    """
    recipe, model = job.recipe, replay.model
    training = training_settings(job, recipe.distill_epochs, 0.0)
    assert training is not None
    memory = ModelMemory(replay.structure, recipe, model.config, model.dtype, replay.device)
    with job.monitor.stage(DISTILL, 1) as tick:
        distilled = distill(
            replay,
            lambda index: _load_layer(layers, index, str(job.device)),
            [layer_scheme(recipe, layer_widths) for layer_widths in widths],
            job.start_activations(replay, windows),
            teacher,
            Distillation(training, recipe.distill_loss, recipe.distill_parameters, stored_dtypes),
            tick,
            distillation_peak_bytes(memory),
        )
    tensors = dict(distilled.tensors)
    for name, tensor in distilled.tuned.items():
        tensors[PARAMETER_PREFIX + name] = tensor
    tensors["notes"] = torch.tensor([distilled.loss_before, distilled.loss_after], dtype=torch.float64)
    stage.save_tensors(DISTILLED_FILE, tensors)


def _load_layer(stage: Stage, index: int, device: str = "cpu") -> QuantizedLayer:
    """A reconstructed layer, before distillation."""
    return QuantizedLayer.from_tensors(stage.load_tensors(layer_file(index), device))


def _load_distilled(stage: Stage) -> Distilled:
    """What distillation changed."""
    tensors = stage.load_tensors(DISTILLED_FILE)
    loss_before, loss_after = tensors.pop("notes").tolist()
    tuned = {}
    for name in [name for name in tensors if name.startswith(PARAMETER_PREFIX)]:
        tuned[name.removeprefix(PARAMETER_PREFIX)] = tensors.pop(name)
    return Distilled(tensors, tuned, loss_before, loss_after)


def _summarize(job: Job, structure: Structure, model: ReconstructedModel) -> None:
    """Collects the trained parameters and gains of all layers in ``model``, and counts fallbacks."""
    recipe = job.recipe
    retries = not_improved = 0
    error_before = error_after = 0.0
    for i in range(model.layer_count):
        layer = _load_layer(model.stage, i)
        model.tuned.update(layer.tuned)
        retries += layer.retries
        improved = layer.error_after < layer.error_before  # False for NaN
        not_improved += int(bool(recipe.reconstruction_epochs) and not improved)
        error_before += layer.error_before / model.layer_count
        error_after += layer.error_after / model.layer_count
    distilled = model.distilled
    model.tuned.update(distilled.tuned)
    job.count_fallback("hessians_damped_more", retries)
    if recipe.has_output_feedback:
        wide = sum(layer.experts.count for _, layer in structure.moe_layers if not is_practical(layer.experts))
        job.count_fallback("rows_without_feedback", wide)
    job.fallbacks["layers_not_improved_by_training"] = not_improved
    if recipe.reconstruction_epochs:
        model.gains.update(reconstruction_before=error_before, reconstruction_after=error_after)
    if recipe.distill_epochs:
        model.gains.update(distillation_before=distilled.loss_before, distillation_after=distilled.loss_after)
        job.fallbacks["distillation_dropped"] = int(not distilled.loss_after < distilled.loss_before)


# Costs


def reconstruction_work(workload: Workload) -> Work:
    """Work of the stage: forward passes and GPTQ at the chosen widths, then training towards exact outputs."""
    recipe = workload.recipe
    forward_passes = 4 if recipe.reconstruction_epochs or recipe.distill_epochs else 3
    steps = workload.training_steps(recipe.reconstruction_epochs)
    work = Work()
    for layer in workload.structure.layers:
        work += workload.forward(layer, workload.tokens) * forward_passes + workload.quantize(layer, 1)
        if recipe.compensate and layer.experts is not None:
            work += workload.forward(layer, workload.tokens) * compensation_passes(layer.experts, 1)
        work += workload.forward(layer, steps * workload.micro_batch_tokens, steps) * 3
        work += workload.train(workload.quantized_weights(layer), steps)
    return work


def distillation_work(workload: Workload) -> Work:
    """Work of the stage: each step runs a layer forward, forward again for its gradient, and backward."""
    steps = workload.training_steps(workload.recipe.distill_epochs)
    tokens = steps * workload.micro_batch_tokens
    work = workload.head(tokens) * 3
    for layer in workload.structure.layers:
        work += workload.forward(layer, tokens, steps) * 4
    return work


def reconstruction_peak_bytes(model: ModelMemory) -> int:
    """Most device memory that reconstruction computes with."""
    return model.largest_layer(_reconstruction_bytes)


def distillation_peak_bytes(model: ModelMemory) -> int:
    """Most device memory that distillation computes with."""
    return max(model.loss(float32_bytes=20, copies=2), model.largest_layer(_distillation_bytes))


def _reconstruction_bytes(memory: LayerMemory) -> int:
    """Bytes for one layer: collecting Hessians, GPTQ, installing the dequantized weights, and training."""
    if memory.layer.experts is None:
        return memory.dense_hessians + memory.dense_quantization
    hessians = memory.dense_hessians + memory.expert_hessians + memory.mean_hessians + memory.slope_moments
    quantizing = hessians + memory.expert_quantization(1, OUTPUT_COPIES)
    if memory.recipe.compensate:  # the down projections that are quantized
        quantizing += memory.largest_matrices * memory.dtype.itemsize
    weight_bytes = memory.expert_weights * memory.dtype.itemsize
    # codes of a byte, weights in the model and their replacements, and chunks in float32
    installing = memory.expert_weights + 2 * weight_bytes + 4 * memory.largest_matrices // 8
    collecting = memory.collecting_hessians + memory.slope_moments + memory.slope_pairs
    peak = max(collecting, quantizing, installing, memory.compensating)
    if memory.recipe.reconstruction_epochs:
        weights = memory.expert_weights + memory.linear_weights
        training = weights * memory.layer_trained_bytes + memory.routed_pairs(backward=True)
        if memory.on_gpu:  # the next layer is not read while this one is trained
            training -= weight_bytes
        peak = max(peak, training)
    return peak


def _distillation_bytes(memory: LayerMemory) -> int:
    """Bytes for one layer: its dequantized weights and their gradients, and a micro-batch's pairs."""
    if memory.layer.experts is None:
        return 0
    weights = 2 * memory.expert_weights * memory.dtype.itemsize
    dequantizing = DEQUANTIZING_BYTES * min(MAX_CHUNK_WEIGHTS, memory.largest_matrices)
    return weights + memory.routed_pairs(backward=True) + dequantizing
