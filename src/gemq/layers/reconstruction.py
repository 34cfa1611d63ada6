"""A layer at its chosen widths: assembled from candidates, or reconstructed on the quantized model's activations.

Either way the result is the layer's tensors of a checkpoint. Handles one layer at a time and must not access files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemq.calibration.activations import Activations, layer_hessians
from gemq.calibration.expert_hessians import ExpertHessians
from gemq.layers.candidates import LayerCandidates
from gemq.layers.expert_reconstruction import ExpertReconstruction
from gemq.layers.layer_training import LayerTrainer, QuantizedParameter
from gemq.layers.linears import QuantizedLinears, install_linears, linear_parameters, quantize_linears
from gemq.layers.quantizer import Quantizer
from gemq.layers.scheme import QuantizationScheme, matrix_widths
from gemq.layers.training import Training, as_parameter
from gemq.layers.trellis_experts import TrellisBatch, dequantize_experts
from gemq.models.expert_parallel import can_shard_windows, gather_experts
from gemq.models.replay import Replay
from gemq.models.structure import Experts, Layer, Linear, Matrix
from gemq.quant.grid import Quantized, dequantize, dequantize_each
from gemq.quant.packing import PackedMatrix
from gemq.quant.trellis_matrix import TrellisMatrix
from gemq.quant.widths import ExpertWidths, Width, affine_widths, trellis_widths
from gemq.runtime.activation_store import ActivationStore

TUNED = "tuned:"
"""Prefix of the names of router and norm parameters in a layer's file."""

MAX_CHUNK_CODES = 1 << 28
"""Upper bound for the codes of experts of one width that are packed or unpacked in one batch."""


@dataclass(frozen=True)
class Targets:
    """What a layer is trained towards, and how.

    Attributes:
        hidden: Outputs [B, S, H] of the full-precision layer, one for each micro-batch of this rank.
        stored_dtypes: Dtype in which each parameter of the model is stored.
        training: Settings.
    """

    hidden: ActivationStore
    stored_dtypes: dict[str, torch.dtype]
    training: Training


@dataclass
class QuantizedLayer:
    """A layer as it is stored in a checkpoint.

    Attributes:
        tensors: Packed tensors by their names in the checkpoint.
        tuned: Trained router and norm parameters by name inside the model, float32.
        retries: Number of Hessians that needed more dampening.
        error_before: Relative error of the layer's output on validation micro-batches without training; 0 if untrained.
        error_after: The same with training.
    """

    tensors: dict[str, Tensor]
    tuned: dict[str, Tensor] = field(default_factory=dict)
    retries: int = 0
    error_before: float = 0.0
    error_after: float = 0.0

    def to_tensors(self) -> dict[str, Tensor]:
        """Return everything as tensors by their names in a file."""
        tensors = dict(self.tensors)
        for name, tensor in self.tuned.items():
            tensors[TUNED + name] = tensor
        tensors["notes"] = torch.tensor([self.retries, self.error_before, self.error_after], dtype=torch.float64)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> QuantizedLayer:
        """Read what ``to_tensors`` has returned. Takes over ``tensors``."""
        retries, error_before, error_after = tensors.pop("notes").tolist()
        tuned = {}
        for name in list(tensors):
            if name.startswith(TUNED):
                tuned[name.removeprefix(TUNED)] = tensors.pop(name)
        return cls(tensors, tuned, int(retries), error_before, error_after)


def assemble_layer(candidates: LayerCandidates, layer: Layer, widths: Sequence[ExpertWidths]) -> QuantizedLayer:
    """Select the codes of each expert from the candidates.

    Args:
        candidates: The layer at every width.
        layer: Its structure.
        widths: Widths of the two matrices of each expert.
    """
    tensors: dict[str, Tensor] = {}
    for path, packed in candidates.linears.items():
        tensors.update(packed.select(0).named(path))
    for name, expert_widths in matrix_widths(layer, widths).items():
        assert layer.experts is not None
        for expert, width in enumerate(expert_widths):
            matrix = candidates.experts[name][width].select(expert)
            tensors.update(matrix.named(_expert_name(layer.experts, expert, name)))
    return QuantizedLayer(tensors)


def reconstruct_layer(
    replay: Replay,
    index: int,
    activations: Activations,
    quantizer: Quantizer,
    widths: Sequence[ExpertWidths],
    dense_width: Width | None,
    targets: Targets | None = None,
    gradients: Tensor | None = None,
) -> QuantizedLayer:
    """Quantize a layer at its chosen widths on the activations of the quantized layers before it.

    Attention is quantized first, so that the Hessians of what follows see the output of the quantized attention. The
    final weights are left in the model.

    Args:
        replay: The model, and the ranks that share the work.
        index: Index of the layer.
        activations: Outputs of the quantized layers before.
        quantizer: Settings.
        widths: Widths of the two matrices of each expert.
        dense_width: Width of the dense linears; None leaves them unquantized.
        targets: If present, the quantized layer is trained.
        gradients: [H, H] float32, second moment of the gradient of the loss at the output of the experts. Makes error
            feedback of trellis codes aware of what outputs matter together.
    """
    scheme = QuantizationScheme(widths, dense_width)
    reconstruction = _LayerReconstruction(replay, index, activations, quantizer, scheme, targets, gradients)
    reconstruction.quantize_attention()
    reconstruction.quantize_other_matrices()
    reconstruction.train()
    reconstruction.pack()
    install_layer(replay.model, reconstruction.layer, reconstruction.result, scheme)
    return reconstruction.result


