"""Candidates of a layer: every expert quantized at every width, and the dense linears at their width.

Candidates are computed from full-precision activations and do not depend on the allocation, which only selects among
them. Another budget therefore needs no new quantization. Handles one layer at a time and must not access files.

Shapes: E experts, W widths, R rows, C columns. ``quant.packing`` describes packed codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemq.calibration.activations import Activations, layer_hessians
from gemq.calibration.expert_hessians import InputHessians
from gemq.calibration.input_recorder import RecordedExpertCalls
from gemq.layers.candidate_training import CandidateTrainer, ExpertInputs, expert_chunks, train_state_sizes
from gemq.layers.layer_training import LayerResult, LayerTrainer
from gemq.layers.linears import linear_parameters, quantize_linears, refuse_clipped
from gemq.layers.quantizer import Quantizer
from gemq.layers.scheme import quantized_linears
from gemq.layers.training import Training
from gemq.models.experts import expert_weight
from gemq.models.replay import Replay
from gemq.models.structure import Experts, Layer
from gemq.quant.grid import Quantized, below_scales
from gemq.quant.hessian import HessianAccumulator
from gemq.quant.packing import PackedMatrix
from gemq.quant.stored_matrix import StoredMatrix, stored_matrix
from gemq.quant.trainable_gpu import soft_code_dtype
from gemq.quant.widths import AnyWidth, TrellisWidth, Width, affine_widths, trellis_widths
from gemq.runtime.activation_store import ActivationStore

LINEAR_TOKENS = 262_144
"""Calibration tokens that dense linears are trained on: they have few weights and many bits."""


@dataclass
class LayerCandidates:
    """The candidates of one layer.

    Attributes:
        linears: Packed batches of one matrix, [1, ...], at the dense width, by module path.
        experts: Stored batches [E, ...] by matrix name and width.
        counts: [E] int64, calibration tokens routed to each expert; empty for a dense layer.
        retries: Number of Hessians that needed more dampening.
        not_improved: Number of experts at a width, and of dense linears, that keep GPTQ's codes since training did not
            lower the validation error.
        small: Number of matrices whose weights are below the smallest scale.
    """

    linears: dict[str, PackedMatrix] = field(default_factory=dict)
    experts: dict[str, dict[AnyWidth, StoredMatrix]] = field(default_factory=dict)
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    retries: int = 0
    not_improved: int = 0
    small: int = 0

    def to_tensors(self) -> dict[str, Tensor]:
        """Return everything as tensors by their names in a file."""
        tensors = {"counts": self.counts, "notes": torch.tensor([self.retries, self.not_improved, self.small])}
        for path, packed in self.linears.items():
            tensors.update(packed.named(f"linear:{path}"))
        for name, packed_by_width in self.experts.items():
            for width, matrices in packed_by_width.items():
                tensors.update(matrices.named(f"expert:{name}:{width}"))
        return tensors

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], layer: Layer, widths: tuple[AnyWidth, ...], dense_width: Width | None
    ) -> LayerCandidates:
        """Read what ``to_tensors`` has returned."""
        linears = {}
        if dense_width is not None:
            for linear in layer.linears:
                linears[linear.path] = PackedMatrix.from_tensors(tensors, f"linear:{linear.path}", dense_width)
        experts: dict[str, dict[AnyWidth, StoredMatrix]] = {}
        for matrix in layer.experts.matrices if layer.experts else ():
            experts[matrix.name] = {}
            for width in widths:
                prefix = f"expert:{matrix.name}:{width}"
                experts[matrix.name][width] = stored_matrix(tensors, prefix, width)
        retries, not_improved, small = tensors["notes"].tolist()
        return cls(linears, experts, tensors["counts"], retries, not_improved, small)


def build_candidates(
    replay: Replay,
    index: int,
    activations: Activations,
    quantizer: Quantizer,
    widths: tuple[AnyWidth, ...],
    dense_width: Width | None,
    training: Training | None = None,
    linear_training: Training | None = None,
    with_outputs: bool = True,
) -> tuple[LayerCandidates, ActivationStore]:
    """Quantize a layer at every width on full-precision activations.

    Args:
        replay: The model, of this rank alone.
        index: Index of the layer.
        activations: Inputs of the layer.
        quantizer: Settings.
        widths: Candidate widths of the experts.
        dense_width: Width of the dense linears; None leaves them unquantized.
        training: Trains every expert at every width on its own, after GPTQ. Trellis codes are not trained.
        linear_training: Trains the dense linears together, towards the output of the layer.
        with_outputs: Whether the caller needs the outputs of the layer.

    Returns:
        The candidates, and the outputs of the full-precision layer.
    """
    layer = replay.structure.layers[index]
    experts = layer.experts
    linears = quantized_linears(layer, dense_width)
    widths_with_trellis = trellis_widths(widths)
    if widths_with_trellis:
        training = None
    calls = RecordedExpertCalls(replay.memory) if training is not None and experts is not None else None
    trains_linears = linear_training is not None
    expert_hessians = None if experts is None else InputHessians(experts, slice(0, experts.count), replay.device)
    accumulators = [] if expert_hessians is None else [expert_hessians]
    linear_hessians, outputs = layer_hessians(
        replay, index, activations, linears, accumulators, calls, with_outputs or trains_linears
    )
    quantized = quantize_linears(
        replay, linears, linear_hessians, quantizer, dense_width, with_soft_codes=trains_linears
    )
    candidates = LayerCandidates(quantized.packed, retries=quantized.retries, small=quantized.small)
    input_hessians = [] if expert_hessians is None else expert_hessians.by_matrix()
    if training is not None:  # training needs the memory of the Hessians
        for hessians in input_hessians:
            hessians.offload(lambda sums: ActivationStore(replay.memory, sums))
    if linear_training is not None and linears:
        parameters = linear_parameters(linears, quantized)
        max_batches = max(2, LINEAR_TOKENS // activations.ids[0].numel())
        trainer = LayerTrainer(
            replay, index, activations, outputs, parameters, linear_training, {}, max_batches=max_batches
        )
        _pack_trained_linears(trainer.run(), candidates)
    if experts is not None:
        module = replay.model.get_submodule(experts.path)
        if widths_with_trellis:
            _build_trellis_candidates(module, experts, input_hessians, quantizer, widths_with_trellis, candidates)
            return candidates, outputs
        inputs = ExpertInputs(module, experts, calls) if calls is not None else None
        builder = _ExpertCandidates(
            module, experts, input_hessians, inputs, quantizer, affine_widths(widths), training, index
        )
        builder.build(candidates)
    return candidates, outputs


def _pack_trained_linears(result: LayerResult, candidates: LayerCandidates) -> None:
    """Replace the dense linears of ``candidates`` by trained ones."""
    for parameter in result.parameters:
        path = parameter.name.removesuffix(".weight")
        assert isinstance(parameter.q, Quantized)
        candidates.linears[path] = PackedMatrix.pack(parameter.q, affine_widths(parameter.widths)[0])
    if result.error_after >= result.error_before:
        candidates.not_improved += len(result.parameters)


def _build_trellis_candidates(
    module: Any,
    experts: Experts,
    hessians: Sequence[HessianAccumulator],
    quantizer: Quantizer,
    widths: tuple[TrellisWidth, ...],
    candidates: LayerCandidates,
) -> None:
    """Add a layer's experts with trellis codes at every width to ``candidates``."""
    for matrix, matrix_hessians in zip(experts.matrices, hessians, strict=True):
        weight = expert_weight(module, matrix.name)
        candidates.small += below_scales(weight)
        batches, retries = quantizer.quantize_trellis(weight, matrix_hessians, widths)
        candidates.experts[matrix.name] = dict(zip(widths, batches, strict=True))
        candidates.retries += retries
        refuse_clipped(experts.stored_names(matrix), batches)
    candidates.counts = hessians[0].counts.cpu()


