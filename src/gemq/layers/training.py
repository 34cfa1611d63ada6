"""Training settings and the optimizer, shared by candidates, reconstruction and distillation.

Validation micro-batches decide whether a result is kept: what did not improve on them keeps GPTQ's codes.

Shapes: E experts, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemq.layers.trellis_experts import TrainableRows
from gemq.models.replay import Replay
from gemq.models.structure import Experts, Layer, is_norm
from gemq.quant.trainable import BETAS, EPS, TrainableMatrices, cosine_factors
from gemq.quant.trainable_gpu import FusedMatrices, StepSchedule

Matrices = TrainableMatrices | FusedMatrices | TrainableRows


@dataclass(frozen=True)
class Training:
    """Settings of a training run.

    The optimizer is AdamW with betas (0.9, 0.95) and no weight decay. After a short warm-up, learning rates decay to
    zero along a cosine. A learning rate of 0 freezes the parameters of that kind.

    ``matrix_optimizer`` assigns the rates to tensors. ``pipeline.stage_settings`` reads them from the recipe.

    Attributes:
        epochs: Passes over the training micro-batches.
        lr_codes: Learning rate of soft codes.
        lr_grids: Learning rate of scales and offsets, relative to the scales.
        lr_tuned: Learning rate of routers and norms.
        val_fraction: Share of the micro-batches that is held out for validation.
        seed: Of the order of micro-batches.
        on_capture_failure: Called when steps cannot be captured in a CUDA graph and are launched kernel by kernel.
        state_bytes: Bytes for the optimizer state of experts that are trained together. None: the largest of
            ``candidate_training.train_state_sizes``.
    """

    epochs: int
    lr_codes: float
    lr_grids: float
    lr_tuned: float
    val_fraction: float
    seed: int
    on_capture_failure: Callable[[], None] = lambda: None
    state_bytes: int | None = None

    def split(self, batches: int) -> tuple[range, range]:
        """Return the micro-batches to train on and those to validate on, the last ones. A single batch is both."""
        num_val = min(max(1, round(self.val_fraction * batches)), batches - 1)
        first_val = batches - num_val
        return range(first_val), range(first_val, batches) if num_val else range(batches)

    def optimizer(
        self, steps: int, codes: Sequence[Tensor], grids: Sequence[Tensor], tuned: Sequence[Tensor] = ()
    ) -> Optimizer:
        """Return an optimizer of tensors for a number of steps."""
        groups = ((codes, self.lr_codes), (grids, self.lr_grids), (tuned, self.lr_tuned))
        return Optimizer(groups, cosine_factors(steps))

    def matrix_optimizer(self, steps: int, matrices: Sequence[Matrices], tuned: Sequence[Tensor] = ()) -> Optimizer:
        """Return an optimizer of quantized matrices, with and without a fused step, and of ``tuned`` tensors."""
        codes: list[Tensor] = []
        grids: list[Tensor] = []
        fused: list[FusedMatrices] = []
        for m in matrices:
            if isinstance(m, FusedMatrices):
                fused.append(m)
                continue
            grids += m.grids()
            if m.soft_codes is not None:
                codes.append(m.soft_codes)
        optimizer = self.optimizer(steps, codes, grids, tuned)
        optimizer.add_fused(fused, self.lr_codes, self.lr_grids)
        return optimizer


class Optimizer:
    """AdamW over groups of parameters, each with its own learning rate, on one schedule.

    On a GPU everything that differs between steps is on the device, so that a step can run in a CUDA graph.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], float]], factors: Sequence[float]):
        """
        Args:
            groups: Parameters of one device, and their learning rate. A rate of 0 freezes them.
            factors: Of the learning rates, one for each step.
        """
        self.factors = factors
        self.inner: torch.optim.AdamW | None = None
        self.fused: Sequence[FusedMatrices] = ()
        self.rates: list[float] = []
        trained_groups: list[list[Tensor]] = []
        for parameters, rate in groups:
            for parameter in parameters:
                parameter.requires_grad_(rate > 0)
            if parameters and rate > 0:
                trained_groups.append(list(parameters))
                self.rates.append(rate)
        if trained_groups:
            self._create_schedule(trained_groups[0][0].device)
            self.inner = self._create_adamw(trained_groups)

    def _create_schedule(self, device: torch.device) -> None:
        """Put the schedule and the position in it on ``device``."""
        self.device = device
        self.step_index = torch.zeros((), dtype=torch.int64, device=device)
        self._device_factors = torch.tensor(self.factors, device=device)

    def _create_adamw(self, trained_groups: list[list[Tensor]]) -> torch.optim.AdamW:
        """Return torch's optimizer, whose learning rates are tensors on the device."""
        options = []
        for parameters, rate in zip(trained_groups, self.rates, strict=True):
            options.append({"params": parameters, "lr": torch.tensor(rate, device=self.device)})
        on_gpu = self.device.type == "cuda"
        return torch.optim.AdamW(options, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True, capturable=on_gpu)

    def add_fused(self, fused: Sequence[FusedMatrices], lr_codes: float, lr_grids: float) -> None:
        """Register matrices with a fused optimizer step, and their learning rates."""
        self.fused = fused
        if fused and self.inner is None:
            self._create_schedule(fused[0].leaf.device)
        if fused:
            self.schedule = StepSchedule.create(lr_codes, lr_grids, self.factors, self.step_index)

    def step(
        self, loss: Tensor, gradient: Tensor | None = None, sync_gradients: Callable[[], None] = lambda: None
    ) -> None:
        """Take the next step down the gradient of ``loss``.

        Args:
            loss: A scalar, or with ``gradient`` any tensor.
            gradient: Gradient of the objective with respect to ``loss``.
            sync_gradients: Called between the backward pass and the update.
        """
        if self.inner is not None:
            self.inner.zero_grad(set_to_none=True)
        for matrices in self.fused:
            matrices.leaf.grad = None  # of a step that was not taken
        if loss.requires_grad:  # False if every learning rate is 0
            loss.backward(gradient)
        sync_gradients()
        self.update()

    def update(self) -> None:
        """Take the next step with the gradients that the parameters have."""
        if self.inner is None and not self.fused:
            return
        if self.inner is not None:
            factor = self._device_factors.index_select(0, self.step_index.view(1)).squeeze(0)
            for group, rate in zip(self.inner.param_groups, self.rates, strict=True):
                torch.mul(factor, rate, out=group["lr"])
            self.inner.step()
        for index, matrices in enumerate(self.fused):
            matrices.step(self.schedule, seed=index)
        self.step_index += 1


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no element is infinite or NaN."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def tunable_names(replay: Replay, layer: Layer) -> list[str]:
    """Return the names inside the model of the parameters of a layer's router and norms."""
    prefix = layer.path + "."
    names = []
    for path, module in replay.model.named_modules():
        if not path.startswith(prefix):
            continue
        in_router = layer.router is not None and f"{path}.".startswith(f"{layer.router}.")
        if in_router or is_norm(module):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_floating_point():
                    names.append(f"{path}.{name}")
    return names


def as_parameter(model: Any, name: str, weight: Tensor) -> Tensor:
    """Return matrices [E, R, C] in the layout and dtype of the model's parameter ``name``."""
    parameter = model.get_parameter(name)
    module = model.get_submodule(name.rpartition(".")[0])
    if hasattr(module, "is_transposed"):  # an experts module
        oriented = weight.transpose(1, 2) if module.is_transposed else weight
    else:
        oriented = weight.reshape(parameter.shape)
    return oriented.to(parameter.dtype)


def expert_overrides(model: Any, experts: Experts, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the weights [E, R, C] of a layer's experts by parameter name, in the parameters' layout and dtype."""
    overrides = {}
    for matrix, weight in zip(experts.matrices, weights, strict=True):
        name = f"{experts.path}.{matrix.name}"
        overrides[name] = as_parameter(model, name, weight)
    return overrides