class _LayerReconstruction:
    """The steps from a full-precision layer to its packed tensors.

    Attributes:
        linears: The dense linears that are quantized so far.
        parameters: The experts' matrices of this rank; with training, also the dense linears.
        result: The layer as it will be stored.
    """

    def __init__(
        self,
        replay: Replay,
        index: int,
        activations: Activations,
        quantizer: Quantizer,
        scheme: QuantizationScheme,
        targets: Targets | None,
        gradients: Tensor | None,
    ):
        self.replay, self.index, self.activations = replay, index, activations
        self.quantizer, self.scheme, self.targets, self.gradients = quantizer, scheme, targets, gradients
        self.layer = replay.structure.layers[index]
        self.linears = QuantizedLinears()
        self.parameters: list[QuantizedParameter] = []
        self.result = QuantizedLayer({})

    def quantize_attention(self) -> None:
        """Quantize the linears of attention and install them in the model."""
        attention = [linear for linear in self.scheme.linears(self.layer) if linear.kind == "attention"]
        if attention:
            self._quantize_linears(attention, [])

    def quantize_other_matrices(self) -> None:
        """Quantize all other linears and install them, and quantize this rank's experts."""
        others = [linear for linear in self.scheme.linears(self.layer) if linear.kind != "attention"]
        if self.layer.experts is None:
            self._quantize_linears(others, [])
            self.result.retries = self.linears.retries
            return
        experts = ExpertReconstruction(
            self.replay,
            self.index,
            self.activations,
            self.quantizer,
            self.scheme,
            self.gradients,
            with_soft_codes=self.targets is not None,
        )
        self._quantize_linears(others, [experts.inputs])
        self.parameters += experts.quantize()
        self.result.retries = self.linears.retries + experts.retries

    def train(self) -> None:
        """Train all quantized matrices, router and norms towards the targets, if there are any.

        ``layers.training.Training`` has the learning rates: one for all codes and one for all grids, whether of routed
        experts, shared experts or attention.
        """
        if self.targets is None:
            return
        replay, activations, experts = self.replay, self.activations, self.layer.experts
        linears = self.scheme.linears(self.layer)
        self.parameters += linear_parameters(linears, self.linears)
        sharded = activations.can_shard_windows(replay.ranks)
        if experts is not None and not can_shard_windows(replay.model, experts, replay.ranks):
            sharded = False
        trainer = LayerTrainer(
            replay,
            self.index,
            activations.gather_for_training(replay, sharded),
            activations.gather(replay, self.targets.hidden, sharded),
            self.parameters,
            self.targets.training,
            self.targets.stored_dtypes,
            windows_sharded=sharded,
        )
        trained = trainer.run()
        self.parameters = trained.parameters
        self.result.tuned = trained.tuned
        self.result.error_before = trained.error_before
        self.result.error_after = trained.error_after

    def pack(self) -> None:
        """Pack all matrices into the tensors of the result."""
        grids = {parameter.name: self._gather_grids(parameter) for parameter in self.parameters}
        for linear in self.scheme.linears(self.layer):
            packed = self.linears.packed[linear.path]
            name = f"{linear.path}.weight"
            if isinstance(q := grids.get(name), Quantized):
                packed = PackedMatrix.pack(q, packed.width)
            self.result.tensors.update(packed.select(0).named(linear.path))
        if self.layer.experts is not None:
            for matrix in self.layer.experts.matrices:
                self._pack_experts(self.layer.experts, matrix, grids[f"{self.layer.experts.path}.{matrix.name}"])

    def _quantize_linears(self, linears: Sequence[Linear], expert_hessians: Sequence[ExpertHessians]) -> None:
        """Quantize and install dense linears.

        Args:
            linears: The dense linears.
            expert_hessians: Accumulate Hessians of experts in the same forward pass.
        """
        hessians, _ = layer_hessians(
            self.replay, self.index, self.activations, linears, expert_hessians, with_outputs=False
        )
        width = self.scheme.dense_width
        with_soft_codes = self.targets is not None
        quantized = quantize_linears(self.replay, linears, hessians, self.quantizer, width, with_soft_codes)
        install_linears(self.replay.model, linears, quantized.packed)
        self.linears.update(quantized)

    def _gather_grids(self, parameter: QuantizedParameter) -> Quantized | TrellisBatch:
        """Return the codes of a parameter on every rank: experts are concatenated, a linear comes from rank 0."""
        ranks, experts = self.replay.ranks, self.layer.experts
        if isinstance(parameter.q, TrellisBatch):
            assert experts is not None
            matrix_name = parameter.name.rpartition(".")[2]
            widths = trellis_widths(self.scheme.matrix_widths(self.layer)[matrix_name])
            model = self.replay.model
            return parameter.q.gather(widths, lambda tensors: gather_experts(model, experts, ranks, tensors))
        if experts is not None and parameter.name.startswith(f"{experts.path}."):
            codes, scales, offsets = gather_experts(self.replay.model, experts, ranks, parameter.q)
            return Quantized(codes, scales, offsets)
        return parameter.q.map(lambda tensor: ranks.broadcast(tensor, 0))

    def _pack_experts(self, experts: Experts, matrix: Matrix, q: Quantized | TrellisBatch) -> None:
        """Pack one matrix of all experts, those of one width in batches."""
        if isinstance(q, TrellisBatch):
            for expert in range(experts.count):
                self.result.tensors.update(q.matrix(expert).named(_expert_name(experts, expert, matrix.name)))
            return
        widths = affine_widths(self.scheme.matrix_widths(self.layer)[matrix.name])
        for width, chunk in _width_chunks(matrix, widths):
            packed = PackedMatrix.pack(q.select(chunk), width)
            for row, expert in enumerate(chunk):
                self.result.tensors.update(packed.select(row).named(_expert_name(experts, expert, matrix.name)))