@dataclass(frozen=True)
class _ExpertCandidates:
    """Quantizes, and where requested trains, the experts of one layer at every width.

    Attributes:
        module: The experts module of the model.
        experts: Its structure.
        hessians: Of the inputs of both matrices.
        inputs: What the experts are trained on.
        quantizer: Settings.
        widths: Candidate widths.
        training: None leaves GPTQ's codes.
        layer_index: Part of the seed of training.
    """

    module: Any
    experts: Experts
    hessians: Sequence[HessianAccumulator]
    inputs: ExpertInputs | None
    quantizer: Quantizer
    widths: tuple[Width, ...]
    training: Training | None
    layer_index: int

    def build(self, candidates: LayerCandidates) -> None:
        """Add the experts to ``candidates``, a chunk of experts at a time."""
        chunks_by_name: dict[str, list[list[PackedMatrix]]] = {matrix.name: [] for matrix in self.experts.matrices}
        for chunk in self._chunks():
            grids = self._quantize_chunk(chunk, candidates)
            for matrix, q in zip(self.experts.matrices, grids, strict=True):
                packed = [PackedMatrix.pack(q.select(i), width) for i, width in enumerate(self.widths)]
                chunks_by_name[matrix.name].append(packed)
            del grids, q  # frees as much memory as the next chunk needs
        for matrix in self.experts.matrices:
            packed_by_width: dict[AnyWidth, StoredMatrix] = {}
            for i, width in enumerate(self.widths):
                packed_by_width[width] = PackedMatrix.cat([chunk[i] for chunk in chunks_by_name[matrix.name]])
            candidates.experts[matrix.name] = packed_by_width
            refuse_clipped(self.experts.stored_names(matrix), packed_by_width.values())
        candidates.counts = self.hessians[0].counts.cpu()

    def _chunks(self) -> Iterable[slice]:
        """Return slices of the experts that are quantized and trained together."""
        if self.training is None:
            return [slice(0, self.experts.count)]
        state_bytes = self.training.state_bytes or train_state_sizes(self.hessians[0].counts.device)[0]
        return expert_chunks(self.experts, len(self.widths), state_bytes)

    def _quantize_chunk(self, chunk: slice, candidates: LayerCandidates) -> list[Quantized]:
        """Return the grids [W, E, ...] of both matrices of some experts, and count what happened in ``candidates``."""
        grids: list[Quantized] = []
        soft_codes: list[Tensor] = []
        for matrix, hessians in zip(self.experts.matrices, self.hessians, strict=True):
            weight = expert_weight(self.module, matrix.name)[chunk]
            candidates.small += below_scales(weight)
            matrix_codes = None
            if self.training is not None:
                dtype = soft_code_dtype(weight.device, weight.dtype)
                matrix_codes = weight.new_empty(len(self.widths), *weight.shape, dtype=dtype)
                soft_codes.append(matrix_codes)
            q, retries = self.quantizer.quantize_all(weight, hessians, self.widths, matrix_codes, chunk.start)
            grids.append(q)
            candidates.retries += retries
        if self.training is not None and self.inputs is not None:
            trainer = CandidateTrainer(self.inputs, chunk, self.widths, self.training, self.layer_index)
            grids, num_not_improved = trainer.run(grids, soft_codes)
            candidates.not_improved += num_not_improved
        return grids
