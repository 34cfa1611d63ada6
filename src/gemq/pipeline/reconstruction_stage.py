"""The finish at chosen widths: every layer refined and trained, then the whole model distilled.

Resumable by layer; distillation, the short last step, starts anew. What is computed stands in ``layers.refinement``,
``layers.training`` and ``distillation.distill``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemq.allocation.problem import Allocation
from gemq.distillation.distill import Distilled, distil
from gemq.distillation.settings import Distillation
from gemq.layers.refinement import RefinedLayer, Targets, layer_overrides, refine_layer
from gemq.models.replay import Replay
from gemq.pipeline.context import Job
from gemq.pipeline.layer_stages import Around, layer_file
from gemq.pipeline.records import digest
from gemq.pipeline.workdir import Stage
from gemq.planning.memory_model import Footprint
from gemq.quant.widths import ExpertWidths
from gemq.runtime.activation_store import Batches


@dataclass
class Finish:
    """A finished model, layer by layer from the work directory.

    tuned: every trained router and norm by its name inside the model, float32
    gains: what training gained on held-out windows, for the summary
    """

    refined: Stage
    count: int
    distilled: Distilled
    made_from: dict[str, Any]
    tuned: dict[str, Tensor] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)

    def layers(self) -> Iterator[RefinedLayer]:
        """The layers with what distillation changed in them."""
        return (self.layer(i) for i in range(self.count))

    def layer(self, index: int, device: str = "cpu") -> RefinedLayer:
        layer = RefinedLayer.from_tensors(self.refined.load_tensors(layer_file(index), device))
        layer.tensors.update({n: t.to(device) for n, t in self.distilled.tensors.items() if n in layer.tensors})
        layer.tuned.update({n: t.to(device) for n, t in self.distilled.tuned.items() if n in layer.tuned})
        return layer

    def around(self, job: Job, replay: Replay, widths: list[list[ExpertWidths]]) -> Around:
        """The finished model as one to compute scores around. ``replay`` holds the full-precision one."""
        structure = replay.structure

        def overrides(index: int) -> dict[str, Tensor]:
            layer = self.layer(index, str(job.device))
            return layer_overrides(replay.model, structure.layers[index], layer, job.scheme(widths[index]))

        inside = structure.layers_path + "."
        tail = {n: t.to(replay.model.get_parameter(n)) for n, t in self.tuned.items() if not n.startswith(inside)}
        return Around(self.made_from, overrides, tail)


def run_finish(job: Job, replay: Replay, stored: dict[str, torch.dtype], chosen: Allocation) -> Finish:
    """Refines, trains and distils at the chosen widths. ``replay`` keeps its full-precision weights."""
    widths = chosen.by_layer
    inputs = {**job.refine_inputs(), "allocation": digest(widths)}
    refined = job.work.stage(f"refined-{digest(inputs)[:8]}", inputs)
    inputs = {**job.distil_inputs(), "allocation": digest(widths)}
    last = job.work.stage(f"distilled-{digest(inputs)[:8]}", inputs)
    layers = range(len(replay.structure.layers))
    distils = bool(job.recipe.distil_epochs) and not last.has(DISTILLED)
    missing = [i for i in layers if not refined.has(layer_file(i))]
    if missing or distils:
        teacher = _refine(job, replay, stored, refined, widths, missing, distils)
        if distils:
            _distil(job, replay, stored, refined, last, widths, teacher)
    distilled = _load_distilled(last) if job.recipe.distil_epochs else Distilled()
    finish = Finish(refined, len(layers), distilled, inputs)
    _describe(job, finish)
    return finish


DISTILLED = "distilled.safetensors"


def _refine(
    job: Job,
    replay: Replay,
    stored: dict[str, torch.dtype],
    stage: Stage,
    widths: list[list[ExpertWidths]],
    missing: list[int],
    to_the_end: bool,
) -> Batches:
    """Refines the missing layers. Returns the full-precision model's hidden states behind the last layer run.

    to_the_end: run the full-precision model to its end, as distillation needs that
    """
    recipe, structure = job.recipe, replay.structure
    training = job.training(recipe.layer_epochs, recipe.rate_codes)
    with_teacher = training is not None or bool(recipe.distil_epochs)
    end = len(structure.layers) if to_the_end else missing[-1] + 1
    with (
        job.monitor.stage("reconstruct" if training else "refine", end) as tick,
        stage.writing_behind() as save,
    ):
        activations = job.start_activations(replay)
        exact = activations.hidden.copy() if with_teacher else Batches(replay.memory)
        # what trains a layer takes the next one's room: see ``footprint``
        for i in replay.walk(range(end), ahead=training is None):
            if with_teacher:
                activations.advance_all(replay, i, [exact])
            if i in missing:
                targets = Targets(exact, stored, training) if training is not None else None
                done = refine_layer(replay, i, activations, job.quantizer, widths[i], recipe.attention_bits, targets)
                save(layer_file(i), done.to_tensors())
                activations.advance(replay, i)
                replay.restore(i)  # the next stage finds the model in full precision
            elif missing and i < missing[-1]:
                done = RefinedLayer.from_tensors(stage.load_tensors(layer_file(i), str(job.device)))
                own = layer_overrides(replay.model, structure.layers[i], done, job.scheme(widths[i]))
                activations.advance(replay, i, own)
            tick()
    return exact


def _distil(
    job: Job,
    replay: Replay,
    stored: dict[str, torch.dtype],
    refined: Stage,
    stage: Stage,
    widths: list[list[ExpertWidths]],
    teacher: Batches,
) -> None:
    recipe = job.recipe
    training = job.training(recipe.distil_epochs, 0.0)
    assert training is not None

    def layer(index: int) -> RefinedLayer:
        return RefinedLayer.from_tensors(refined.load_tensors(layer_file(index), str(job.device)))

    with job.monitor.stage("distil", 1) as tick:
        how = Distillation(training, recipe.distil_loss, recipe.distil_sets, stored)
        start, schemes = job.start_activations(replay), [job.scheme(layer_widths) for layer_widths in widths]
        model = replay.model
        footprint = Footprint(replay.structure, recipe, model.config, model.dtype, replay.device)
        beside = footprint.stages(job.train_room)["distil"]
        done = distil(replay, layer, schemes, start, teacher, how, tick, beside)
    notes = torch.tensor([done.before, done.after], dtype=torch.float64)
    tuned = {f"tuned:{name}": tensor for name, tensor in done.tuned.items()}
    stage.save_tensors(DISTILLED, {**done.tensors, **tuned, "notes": notes})


def _load_distilled(stage: Stage) -> Distilled:
    tensors = stage.load_tensors(DISTILLED)
    before, after = tensors.pop("notes").tolist()
    tuned = {n.removeprefix("tuned:"): tensors.pop(n) for n in list(tensors) if n.startswith("tuned:")}
    return Distilled(tensors, tuned, before, after)


def _describe(job: Job, finish: Finish) -> None:
    """Counts, gains and trained parameters of all layers."""
    retries = kept = 0
    before = after = 0.0
    for i in range(finish.count):
        layer = RefinedLayer.from_tensors(finish.refined.load_tensors(layer_file(i)))
        finish.tuned.update(layer.tuned)
        retries += layer.retries
        kept += int(bool(job.recipe.layer_epochs) and not layer.after < layer.before)  # NaN counts
        before += layer.before / finish.count
        after += layer.after / finish.count
    finish.tuned.update(finish.distilled.tuned)
    job.fallbacks["hessians_damped_more"] = job.fallbacks.get("hessians_damped_more", 0) + retries
    job.fallbacks["layers_not_improved_by_training"] = kept
    if job.recipe.layer_epochs:
        finish.gains.update(reconstruction_before=before, reconstruction_after=after)
    if job.recipe.distil_epochs:
        finish.gains.update(distillation_before=finish.distilled.before, distillation_after=finish.distilled.after)
        job.fallbacks["distillation_dropped"] = int(not finish.distilled.after < finish.distilled.before)
