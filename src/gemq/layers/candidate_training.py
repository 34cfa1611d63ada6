"""Training of candidates: every expert at every width on its own, towards its full-precision output on its own inputs.

Training starts from GPTQ's codes and passes gradients straight through the rounding. It does not depend on an
allocation or on other experts, so that a layer's experts can be trained a chunk at a time. Validation micro-batches
decide: an expert that does not improve on them keeps GPTQ's codes. Handles one layer at a time and must not access
files.

Shapes: E experts trained together, W widths, M = W * E matrices (every expert at the first width, then at the second),
P routed pairs of those experts, H hidden size, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gemq.layers.training import Training
from gemq.models.experts import ExpertsCall, RoutedPairs, apply_down, apply_first, expert_weight, route
from gemq.models.structure import Experts
from gemq.quant.gptq import max_codes
from gemq.quant.grid import Quantized, dequantize_each
from gemq.quant.trainable import epochs
from gemq.quant.trainable_gpu import trainable
from gemq.quant.widths import Width
from gemq.runtime.integers import ceil_div

TRAIN_BYTES = tuple((6 << 30) >> halvings for halvings in range(5))
"""Memory on a GPU for the state of the experts that are trained together. The first value that fits is used. With less
memory, a step takes longer to launch than to compute.
"""

CPU_TRAIN_BYTES = (64 << 20,)
"""The same on a CPU, whose caches are faster than its memory."""

BYTES_PER_WEIGHT = 16
"""Upper bound for code, soft code, Adam's moments, weight in use and gradient; 11 in bfloat16 jobs."""


def train_state_sizes(device: torch.device) -> tuple[int, ...]:
    """Return sizes, in bytes, for the state of the experts that are trained together, fastest first."""
    return CPU_TRAIN_BYTES if device.type == "cpu" else TRAIN_BYTES


