"""The trained ladder: every expert at every width on its own, towards its full-precision output on its own inputs.

Straight through the rounding, from GPTQ's codes; independent of any allocation, and of other experts, so that a layer's
may be trained some at a time. Held-out micro-batches decide: what did not get better on them keeps GPTQ's codes. Knows
one layer at a time, no files.

Shapes: E experts trained together, W widths, M = W * E matrices (every expert at the first width, then at the second),
P routed pairs of those experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gemq.layers.training import Training
from gemq.models.experts import ExpertsCall, Routed, apply_down, apply_first, expert_weight, route
from gemq.models.structure import Experts
from gemq.quant.gptq import highest_codes
from gemq.quant.grid import Quantized, dequantize_each
from gemq.quant.trainable import epochs
from gemq.quant.trainable_gpu import trainable
from gemq.quant.widths import Width

TRAIN_BYTES = tuple((6 << 30) >> halved for halved in range(5))
"""Memory on a GPU for the state of the experts that are trained together: the first that there is room for. With less,
steps are too short to launch.
"""

CPU_TRAIN_BYTES = (64 << 20,)
"""The same on a CPU, whose caches are quicker than its memory."""

BYTES_PER_WEIGHT = 16
"""Code, latent, moments, weight in use and gradient, at most; 11 in bfloat16 jobs."""


def train_rooms(device: torch.device) -> tuple[int, ...]:
    """Bytes that the state of experts which are trained together may take, the quickest first."""
    return CPU_TRAIN_BYTES if device.type == "cpu" else TRAIN_BYTES


def expert_chunks(experts: Experts, widths: int, room: int) -> Iterator[slice]:
    """Slices of a layer's experts that are trained together at ``widths`` widths, their state in ``room`` bytes."""
    each = experts.weights_per_expert * widths * BYTES_PER_WEIGHT
    most = max(1, min(experts.count, room // each))
    chunks = -(-experts.count // most)
    size = -(-experts.count // chunks)
    return (slice(start, min(start + size, experts.count)) for start in range(0, experts.count, size))


class ExpertInputs:
    """What a layer's experts receive on full-precision activations, in micro-batches, and what they give."""

    def __init__(self, module: Any, experts: Experts, calls: Sequence[ExpertsCall]):
        self.module, self.experts, self.calls, self.count = module, experts, calls, experts.count
        self.routed = [route(call.top_k_index, call.top_k_weights, experts.count) for call in calls]
        self.exact = [expert_weight(module, m.name) for m in experts.matrices]
        self._energies: dict[int, Tensor] = {}

    def outputs(self, weights: Sequence[Tensor], x: Tensor, routed: Routed) -> Tensor:
        """Each pair's output [P, H] by given weights of the two matrices, not yet times its routing weight."""
        h = apply_first(self.module, self.experts.matrices[0].name, weights[0].to(x.dtype), x, routed)
        return apply_down(self.module, weights[1].to(x.dtype), h, routed)

    @torch.no_grad()
    def exact_outputs(self, x: Tensor, routed: Routed, some: slice) -> Tensor:
        """``outputs`` by the full-precision weights of some experts."""
        return self.outputs([w[some] for w in self.exact], x, routed)

    @torch.no_grad()
    def energy(self, batch: int) -> Tensor:
        """Mean square norm of what a pair of the micro-batch adds to the layer's output: float32 scalar."""
        if batch not in self._energies:
            routed = self.routed[batch]
            x = self.calls[batch].hidden.index_select(0, routed.token)
            target = self.exact_outputs(x, routed, slice(None)).float() * routed.weight.float().unsqueeze(1)
            self._energies[batch] = target.square().sum(1).mean().clamp_min(1e-20)
        return self._energies[batch]


def train_rungs(
    batches: ExpertInputs,
    some: slice,
    grids: list[Quantized],
    latents: list[Tensor],
    widths: tuple[Width, ...],
    training: Training,
    layer: int,
) -> tuple[list[Quantized], int]:
    """Trains some experts of a layer at all widths, each on its own.

    some:    which of the layer's experts
    grids:   GPTQ's result for each of the two matrices, [W, E, ...]
    latents: [W, E, R, C] for each matrix, in ``latent_type``: GPTQ's codes before rounding; overwritten
    layer:   the layer's index: part of the seed

    Returns the grids, each expert and width as it was better on held-out micro-batches, and how many stayed GPTQ's.
    """
    count, device = some.stop - some.start, latents[0].device
    of_all = torch.arange(len(widths), device=device).unsqueeze(1) * batches.count
    numbers = (of_all + torch.arange(some.start, some.stop, device=device)).flatten()
    compute = batches.calls[0].hidden.dtype
    highest = highest_codes(widths, device).repeat_interleave(count)
    train, held_out = training.split(len(batches.calls))
    once = [routed.stacked(some, 1) for routed in batches.routed]
    every = [routed.stacked(some, len(widths)) for routed in batches.routed]

    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        """Inputs of all matrices' pairs [W * P, H], and the exact outputs [P, H]."""
        x = batches.calls[batch].hidden.index_select(0, every[batch].token)
        return x, batches.exact_outputs(x[: len(once[batch].token)], once[batch], some)

    @torch.no_grad()
    def errors(weights: Sequence[Tensor]) -> Tensor:
        """Held-out squared errors [M] float64."""
        total = torch.zeros(len(highest), dtype=torch.float64, device=device)
        for batch in held_out:
            x, exact = inputs(batch)
            difference = _residuals(batches.outputs(weights, x, every[batch]), exact, every[batch].weight)
            total.index_add_(0, every[batch].expert, difference.square().sum(1).double())
        return total

    start = [Quantized(*(t.flatten(0, 1) for t in q)) for q in grids]
    before = errors([dequantize_each(q, compute) for q in start])

    def trained() -> list[Quantized]:
        """What is in training is gone afterwards: judging takes as much memory again."""
        matrices = [
            trainable(q, highest, v.flatten(0, 1), compute, by_range=True, numbers=numbers)
            for q, v in zip(start, latents, strict=True)
        ]
        optimizer = training.optimizer_of(training.epochs * len(train), matrices)
        for number in epochs(len(train), training.epochs, training.seed + layer):
            batch = train[number]
            x, exact = inputs(batch)
            out = batches.outputs([m.weight() for m in matrices], x, every[batch])
            gradient = _gradient(out.detach(), exact, every[batch].weight, batches.energy(batch))
            optimizer.step(out, gradient)
            for m in matrices:
                m.keep_in_range()
        return [m.result() for m in matrices]

    results = trained()
    after = errors([dequantize_each(q, compute) for q in results])
    better = after < before
    chosen = [
        Quantized(
            *(
                torch.where(better.view(-1, 1, 1), new, old).unflatten(0, (len(widths), count))
                for new, old in zip(trained, q, strict=True)
            )
        )
        for trained, q in zip(results, start, strict=True)
    ]
    return chosen, int((~better).sum())


def _residuals(out: Tensor, exact: Tensor, weight: Tensor) -> Tensor:
    """What outputs [W * P, H] add to the layer's output beside the exact ones' [P, H]: float32 [W * P, H]."""
    return _differences(out, exact).mul_(weight.float().unsqueeze(1))


def _differences(out: Tensor, exact: Tensor) -> Tensor:
    """Outputs [W * P, H] less the exact ones' [P, H], float32."""
    pairs = len(exact)
    return torch.sub(out.float().unflatten(0, (len(out) // max(pairs, 1), pairs)), exact.float()).flatten(0, 1)


@torch.no_grad()
def _gradient(out: Tensor, exact: Tensor, weight: Tensor, energy: Tensor) -> Tensor:
    """Gradient of the residuals' squares over ``energy`` with respect to ``out``."""
    if out.device.type == "cuda":
        from gemq.kernels.training.expert_ops import residual_gradient  # triton comes with torch for CUDA, not for CPUs

        return residual_gradient(out, exact, weight, energy)
    # in place: memory that the system hands out anew costs more than the products
    return _differences(out, exact).mul_((weight.float().square() * (2 / energy)).unsqueeze(1)).to(out.dtype)
