"""The packed model as the student of distillation: forward, backward and updates, one layer at a time.

Packed layers and their optimizers' states are offloaded where memory is short. If all of them stay on a GPU, the
forward pass and the step of each layer run from CUDA graphs.

Shapes: B windows, S tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from gemq.calibration.activations import Activations
from gemq.distillation.packed_layer import PackedLayer, TunedParameters
from gemq.distillation.settings import Distillation
from gemq.layers.gradient_sync import set_gradients
from gemq.layers.reconstruction import QuantizedLayer
from gemq.layers.scheme import QuantizationScheme
from gemq.layers.training import all_finite
from gemq.models.replay import Replay
from gemq.models.structure import is_norm
from gemq.runtime.memory import MemoryTier
from gemq.runtime.ranks import SINGLE

GRAPH_HIDDEN_TENSORS = 5
"""Inputs and outputs of a layer's CUDA graphs that have the size of hidden states: see ``PackedLayer.capture``."""


class Student:
    """The packed model as a function of its trainable parameters."""

    def __init__(
        self,
        replay: Replay,
        load_layer: Callable[[int], QuantizedLayer],
        schemes: Sequence[QuantizationScheme],
        distillation: Distillation,
        steps: int,
        windows_sharded: bool,
        graph_bytes: int,
    ):
        """
        Args:
            replay: The model.
            load_layer: Loads a layer as it is stored.
            schemes: Widths of each layer.
            distillation: Settings.
            steps: Number of training steps.
            windows_sharded: Whether other ranks train on other windows.
            graph_bytes: Memory of the CUDA graphs of all layers.
        """
        self.replay, self.ranks = replay, replay.ranks if windows_sharded else SINGLE
        self.layers: list[PackedLayer] = []
        for index, scheme in enumerate(schemes):
            self.layers.append(PackedLayer(replay, index, load_layer(index), scheme, distillation, steps, self.ranks))
        self._capture(graph_bytes, distillation.training.on_capture_failure)
        tail = {}
        if "norms" in distillation.parameters:
            for name in _tail_norms(replay):
                tail[name] = replay.model.get_parameter(name).detach().float().clone()
        self.tail = TunedParameters(replay, tail, distillation.stored_dtypes)
        self.optimizer = distillation.training.optimizer(steps, (), (), list(tail.values())) if tail else None

    def _capture(self, graph_bytes: int, on_failure: Callable[[], None]) -> None:
        """Prepare the layers' CUDA graphs if their memory can be reserved."""
        on_device = all(layer.offloaded.tier is MemoryTier.DEVICE for layer in self.layers)
        # an offloaded tensor has another address after each load
        usable = self.replay.device.type == "cuda" and on_device and not self.replay.has_extra_outputs
        self._graph_bytes = graph_bytes if usable and self.replay.memory.try_reserve(graph_bytes) else 0
        pool = torch.cuda.graph_pool_handle() if self._graph_bytes else None
        for layer in self.layers:
            layer.capture(bool(self._graph_bytes), pool, on_failure)

    def forward(self, activations: Activations, batch: int) -> list[Tensor]:
        """Return the input [B, S, H] of each layer and the output of the last one, outside autograd."""
        hidden = [activations.hidden[batch]]
        for index, layer in enumerate(self.layers):
            hidden.append(layer.output(hidden[-1], activations.calls[batch][index]))
        return hidden

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits [B, S, V] from the last layer's output [B, S, H]; differentiable."""
        return self.replay.logits(ids, hidden, self.tail.overrides())

    def step(
        self,
        losses: Iterable[Tensor],
        last_hidden: Tensor,
        inputs: list[Tensor],
        activations: Activations,
        batch: int,
    ) -> None:
        """Take a step down the gradient of the sum of ``losses``, from the model's tail to its first layer.

        Args:
            losses: Terms of the loss.
            last_hidden: Output of the last layer, a leaf of autograd.
            inputs: Inputs of the layers, which run again. Emptied.
            activations: Calls of the layers.
            batch: Index of the micro-batch.
        """
        trained = [parameter for parameter in self.tail.parameters.values() if parameter.requires_grad]
        totals: list[Tensor] = []
        for loss in losses:
            gradients = torch.autograd.grad(loss, [last_hidden, *trained])
            if totals:
                totals = [total + gradient for total, gradient in zip(totals, gradients, strict=True)]
            else:
                totals = list(gradients)
        grad_hidden = totals[0]
        set_gradients(trained, totals[1:], self.ranks)
        if self.optimizer is not None:
            self.optimizer.update()
        for index in reversed(range(len(self.layers))):
            grad_hidden = self.layers[index].step(inputs.pop(), grad_hidden, activations.calls[batch][index])

    def tensors(self) -> dict[str, Tensor]:
        """Return encoded scales and offsets of all experts by their names in a checkpoint, if they are trained."""
        tensors: dict[str, Tensor] = {}
        for layer in self.layers:
            tensors.update(layer.result())
        return tensors

    def tuned(self) -> dict[str, Tensor]:
        """Return the routers and norms as they are stored, by name inside the model."""
        result: dict[str, Tensor] = {}
        for layer in self.layers:
            result.update(layer.tuned.result())
        result.update(self.tail.result())
        return result

    def is_finite(self) -> bool:
        """Return whether all trained parameters are finite, including those that validation windows do not use."""
        return all_finite(self.tail.parameters.values()) and all(layer.is_finite() for layer in self.layers)

    def close(self) -> None:
        """Free graphs and memory of all layers."""
        for layer in self.layers:
            layer.close()
        self.replay.memory.on_device.free(self._graph_bytes)


def _tail_norms(replay: Replay) -> list[str]:
    """Return the names of the norm parameters outside the decoder layers."""
    layers_prefix = replay.structure.layers_path + "."
    names = []
    for path, module in replay.model.named_modules():
        if not is_norm(module) or path.startswith(layers_prefix):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point():
                names.append(f"{path}.{name}")
    return names
