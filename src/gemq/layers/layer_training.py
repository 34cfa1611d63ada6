"""Reconstruction training of one layer: codes, grids, router and norms, by gradients through the rounding.

The layer learns to turn the activations of the quantized model into the outputs that the full-precision layer has on
full-precision activations.

Shapes: E experts, B windows, S tokens a window, H hidden size, R rows, C columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gemq.calibration.activations import Activations
from gemq.layers.gradient_sync import gradient_sync
from gemq.layers.training import Matrices, Training, all_finite, as_parameter, tunable_names
from gemq.layers.trellis_experts import TrainableRows, TrellisBatch
from gemq.models.expert_parallel import local_expert_slice, shard_experts
from gemq.models.replay import Call, Replay
from gemq.quant.gptq import max_codes
from gemq.quant.grid import Quantized, dequantize_each
from gemq.quant.trainable import TrainableMatrices, epochs, rounded_to
from gemq.quant.trainable_gpu import trainable
from gemq.quant.widths import AnyWidth, affine_widths
from gemq.runtime.cuda_graph import CudaGraphReplay


@dataclass(frozen=True)
class QuantizedParameter:
    """A model parameter on its grid: one matrix of a layer's experts, or a dense linear as a batch of one.

    Attributes:
        name: Name of the parameter inside the model.
        widths: Width of each of the E matrices.
        q: Grids [E, ...], or matrices with trellis codes.
        soft_codes: [E, R, C] codes before rounding, where training starts. None trains the grids only.
    """

    name: str
    widths: tuple[AnyWidth, ...]
    q: Quantized | TrellisBatch
    soft_codes: Tensor | None


class LayerResult(NamedTuple):
    """Result of training a layer.

    Attributes:
        parameters: The parameters with their trained grids.
        tuned: Parameters of routers and norms by name inside the model, float32.
        error_before: Mean square error of the layer's output on validation micro-batches, relative to the target's.
        error_after: The same after training.
    """

    parameters: list[QuantizedParameter]
    tuned: dict[str, Tensor]
    error_before: float
    error_after: float


class LayerTrainer:
    """Trains one layer. ``run`` evaluates, trains, evaluates again and keeps the better of both.

    With several ranks, each trains its part of the experts (see ``models.expert_parallel``). What surrounds the experts
    is trained by all ranks alike. If no experts are trained, every rank does the same work.
    """

    def __init__(
        self,
        replay: Replay,
        index: int,
        activations: Activations,
        targets: Sequence[Tensor],
        parameters: list[QuantizedParameter],
        training: Training,
        stored_dtypes: dict[str, torch.dtype],
        *,
        max_batches: int | None = None,
        windows_sharded: bool = False,
    ):
        """
        Args:
            replay: The model, and the ranks that train the layer.
            index: Index of the layer.
            activations: Inputs of the layer, of all ranks' micro-batches.
            targets: Outputs [B, S, H] of the full-precision layer, one for each micro-batch.
            parameters: Quantized parameters. Those of experts are of this rank's experts.
            training: Settings.
            stored_dtypes: Dtype in which each router and norm parameter is stored; they are trained for this dtype.
            max_batches: Use only the first micro-batches.
            windows_sharded: Whether ``activations`` and ``targets`` are this rank's windows of each micro-batch.
        """
        layer = replay.structure.layers[index]
        self.replay, self.index = replay, index
        self.inputs, self.calls, self.targets = activations.hidden, activations.calls, targets
        self.parameters, self.training, self.stored_dtypes = parameters, training, stored_dtypes
        self.experts = layer.experts if any(map(self._is_expert_parameter, parameters)) else None
        self.windows_sharded = windows_sharded
        self.sync = gradient_sync(replay.ranks, windows_sharded=windows_sharded, experts_split=self.experts is not None)
        self.train_batches, self.val_batches = training.split(min(len(self.inputs), max_batches or len(self.inputs)))
        self.tuned: dict[str, Tensor] = {}
        for name in tunable_names(replay, layer) if training.lr_tuned else ():
            self.tuned[name] = replay.model.get_parameter(name).detach().float().clone()

    def run(self) -> LayerResult:
        """Train the layer. If it does not improve on validation micro-batches, return the parameters unchanged."""
        ranks = self.replay.ranks
        original = {name: tensor.clone() for name, tensor in self.tuned.items()}
        error_before = self.evaluate([parameter.q for parameter in self.parameters], original)
        grids, finite = self.train()
        tuned = {}
        for name, tensor in self.tuned.items():
            tuned[name] = ranks.broadcast(rounded_to(tensor.detach(), self.stored_dtypes[name]), 0)
        error_after = self.evaluate(grids, tuned)
        # ranks must agree, and on GPUs each may have rounded differently
        error_before, error_after = ranks.run_on_first(lambda: (error_before, error_after))
        failed = torch.tensor(float(not (finite and all_finite(tuned.values()))), dtype=torch.float64)
        ranks.all_reduce(failed)  # each rank has experts of its own
        if failed or not error_after < error_before:
            return LayerResult(self.parameters, original, error_before, error_before)
        trained = []
        for parameter, q in zip(self.parameters, grids, strict=True):
            trained.append(dataclasses.replace(parameter, q=q))
        return LayerResult(trained, tuned, error_before, error_after)

    def forward(self, hidden: Tensor, call: Call, weights: Sequence[Tensor], tuned: dict[str, Tensor]) -> Tensor:
        """Run the layer with the given weights of the parameters, and of routers and norms: [B, S, H]."""
        model = self.replay.model
        overrides = {}
        for name, tensor in tuned.items():
            overrides[name] = rounded_to(tensor, self.stored_dtypes[name]).to(model.get_parameter(name))
        for parameter, weight in zip(self.parameters, weights, strict=True):
            overrides[parameter.name] = as_parameter(model, parameter.name, weight)
        with shard_experts(model, self.experts, self.replay.ranks, self.windows_sharded):
            return self.replay.run(self.index, hidden, call, overrides)

    @torch.no_grad()
    def evaluate(self, grids: Sequence[Quantized | TrellisBatch], tuned: dict[str, Tensor]) -> float:
        """Return the squared error on validation micro-batches, relative to the squares of the targets."""
        weights = []
        for parameter, q in zip(self.parameters, grids, strict=True):
            weights.append(q.weight() if isinstance(q, TrellisBatch) else dequantize_each(q, self._dtype(parameter)))
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in self.val_batches:
            output = self.forward(self.inputs[batch], self.calls[batch][self.index], weights, tuned)
            target = self.targets[batch]
            sums[0] += (output - target).float().square().sum().item()
            sums[1] += target.float().square().sum().item()
        self.sync.all_reduce(sums)
        return float(sums[0] / sums[1])

    def train(self) -> tuple[list[Quantized | TrellisBatch], bool]:
        """Train all parameters, those of routers and norms in place.

        The optimizer's state is freed on return: the evaluation that follows needs as much memory.

        Returns:
            The trained grids, and whether everything that was trained is finite.
        """
        training = self.training
        matrices = [self._trainable_matrices(parameter) for parameter in self.parameters]
        steps = training.epochs * len(self.train_batches)
        optimizer = training.matrix_optimizer(steps, matrices, list(self.tuned.values()))
        replicated = self._replicated_tensors(matrices)

        def step(call: Call, hidden: Tensor, batch_target: Tensor) -> None:
            target = batch_target.float()
            output = self.forward(hidden, call, [m.weight() for m in matrices], self.tuned)
            energy = self.sync.mean(target.square().sum(-1).mean().clamp_min(1e-20))
            loss = (output.float() - target).square().sum() / energy
            optimizer.step(loss, sync_gradients=lambda: self.sync.sync_gradients(replicated))
            for m in matrices:
                m.keep_in_range()

        can_capture = not self.replay.has_extra_outputs
        graph = CudaGraphReplay(step, self.replay.device, training.on_capture_failure, usable=can_capture)
        with closing(graph) as run_step:
            for position in epochs(len(self.train_batches), training.epochs, training.seed + self.index):
                batch = self.train_batches[position]
                run_step(self.calls[batch][self.index], self.inputs[batch], self.targets[batch])
        finite = all_finite(tensor for m in matrices for tensor in m.trained())
        return [_result(m) for m in matrices], finite

    def _trainable_matrices(self, parameter: QuantizedParameter) -> Matrices:
        """Return a parameter's matrices in a trainable form."""
        if isinstance(parameter.q, TrellisBatch):
            return TrainableRows(parameter.q)
        limits = max_codes(affine_widths(parameter.widths), parameter.q.codes.device)
        if parameter.soft_codes is None:
            return TrainableMatrices(parameter.q, limits, None)
        first_id = 0
        if self.experts is not None and self._is_expert_parameter(parameter):
            first_id = local_expert_slice(self.replay.model, self.experts, self.replay.ranks).start
        matrix_ids = torch.arange(first_id, first_id + len(limits), device=limits.device)
        return trainable(parameter.q, limits, parameter.soft_codes, self._dtype(parameter), matrix_ids=matrix_ids)

    def _replicated_tensors(self, matrices: Sequence[Matrices]) -> list[Tensor]:
        """Return the tensors with gradients that all ranks train: everything but the experts."""
        tensors = list(self.tuned.values())
        for parameter, m in zip(self.parameters, matrices, strict=True):
            if not self._is_expert_parameter(parameter):
                tensors += m.leaves()
        return [tensor for tensor in tensors if tensor.requires_grad]

    def _is_expert_parameter(self, parameter: QuantizedParameter) -> bool:
        """Return whether a parameter holds matrices of routed experts."""
        experts = self.replay.structure.layers[self.index].experts
        return experts is not None and parameter.name.startswith(f"{experts.path}.")

    def _dtype(self, parameter: QuantizedParameter) -> torch.dtype:
        """Return the dtype of a parameter in the model."""
        dtype: torch.dtype = self.replay.model.get_parameter(parameter.name).dtype
        return dtype


def _result(matrices: Matrices) -> Quantized | TrellisBatch:
    """Return matrices as trained so far."""
    return matrices.batch_result() if isinstance(matrices, TrainableRows) else matrices.result()