def expert_chunks(experts: Experts, num_widths: int, state_bytes: int) -> Iterator[slice]:
    """Yield even slices of a layer's experts whose training state at all widths fits into ``state_bytes``."""
    bytes_per_expert = experts.weights_per_expert * num_widths * BYTES_PER_WEIGHT
    max_size = max(1, min(experts.count, state_bytes // bytes_per_expert))
    num_chunks = ceil_div(experts.count, max_size)
    size = ceil_div(experts.count, num_chunks)
    for start in range(0, experts.count, size):
        yield slice(start, min(start + size, experts.count))


class ExpertInputs:
    """Recorded calls of a layer's experts on full-precision activations, and the outputs of any weights on them."""

    def __init__(self, module: Any, experts: Experts, calls: Sequence[ExpertsCall]):
        self.module, self.experts, self.calls = module, experts, calls
        self.routed = [route(call.top_k_index, call.top_k_weights, experts.count) for call in calls]
        self.exact_weights = [expert_weight(module, matrix.name) for matrix in experts.matrices]
        self._energies: dict[int, Tensor] = {}

    def outputs(self, weights: Sequence[Tensor], x: Tensor, routed: RoutedPairs) -> Tensor:
        """Return the output [P, H] of each pair by ``weights`` of the two matrices, before its routing weight."""
        h = apply_first(self.module, self.experts.matrices[0].name, weights[0].to(x.dtype), x, routed)
        return apply_down(self.module, weights[1].to(x.dtype), h, routed)

    @torch.no_grad()
    def exact_outputs(self, x: Tensor, routed: RoutedPairs, experts: slice) -> Tensor:
        """Return ``outputs`` by the full-precision weights of some experts."""
        return self.outputs([weight[experts] for weight in self.exact_weights], x, routed)

    @torch.no_grad()
    def energy(self, batch: int) -> Tensor:
        """Return the mean square norm of what a pair of a micro-batch adds to the layer's output: float32 scalar."""
        if batch not in self._energies:
            routed = self.routed[batch]
            x = self.calls[batch].hidden.index_select(0, routed.token)
            contribution = self.exact_outputs(x, routed, slice(None)).float() * routed.weight.float().unsqueeze(1)
            self._energies[batch] = contribution.square().sum(1).mean().clamp_min(1e-20)
        return self._energies[batch]


class CandidateTrainer:
    """Trains some experts of a layer at all widths, each matrix pair on its own."""

    def __init__(
        self, inputs: ExpertInputs, experts: slice, widths: tuple[Width, ...], training: Training, layer_index: int
    ):
        """
        Args:
            inputs: Inputs and exact outputs of all experts of the layer.
            experts: The experts to train.
            widths: Widths to train them at.
            training: Settings.
            layer_index: Index of the layer, part of the seed.
        """
        self.inputs, self.experts, self.widths = inputs, experts, widths
        self.training, self.layer_index = training, layer_index
        self.num_experts = experts.stop - experts.start
        device = inputs.exact_weights[0].device
        self.compute_dtype = inputs.calls[0].hidden.dtype
        self.max_codes = max_codes(widths, device).repeat_interleave(self.num_experts)
        width_offset = torch.arange(len(widths), device=device).unsqueeze(1) * inputs.experts.count
        self.matrix_ids = (width_offset + torch.arange(experts.start, experts.stop, device=device)).flatten()
        self.train_batches, self.val_batches = training.split(len(inputs.calls))
        self.exact_routing = [routed.stack_copies(experts, 1) for routed in inputs.routed]
        self.routing = [routed.stack_copies(experts, len(widths)) for routed in inputs.routed]

    def run(self, grids: Sequence[Quantized], soft_codes: Sequence[Tensor]) -> tuple[list[Quantized], int]:
        """Train, and keep the better version of each expert at each width by its error on validation micro-batches.

        Args:
            grids: GPTQ's result for each of the two matrices, [W, E, ...].
            soft_codes: [W, E, R, C] for each matrix, GPTQ's codes before rounding in ``soft_code_dtype``; overwritten.

        Returns:
            The grids [W, E, ...] of both matrices, and for how many experts and widths they are still GPTQ's.
        """
        initial = [q.map(lambda tensor: tensor.flatten(0, 1)) for q in grids]
        errors_before = self.evaluate(initial)
        trained = self.train(initial, soft_codes)
        improved = self.evaluate(trained) < errors_before
        result = [self._choose(improved, new, old) for new, old in zip(trained, initial, strict=True)]
        return result, int((~improved).sum())

    @torch.no_grad()
    def evaluate(self, grids: Sequence[Quantized]) -> Tensor:
        """Return the squared error of each of the M matrix pairs on validation micro-batches: [M] float64."""
        weights = [dequantize_each(q, self.compute_dtype) for q in grids]
        total = torch.zeros(len(self.max_codes), dtype=torch.float64, device=self.max_codes.device)
        for batch in self.val_batches:
            x, exact = self._batch(batch)
            routed = self.routing[batch]
            residuals = _residuals(self.inputs.outputs(weights, x, routed), exact, routed.weight)
            total.index_add_(0, routed.expert, residuals.square().sum(1).double())
        return total

    def train(self, grids: Sequence[Quantized], soft_codes: Sequence[Tensor]) -> list[Quantized]:
        """Return trained grids [M, ...] of both matrices.

        The optimizer's state is freed on return: the evaluation that follows needs as much memory.
        """
        training = self.training
        matrices = []
        for q, codes in zip(grids, soft_codes, strict=True):
            codes = codes.flatten(0, 1)
            matrices.append(
                trainable(
                    q, self.max_codes, codes, self.compute_dtype, scale_by_max_code=True, matrix_ids=self.matrix_ids
                )
            )
        optimizer = training.matrix_optimizer(training.epochs * len(self.train_batches), matrices)
        for position in epochs(len(self.train_batches), training.epochs, training.seed + self.layer_index):
            batch = self.train_batches[position]
            x, exact = self._batch(batch)
            routed = self.routing[batch]
            out = self.inputs.outputs([m.weight() for m in matrices], x, routed)
            optimizer.step(out, _gradient(out.detach(), exact, routed.weight, self.inputs.energy(batch)))
            for m in matrices:
                m.keep_in_range()
        return [m.result() for m in matrices]

    def _batch(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return the inputs of all matrices' pairs [W * P, H] in a micro-batch, and the exact outputs [P, H]."""
        x = self.inputs.calls[batch].hidden.index_select(0, self.routing[batch].token)
        exact_routing = self.exact_routing[batch]
        exact = self.inputs.exact_outputs(x[: len(exact_routing.token)], exact_routing, self.experts)
        return x, exact

    def _choose(self, improved: Tensor, trained: Quantized, initial: Quantized) -> Quantized:
        """Return [W, E, ...] with the trained matrices [M, ...] where ``improved`` [M], else the initial ones."""
        mask = improved.view(-1, 1, 1)
        shape = (len(self.widths), self.num_experts)
        chosen = [torch.where(mask, new, old).unflatten(0, shape) for new, old in zip(trained, initial, strict=True)]
        return Quantized(*chosen)


def _residuals(out: Tensor, exact: Tensor, weight: Tensor) -> Tensor:
    """Return the error [W * P, H] float32 that outputs [W * P, H] cause at the layer's output.

    Args:
        out: Outputs of the quantized experts.
        exact: Outputs [P, H] of the full-precision experts.
        weight: Routing weights [W * P].
    """
    return _differences(out, exact).mul_(weight.float().unsqueeze(1))


def _differences(out: Tensor, exact: Tensor) -> Tensor:
    """Subtract exact outputs [P, H] from outputs [W * P, H]: float32."""
    pairs = len(exact)
    outputs_by_width = out.float().unflatten(0, (len(out) // max(pairs, 1), pairs))
    return torch.sub(outputs_by_width, exact.float()).flatten(0, 1)


@torch.no_grad()
def _gradient(out: Tensor, exact: Tensor, weight: Tensor, energy: Tensor) -> Tensor:
    """Return the gradient of the squared residuals over ``energy`` with respect to ``out``."""
    if out.device.type == "cuda":
        from gemq.kernels.training.expert_ops import residual_gradient  # needs triton, which CPU builds of torch lack

        return residual_gradient(out, exact, weight, energy)
    # in place: newly allocated memory costs more than the products
    return _differences(out, exact).mul_((weight.float().square() * (2 / energy)).unsqueeze(1)).to(out.dtype)
