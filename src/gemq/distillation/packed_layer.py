"""A packed layer with trainable scales, offsets, router and norms.

The layer is dequantized when it runs, in the forward and again in the backward pass, and the dense weights are dropped:
the model is never dense as a whole. Trained parameters are updated as soon as their gradient is computed.

Shapes: B windows, S tokens, H hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gemq.distillation.settings import Distillation
from gemq.distillation.student_matrices import AffineStudentMatrix, StudentMatrix, TrellisStudentMatrix
from gemq.kernels.training.differentiable_dequantize import copy_codes
from gemq.layers.gradient_sync import set_gradients
from gemq.layers.reconstruction import QuantizedLayer
from gemq.layers.scheme import QuantizationScheme
from gemq.layers.training import all_finite, as_parameter, expert_overrides, tunable_names
from gemq.models.replay import Call, Replay
from gemq.models.structure import Layer
from gemq.quant.packing import PackedMatrix
from gemq.quant.trainable import rounded_to
from gemq.quant.widths import affine_widths, trellis_widths
from gemq.runtime.cuda_graph import CudaGraphReplay
from gemq.runtime.memory import OffloadedTensors
from gemq.runtime.ranks import Ranks

STATE_BYTES = 12
"""Bytes of a trained number that are allocated after the first step: gradient and Adam's moments, float32."""


class TunedParameters:
    """Routers and norms in training, float32, by their names inside the model."""

    def __init__(self, replay: Replay, parameters: dict[str, Tensor], stored_dtypes: dict[str, torch.dtype]):
        self.replay, self.parameters, self.stored_dtypes = replay, parameters, stored_dtypes

    def overrides(self) -> dict[str, Tensor]:
        """Return the parameters rounded to the dtype that stores them, in the dtype of the model; differentiable."""
        overrides = {}
        for name, parameter in self.parameters.items():
            dtype = self.replay.model.get_parameter(name).dtype
            overrides[name] = rounded_to(parameter, self.stored_dtypes[name]).to(dtype)
        return overrides

    def result(self) -> dict[str, Tensor]:
        """Return the parameters of rank 0 as they are stored, float32 on the CPU."""
        result = {}
        for name, parameter in self.parameters.items():
            rounded = rounded_to(parameter.detach(), self.stored_dtypes[name])
            result[name] = self.replay.ranks.broadcast(rounded, 0).to("cpu", copy=True)
        return result


