"""Quantization of a layer's experts at their chosen widths, on the activations of the quantized model.

The first matrices (gate and up) are quantized first. Down projections then see the inputs that the quantized first
matrices give them, and make up for how these changed.

Shapes: E experts of this rank, R rows, C columns, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemq.calibration.activations import Activations, layer_hessians
from gemq.calibration.expert_hessians import ExpertHessians, HiddenChanges, HiddenHessians, InputHessians
from gemq.layers.layer_training import QuantizedParameter
from gemq.layers.output_hessians import OutputHessians, is_practical
from gemq.layers.quantizer import Quantizer
from gemq.layers.scheme import QuantizationScheme
from gemq.layers.trellis_experts import TrellisBatch
from gemq.models.expert_parallel import local_expert_slice
from gemq.models.experts import expert_weight
from gemq.models.replay import Replay
from gemq.models.structure import Experts, Matrix
from gemq.quant.grid import dequantize_each
from gemq.quant.hessian import HessianAccumulator
from gemq.quant.trainable_gpu import soft_code_dtype
from gemq.quant.widths import affine_widths, trellis_widths
from gemq.runtime.integers import ceil_div


class ExpertReconstruction:
    """The steps from full-precision experts to their codes.

    Attributes:
        inputs: Hessians of the experts' inputs, to be accumulated before ``quantize`` is called.
        retries: Number of Hessians that needed more dampening, of all ranks.
    """

    def __init__(
        self,
        replay: Replay,
        index: int,
        activations: Activations,
        quantizer: Quantizer,
        scheme: QuantizationScheme,
        gradients: Tensor | None,
        *,
        with_soft_codes: bool,
    ):
        """
        Args:
            replay: The model, and the ranks that share the work.
            index: Index of the layer, which has experts.
            activations: Outputs of the quantized layers before.
            quantizer: Settings.
            scheme: Widths.
            gradients: [H, H] float32, see ``reconstruct_layer``.
            with_soft_codes: Whether affine codes before rounding are kept, from which training starts.
        """
        self.replay, self.index, self.activations = replay, index, activations
        self.quantizer, self.gradients, self.with_soft_codes = quantizer, gradients, with_soft_codes
        layer = replay.structure.layers[index]
        assert layer.experts is not None
        self.experts = layer.experts
        self.widths = scheme.matrix_widths(layer)
        self.module = replay.model.get_submodule(self.experts.path)
        self.local_experts = local_expert_slice(replay.model, self.experts, replay.ranks)
        self.inputs = InputHessians(
            self.experts,
            self.local_experts,
            replay.device,
            with_down=not quantizer.compensates,
            with_slopes=gradients is not None and is_practical(self.experts),
        )
        self.retries = 0

    def quantize(self) -> list[QuantizedParameter]:
        """Quantize both matrices of this rank's experts. Releases ``inputs``. Runs collectives."""
        first, down = self.experts.matrices
        outputs = None
        if self.gradients is not None:
            outputs = OutputHessians(
                self.module,
                self.experts,
                self.local_experts,
                self.gradients,
                self.inputs.slopes,
                self.quantizer.shrinkage,
            )
        quantized_first = self._quantize_matrix(first, self._weight(first), self.inputs.first, outputs)
        down_weight, down_hessians = self._weight(down), self.inputs.down
        del self.inputs  # frees the memory that Hessians of down take
        if down_hessians is None:
            down_weight, down_hessians = self._compensated_down(_weights(quantized_first, down_weight.dtype))
        quantized_down = self._quantize_matrix(down, down_weight, down_hessians, outputs)
        if len(down_weight) != self.experts.count:
            self.retries = self.replay.ranks.all_reduce_int(self.retries)
        return [quantized_first, quantized_down]

    def _weight(self, matrix: Matrix) -> Tensor:
        """Return the full-precision weights [E, R, C] of one matrix of this rank's experts."""
        return expert_weight(self.module, matrix.name)[self.local_experts]

    def _compensated_down(self, quantized_first: Tensor) -> tuple[Tensor, HessianAccumulator]:
        """Return down projections that make up for the quantization of the first matrices.

        Changes are accumulated for as many experts at a time as fit into the memory of the first matrices' Hessians.

        Args:
            quantized_first: [E, R, C], quantized first matrices.

        Returns:
            [E, H, I], and the Hessians of their inputs with quantized first matrices.
        """
        weight = self._weight(self.experts.matrices[1])
        hidden = HiddenHessians(self.experts, self.local_experts, quantized_first)
        passes = compensation_passes(self.experts, self.replay.ranks.count)
        result = torch.empty_like(weight)
        for index in range(passes):
            start, stop = (len(weight) * end // passes for end in (index, index + 1))
            pass_experts = slice(self.local_experts.start + start, self.local_experts.start + stop)
            changes = HiddenChanges(self.experts, pass_experts, quantized_first[start:stop])
            accumulators: list[ExpertHessians] = [changes] if index else [hidden, changes]
            layer_hessians(self.replay, self.index, self.activations, [], accumulators, with_outputs=False)
            pass_weight = weight[start:stop]
            result[start:stop] = self.quantizer.compensate(pass_weight, hidden.hessians, changes.changes, start)
            del changes, accumulators  # frees as much memory as the next pass needs
        return result, hidden.hessians

    def _quantize_matrix(
        self, matrix: Matrix, weight: Tensor, hessians: HessianAccumulator, outputs: OutputHessians | None
    ) -> QuantizedParameter:
        """Quantize one matrix of this rank's experts, and count retries.

        Args:
            matrix: Which of their matrices.
            weight: [E, R, C] to quantize.
            hessians: Of its inputs.
            outputs: Makes the Hessians of its outputs.
        """
        name = f"{self.experts.path}.{matrix.name}"
        widths = self.widths[matrix.name][self.local_experts]
        if with_trellis := trellis_widths(widths):
            output_hessians = None if outputs is None else outputs.for_matrix(matrix.name)
            matrices, retries = self.quantizer.quantize_trellis_mixed(weight, hessians, with_trellis, output_hessians)
            self.retries += retries
            return QuantizedParameter(name, widths, TrellisBatch.of(matrices, weight.dtype), None)
        soft_codes = None
        if self.with_soft_codes:
            soft_codes = weight.new_empty(weight.shape, dtype=soft_code_dtype(weight.device, weight.dtype))
        q, retries = self.quantizer.quantize_mixed(weight, hessians, affine_widths(widths), soft_codes)
        self.retries += retries
        return QuantizedParameter(name, widths, q, soft_codes)


def compensation_passes(experts: Experts, ranks: int) -> int:
    """Return in how many forward passes the changes of the down projections' inputs are accumulated.

    A pass takes no more memory than the Hessians of the first matrices, and every rank has experts in it.
    """
    first, down = experts.matrices
    return min(max(1, experts.count // ranks), ceil_div(down.columns**2, first.columns**2))


def _weights(parameter: QuantizedParameter, dtype: torch.dtype) -> Tensor:
    """Return the quantized weights [E, R, C] of one matrix of experts."""
    q = parameter.q
    return q.weight() if isinstance(q, TrellisBatch) else dequantize_each(q, dtype)
