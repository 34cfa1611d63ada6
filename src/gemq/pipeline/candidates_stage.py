"""The candidates: every expert at every width, and the dense linears, layer by layer.

Every layer is written before the next one ends. A stopped job only replays the layers that it has written, so that a
resumed stage gives the same bytes as an uninterrupted one. ``layers.candidates`` computes a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gemq.allocation.scores import ExpertWeights
from gemq.calibration.activations import Activations
from gemq.calibration.windows import Windows
from gemq.layers.candidate_training import expert_chunks
from gemq.layers.candidates import LINEAR_TOKENS, LayerCandidates, build_candidates
from gemq.layers.trellis_experts import dequantize_experts
from gemq.models.byte_sizes import candidate_bytes, count_smaller_groups, count_smaller_rotations
from gemq.models.equalization import SCALING_PREFIX
from gemq.models.experts import expert_weight
from gemq.models.replay import Replay
from gemq.models.structure import Matrix
from gemq.pipeline.context import Job
from gemq.pipeline.stage_settings import candidate_inputs, quantizer_settings, training_settings
from gemq.pipeline.workdir import Stage, layer_file
from gemq.planning.cost_model import Work, Workload
from gemq.planning.memory_model import LayerMemory, ModelMemory
from gemq.quant.gptq import round_to_nearest
from gemq.quant.grid import Quantized, dequantize_each
from gemq.quant.stored_matrix import StoredMatrix, stored_matrix
from gemq.quant.trellis_matrix import TrellisMatrix
from gemq.quant.widths import AnyWidth, Width, group_size_for
from gemq.recipe import Recipe
from gemq.runtime.activation_store import ActivationStore
from gemq.runtime.files import check_free_space
from gemq.runtime.progress import Tick

CANDIDATES = "candidates"
"""Name of the stage: of its directory, and in progress bars and the summary."""

PACKED_OVERHEAD = 1.2
"""Bytes of packed candidates with scales and offsets, as a multiple of their codes."""

MIN_PAIR_SHARE, CPU_FREED_PAIRS = 0.25, 0.35
"""Fitted to measured jobs: the least share of a micro-batch's pairs that training counts, and the share of the pairs
that are freed on a CPU before training takes the most memory."""

BuildLayer = Callable[[int, Activations, bool], tuple[dict[str, Tensor], ActivationStore]]
"""Builds a layer from its index and inputs: the tensors to save, and its outputs if the flag asks for them."""


class CandidateFiles:
    """The candidates of all layers in the work directory."""

    def __init__(self, stage: Stage, replay: Replay, recipe: Recipe):
        """``replay`` holds the full-precision model, ``recipe`` the candidate widths."""
        self.stage = stage
        self._replay, self._recipe = replay, recipe

    def layer(self, index: int, device: str | None = None) -> LayerCandidates:
        """Reads all candidates of a layer to ``device``, by default the job's."""
        tensors = self.stage.load_tensors(layer_file(index), device or str(self._replay.device))
        return LayerCandidates.from_tensors(
            tensors,
            self._replay.structure.layers[index],
            self._recipe.candidate_widths,
            self._recipe.dense_width,
        )

    def counts(self, index: int) -> Tensor:
        """Calibration tokens that were routed to each expert: int64 [E], empty for a dense layer."""
        return self.stage.load_tensor(layer_file(index), "counts")

    def notes(self, index: int) -> list[int]:
        """Counts of fallbacks in a layer: Hessians dampened more, candidates untrained, matrices too small."""
        return [int(note) for note in self.stage.load_tensor(layer_file(index), "notes")]

    def expert_weights(self, index: int, width: AnyWidth) -> ExpertWeights:
        """Both matrices of all experts of a layer at one width, dequantized, in the model's compute type.

        With several ranks each reads its share of the experts. Issues collectives, so all ranks must call it.
        """
        experts = self._replay.structure.layers[index].experts
        assert experts is not None
        module = self._replay.model.get_submodule(experts.path)
        packed = self._packed_matrices(index, width) if self._recipe.score_weights == "candidates" else None
        weights = []
        for matrix in experts.matrices:
            exact = expert_weight(module, matrix.name)
            if packed is not None:
                weights.append(_dequantize(packed[matrix.name], exact.dtype))
            else:
                quantized = self._round_to_nearest(exact, matrix, width)
                weights.append(dequantize_each(quantized, exact.dtype))
        up, down = weights
        return up, down

    def _packed_matrices(self, index: int, width: AnyWidth) -> dict[str, StoredMatrix]:
        """The packed candidates of a layer at one width, by the name of the matrix. Other widths are not read."""
        experts = self._replay.structure.layers[index].experts
        assert experts is not None
        ranks = self._replay.ranks
        prefixes = {f"expert:{matrix.name}:{width}" for matrix in experts.matrices}
        expert_slice = ranks.local_slice(experts.count) if ranks.count > 1 else None
        device = str(self._replay.device)
        local = self.stage.load_tensors(
            layer_file(index), device, lambda key: key.rpartition(".")[0] in prefixes, expert_slice
        )
        tensors = dict(zip(local, ranks.all_gather_cat(list(local.values())), strict=True))
        packed = {}
        for matrix in experts.matrices:
            prefix = f"expert:{matrix.name}:{width}"
            packed[matrix.name] = stored_matrix(tensors, prefix, width)
        return packed

    def _round_to_nearest(self, weight: Tensor, matrix: Matrix, width: AnyWidth) -> Quantized:
        """All experts' matrices [E, rows, columns] rounded to nearest."""
        assert isinstance(width, Width)  # the recipe rejects trellis codes here
        quantized = round_to_nearest(weight, (width,), group_size_for(matrix.columns, self._recipe.group_size))
        return quantized.select(0)