class PackedLayer:
    """One quantized layer: packed matrices, unquantized tensors, and what is trained of them.

    Attributes:
        experts: The two matrices of the experts; empty for a dense layer.
        linears: Codes, scales and offsets of the dense linears by parameter name; fixed.
        unquantized: All other parameters and buffers by name inside the model.
        tuned: Routers and norms in training.
        trained: All tensors in training.
        waiting: Where the tensors are between two visits of the layer.
    """

    def __init__(
        self,
        replay: Replay,
        index: int,
        quantized: QuantizedLayer,
        scheme: QuantizationScheme,
        distillation: Distillation,
        steps: int,
        ranks: Ranks,
    ):
        """
        Args:
            replay: The model.
            index: Index of the layer.
            quantized: The layer as it is stored.
            scheme: Its widths and group size.
            distillation: Settings.
            steps: Number of training steps.
            ranks: Ranks that train on other windows, over which gradients are summed.
        """
        self.replay, self.index, self.ranks = replay, index, ranks
        self.layer = layer = replay.structure.layers[index]
        self.experts = self._pack_experts(layer, quantized, scheme)
        self.linears = self._pack_linears(layer, quantized, scheme)
        self.unquantized = self._unquantized(layer, quantized)
        tuned = {}
        for name in _tuned_names(replay, layer, distillation.parameters):
            tuned[name] = self.unquantized[name].float().clone()
        self.tuned = TunedParameters(replay, tuned, distillation.stored_dtypes)
        grids: list[Tensor] = []
        if "grids" in distillation.parameters:
            for matrices in self.experts:
                grids += matrices.grids.grids()
        self.trains_grids = bool(grids)
        self.optimizer = None
        if grids or tuned:
            self.optimizer = distillation.training.optimizer(steps, (), grids, list(tuned.values()))
        self.trained = [tensor for tensor in (*grids, *tuned.values()) if tensor.requires_grad]
        num_trained = sum(tensor.numel() for tensor in self.trained)
        self.offloaded = OffloadedTensors(replay.memory, self._offloadable_tensors, STATE_BYTES * num_trained)

    @staticmethod
    def _pack_experts(layer: Layer, quantized: QuantizedLayer, scheme: QuantizationScheme) -> list[StudentMatrix]:
        """Return the matrices of the experts; none for a dense layer."""
        if layer.experts is None:
            return []
        matrices: list[StudentMatrix] = []
        for matrix in layer.experts.matrices:
            widths = scheme.matrix_widths(layer)[matrix.name]
            if with_trellis := trellis_widths(widths):
                matrices.append(TrellisStudentMatrix(quantized, layer.experts, matrix, with_trellis))
            else:
                matrices.append(AffineStudentMatrix(quantized, layer.experts, matrix, affine_widths(widths)))
        return matrices

    @staticmethod
    def _pack_linears(
        layer: Layer, quantized: QuantizedLayer, scheme: QuantizationScheme
    ) -> dict[str, tuple[Any, Tensor, Tensor]]:
        """Return codes, scales and offsets of the dense linears as batches of one matrix."""
        linears = {}
        for linear, width in scheme.linear_widths(layer):
            packed = PackedMatrix.from_tensors(quantized.tensors, linear.path, width)
            scales, offsets = packed.grids()
            linears[f"{linear.path}.weight"] = copy_codes([packed]), scales[None], offsets[None]
        return linears

    def _unquantized(self, layer: Layer, quantized: QuantizedLayer) -> dict[str, Tensor]:
        """Return the layer's tensors that are not quantized, with the trained values of routers and norms."""
        quantized_names = set(self.linears)
        if layer.experts is not None:
            for matrix in layer.experts.matrices:
                quantized_names.add(f"{layer.experts.path}.{matrix.name}")
        unquantized = self.replay.layer_tensors(self.index, quantized_names)
        for name, tensor in quantized.tuned.items():
            unquantized[name] = tensor.to(unquantized[name].dtype)
        return unquantized

    def capture(self, usable: bool, pool: Any, on_failure: Callable[[], None]) -> None:
        """Prepare CUDA graphs of the forward pass and of the step.

        Args:
            usable: Whether graphs can be used at all.
            pool: Memory pool of the graphs of all layers, which never run at the same time.
            on_failure: Called if a graph cannot be captured.
        """
        device = self.replay.device
        self._output_graph = CudaGraphReplay(self._forward, device, on_failure, usable=usable, pool=pool)
        self._step_graph = CudaGraphReplay(self._step, device, on_failure, usable=usable, pool=pool)

    def _offloadable_tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the tensors that never change, and those that a step changes."""
        changing = list(self.trained)
        if self.optimizer is not None and self.optimizer.inner is not None:
            for state in self.optimizer.inner.state.values():
                changing += state.values()
        fixed = list(self.unquantized.values())
        for codes, scales, offsets in self.linears.values():
            fixed += [*codes.offloadable_tensors(), scales, offsets]
        for matrices in self.experts:
            fixed += matrices.tensors()
        changing_ids = {id(tensor) for tensor in changing}
        return [tensor for tensor in fixed if id(tensor) not in changing_ids], changing

    @contextmanager
    def _loaded(self, changes: bool = False) -> Iterator[None]:
        """Load the layer's tensors to the device, then offload them, with what was written if it ``changes``."""
        self.offloaded.load()
        yield
        self.offloaded.offload(changed=changes)

    @torch.no_grad()
    def output(self, hidden: Tensor, call: Call) -> Tensor:
        """Return the layer's output [B, S, H], outside autograd."""
        with self._loaded():
            output: Tensor = self._output_graph(call, hidden)
        return output

    def step(self, hidden: Tensor, gradient: Tensor, call: Call) -> Tensor:
        """Take the next step, from the gradient of the layer's output. Return the gradient of its input ``hidden``."""
        with self._loaded(changes=True):
            grad_hidden: Tensor = self._step_graph(call, hidden, gradient)
        return grad_hidden

    def is_finite(self) -> bool:
        """Return whether everything that is trained of the layer is finite."""
        with self._loaded():
            finite = all_finite(self.trained)
        return finite

    def result(self) -> dict[str, Tensor]:
        """Return encoded scales and offsets of the experts by their names in a checkpoint, if they are trained."""
        tensors: dict[str, Tensor] = {}
        with self._loaded():
            if self.trains_grids:
                for matrices in self.experts:
                    tensors.update(matrices.result())
        return tensors

    def close(self) -> None:
        """Free graphs and memory."""
        self._output_graph.close()
        self._step_graph.close()
        self.offloaded.close()

    def _step(self, call: Call, hidden: Tensor, gradient: Tensor) -> Tensor:
        """Run forward and backward, update what is trained, and return the gradient of ``hidden``."""
        leaf = self.replay.leaf(hidden)
        output = self._forward(call, leaf)
        # unused are parameters of experts that received no token
        grad_hidden, *gradients = torch.autograd.grad(output, [leaf, *self.trained], gradient, allow_unused=True)
        set_gradients(self.trained, gradients, self.ranks)
        if self.optimizer is not None:
            self.optimizer.update()
        for parameter in self.trained:
            parameter.grad = None
        return grad_hidden

    def _forward(self, call: Call, hidden: Tensor) -> Tensor:
        """Dequantize and run the layer: [B, S, H], differentiable in what is trained."""
        model = self.replay.model
        overrides = {**self.unquantized, **self.tuned.overrides()}
        for name, (codes, scales, offsets) in self.linears.items():
            weight = codes.weights(scales, offsets, model.get_parameter(name).dtype)
            overrides[name] = as_parameter(model, name, weight)
        if self.layer.experts is not None:
            first_name = f"{self.layer.experts.path}.{self.experts[0].matrix.name}"
            dtype = model.get_parameter(first_name).dtype
            expert_weights = [matrices.weight(dtype) for matrices in self.experts]
            overrides.update(expert_overrides(model, self.layer.experts, expert_weights))
        return self.replay.run(self.index, hidden, call, overrides)


def _tuned_names(replay: Replay, layer: Layer, parameters: tuple[str, ...]) -> list[str]:
    """Return the names inside the model of the layer's routers and norms that are trained."""
    names = []
    for name in tunable_names(replay, layer):
        is_router = layer.router is not None and name.startswith(layer.router + ".")
        if ("routers" if is_router else "norms") in parameters:
            names.append(name)
    return names