def layer_overrides(
    model: Any, layer: Layer, quantized: QuantizedLayer, scheme: QuantizationScheme
) -> dict[str, Tensor]:
    """Dequantize a layer's tensors into values of the model's parameters.

    Args:
        model: The model.
        layer: Structure of the layer.
        quantized: The layer as it is stored.
        scheme: Its widths and group size.

    Returns:
        Tensors by the parameters' names inside the model, in their layout and dtype.
    """
    overrides = {}
    for linear, width in scheme.linear_widths(layer):
        q = PackedMatrix.from_tensors(quantized.tensors, linear.path, width).unpack()
        name = f"{linear.path}.weight"
        overrides[name] = as_parameter(model, name, dequantize(q).unsqueeze(0))
    if layer.experts is not None:
        for matrix in layer.experts.matrices:
            name = f"{layer.experts.path}.{matrix.name}"
            weight = _dequantize_experts(quantized, layer, matrix, scheme, model.get_parameter(name).dtype)
            overrides[name] = as_parameter(model, name, weight)
    for name, tensor in quantized.tuned.items():
        overrides[name] = tensor.to(model.get_parameter(name).dtype)
    return overrides


def _dequantize_experts(
    quantized: QuantizedLayer, layer: Layer, matrix: Matrix, scheme: QuantizationScheme, dtype: torch.dtype
) -> Tensor:
    """Return the weights [E, R, C] of one matrix of all experts of a layer."""
    experts = layer.experts
    assert experts is not None
    widths = scheme.matrix_widths(layer)[matrix.name]
    if with_trellis := trellis_widths(widths):
        matrices = []
        for expert, trellis_width in enumerate(with_trellis):
            name = _expert_name(experts, expert, matrix.name)
            matrices.append(TrellisMatrix.from_tensors(quantized.tensors, name, trellis_width))
        return dequantize_experts(matrices, dtype)
    device = quantized.tensors[_expert_name(experts, 0, matrix.name) + ".codes"].device
    weight = torch.empty(experts.count, matrix.rows, matrix.columns, dtype=dtype, device=device)
    for width, chunk in _width_chunks(matrix, affine_widths(widths)):
        names = [_expert_name(experts, expert, matrix.name) for expert in chunk]
        packed = PackedMatrix.stack([PackedMatrix.from_tensors(quantized.tensors, name, width) for name in names])
        weight[chunk] = dequantize_each(packed.unpack(), dtype)
    return weight


@torch.no_grad()
def install_layer(model: Any, layer: Layer, quantized: QuantizedLayer, scheme: QuantizationScheme) -> None:
    """Overwrite all quantized and tuned parameters of a layer of the model with what its stored tensors mean."""
    for name, tensor in layer_overrides(model, layer, quantized, scheme).items():
        model.get_parameter(name).copy_(tensor)


def _width_chunks(matrix: Matrix, widths: Sequence[Width]) -> Iterator[tuple[Width, list[int]]]:
    """Yield experts of one width in chunks that are packed or unpacked in one batch."""
    chunk_size = max(1, MAX_CHUNK_CODES // (matrix.rows * matrix.columns))
    for width in sorted(set(widths)):
        experts = [expert for expert, expert_width in enumerate(widths) if expert_width == width]
        for start in range(0, len(experts), chunk_size):
            yield width, experts[start : start + chunk_size]


def _expert_name(experts: Experts, expert: int, matrix_name: str) -> str:
    """Return the name of an expert's matrix in a checkpoint."""
    return f"{experts.path}.{expert}.{matrix_name}"