def _dequantize(matrices: StoredMatrix, dtype: torch.dtype) -> Tensor:
    """The weights [E, rows, columns] of a batch of matrices."""
    if isinstance(matrices, TrellisMatrix):
        return dequantize_experts([matrices.select(index) for index in range(len(matrices.codes))], dtype)
    return dequantize_each(matrices.unpack(), dtype)


def run_candidates(job: Job, replay: Replay, windows: Windows) -> CandidateFiles:
    """Quantizes every expert at every width: a file per layer."""
    stage = job.work.stage(CANDIDATES, candidate_inputs(job, windows))
    candidates = CandidateFiles(stage, replay, job.recipe)
    layer_count = len(replay.structure.layers)
    missing = [i for i in range(layer_count) if not stage.has(layer_file(i))]
    _read_scalings(stage, replay, [i for i in range(layer_count) if i not in missing])
    if not missing:
        return candidates
    check_free_space(job.work.path, candidate_bytes(replay.structure, job.recipe) * len(missing) // layer_count)
    build = _layer_builder(job, replay)
    with (
        job.monitor.stage(CANDIDATES, missing[-1] + 1) as tick,
        stage.background_writer(every_rank=True) as save,
    ):
        activations = job.start_activations(replay, windows)
        if replay.ranks.count > 1:
            _build_on_ranks(replay, missing, activations, build, save, tick)
        else:
            for i in replay.walk(range(missing[-1] + 1)):
                if i in missing:
                    tensors, activations.hidden = build(i, activations, True)
                    save(layer_file(i), tensors)
                    del tensors  # memory holds one layer's candidates, not two
                else:
                    activations.advance(replay, i)
                tick()
    if replay.ranks.count > 1:
        _read_scalings(stage, replay, missing)
    return candidates


def _read_scalings(stage: Stage, replay: Replay, indices: Sequence[int]) -> None:
    """Reads how layers were scaled for their candidates, so that they are scaled alike whenever they are loaded."""
    if replay.layer_cache is None:
        return
    for index in indices:
        tensors = stage.load_tensors(layer_file(index), is_wanted=lambda key: key.startswith(SCALING_PREFIX))
        replay.layer_cache.equalization.read_tensors(index, tensors)


def _layer_builder(job: Job, replay: Replay) -> BuildLayer:
    """Builds layers as the recipe says, each on one rank alone."""
    recipe = job.recipe
    quantizer = quantizer_settings(recipe)
    expert_training = training_settings(job, recipe.candidate_epochs, recipe.lr_candidates)
    linear_training = training_settings(job, recipe.candidate_epochs, recipe.lr_codes, train_parameters=False)
    single_rank_replay = replay.single_rank()

    def build(index: int, inputs: Activations, with_outputs: bool) -> tuple[dict[str, Tensor], ActivationStore]:
        layer, outputs = build_candidates(
            single_rank_replay,
            index,
            inputs,
            quantizer,
            recipe.candidate_widths,
            recipe.dense_width,
            expert_training,
            linear_training,
            with_outputs,
        )
        tensors = layer.to_tensors()
        if replay.layer_cache is not None:
            tensors |= replay.layer_cache.equalization.to_tensors(index)
        return tensors, outputs

    return build


class _Round(NamedTuple):
    """Layers that the ranks build at the same time, one each.

    layers: all layers of the round, those included that have their candidates already
    missing: those to build
    local: the one that this rank builds; None where there are fewer than ranks
    """

    layers: range
    missing: list[int]
    local: int | None


def _rounds(missing: list[int], rank: int, count: int) -> list[_Round]:
    """The rounds in which ``count`` ranks build the ``missing`` layers."""
    rounds = []
    start = 0
    for offset in range(0, len(missing), count):
        layers = missing[offset : offset + count]
        local = layers[rank] if rank < len(layers) else None
        rounds.append(_Round(range(start, layers[-1] + 1), layers, local))
        start = layers[-1] + 1
    return rounds


def _build_on_ranks(
    replay: Replay,
    missing: list[int],
    activations: Activations,
    build: BuildLayer,
    save: Callable[[str, dict[str, Tensor] | None], None],
    tick: Tick,
) -> None:
    """Builds the missing layers on several ranks, each as if its rank were alone.

    In each round all ranks first run the round's layers, each on its own micro-batches, and gather the inputs of every
    missing layer on the rank that builds it.
    """
    rounds = _rounds(missing, replay.ranks.rank, replay.ranks.count)
    visits: list[int] = []
    for current in rounds:
        visits += current.layers
        if current.local is not None:
            visits.append(current.local)
    walk = replay.walk(visits)
    for current in rounds:
        inputs: Activations | None = None
        for i in current.layers:
            next(walk)
            if i == current.local:
                inputs = activations.gather_for_training(replay)
            elif i in current.missing:
                activations.join_gather(replay)
            if i < missing[-1]:
                activations.advance(replay, i)
        if current.local is None or inputs is None:
            save("", None)
        else:
            tensors, _ = build(next(walk), inputs, False)
            save(layer_file(current.local), tensors)
        for _ in current.layers:
            tick()


def count_candidate_fallbacks(job: Job, replay: Replay, candidates: CandidateFiles) -> None:
    """Counts what the candidates could not do as requested, for the summary."""
    structure = replay.structure
    without_tokens = few_tokens = dampened_more = untrained = too_small = 0
    for i, layer in enumerate(structure.layers):
        retries, not_improved, below_scales = candidates.notes(i)
        dampened_more += retries
        untrained += not_improved
        too_small += below_scales
        if layer.experts is not None:
            counts = candidates.counts(i)
            without_tokens += int((counts == 0).sum())
            few_tokens += int(((counts > 0) & (counts < layer.experts.matrices[0].columns)).sum())
    job.fallbacks.update(
        experts_without_tokens=without_tokens,
        experts_with_few_tokens=few_tokens,
        hessians_damped_more=dampened_more,
        candidates_not_improved_by_training=untrained,
        matrices_in_smaller_groups=count_smaller_groups(structure, job.recipe),
        matrices_in_smaller_rotations=count_smaller_rotations(structure, job.recipe),
        linears_not_quantized=len(structure.unquantized_linears),
        matrices_too_small_for_scales=too_small,
    )


# Costs


def candidates_work(workload: Workload) -> Work:
    """Work of the stage: a forward pass, GPTQ at every width, and training each expert at each width."""
    recipe, tokens, widths = workload.recipe, workload.tokens, workload.widths
    steps = workload.training_steps(recipe.candidate_epochs)
    linear_tokens = min(tokens, LINEAR_TOKENS) * recipe.candidate_epochs
    linear_steps = linear_tokens / workload.micro_batch_tokens
    work = Work()
    for layer in workload.structure.layers:
        work += workload.forward(layer, tokens) + workload.quantize(layer, widths)
        if recipe.candidate_epochs and recipe.dense_width is not None:
            linear_weights = sum(linear.rows * linear.columns for linear in layer.linears)
            work += workload.forward(layer, linear_tokens, linear_steps) * 3
            work += workload.train(linear_weights, linear_steps)
        if recipe.candidate_epochs and recipe.codes != "trellis" and layer.experts is not None:
            expert_weights = layer.experts.count * layer.experts.weights_per_expert
            exact_and_candidates = 1 + 3 * widths  # a training step of a candidate costs three forward passes
            work += workload.experts(layer, steps * workload.micro_batch_tokens, steps) * exact_and_candidates
            work += workload.train(expert_weights * widths, steps)
    return work


def candidates_peak_bytes(model: ModelMemory, training_bytes: int) -> int:
    """Most device memory that the stage computes with.

    Args:
        model: the model's sizes.
        training_bytes: for the state of experts that are trained at the same time.
    """
    return model.largest_layer(lambda memory: _layer_bytes(memory, training_bytes))


def _layer_bytes(memory: LayerMemory, training_bytes: int) -> int:
    """Bytes for the candidates of one layer."""
    if memory.layer.experts is None:
        return memory.dense_hessians + memory.dense_quantization
    if memory.recipe.candidate_epochs and memory.recipe.codes != "trellis":
        building = _training_bytes(memory, training_bytes)
    else:
        widths = len(memory.recipe.candidate_widths)
        hessians = memory.dense_hessians + memory.expert_hessians
        quantizing_experts = memory.mean_hessians + memory.expert_quantization(widths)
        building = hessians + max(quantizing_experts, memory.dense_quantization)
    return max(memory.collecting_hessians, building)


def _training_bytes(memory: LayerMemory, training_bytes: int) -> int:
    """Bytes while a layer's experts are quantized and trained, some at the same time."""
    recipe, experts = memory.recipe, memory.experts
    widths = len(recipe.candidate_widths)
    chunk = max(rows.stop - rows.start for rows in expert_chunks(experts, widths, training_bytes))
    chunk_weights = chunk * experts.weights_per_expert * widths
    pair_share = widths * min(1.0, 2 * chunk / experts.count)  # of a micro-batch's pairs, at every width
    pairs = memory.routed_pairs(backward=True)
    bits = sum(width.bits for width in recipe.candidate_widths)
    packed = round(memory.expert_weights * bits / 8 * PACKED_OVERHEAD)
    quantizing = 3 * chunk_weights + memory.expert_chunk(widths)  # codes and soft codes
    training = chunk_weights * memory.trained_bytes + round(max(pair_share, MIN_PAIR_SHARE) * pairs)
    total = memory.mean_hessians + packed + max(quantizing, training, packed)
    if not memory.on_gpu:  # Hessians are offloaded to host memory, which is the device here
        total += memory.expert_hessians - round(CPU_FREED_PAIRS * pair_share * pairs)
    return total
