"""The packed model as a function of what distillation trains of it, one layer at a time.

A layer is dequantized when it runs, forward and again backward, and dropped: never are all of them dense. What is
trained of it is updated as soon as its gradient is there. Packed layers and their optimizers' states wait where memory
has room for them; where all stay on a GPU, each layer's two steps are launched from CUDA graphs.

Shapes: B windows, S tokens, H hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemq.calibration.activations import Activations
from gemq.kernels.training.differentiable_dequantize import codes_of, weights
from gemq.layers.refinement import RefinedLayer, matrix_widths
from gemq.layers.training import Training, all_finite, as_parameter, expert_overrides, set_gradients, tunable_names
from gemq.models.replay import Call, Replay
from gemq.models.structure import Experts, Layer, Matrix, is_norm
from gemq.quant.gptq import highest_codes
from gemq.quant.grid import Quantized, encode
from gemq.quant.packing import PackedMatrix
from gemq.quant.trainable import TrainableMatrices, rounded_to
from gemq.quant.widths import ExpertWidths, Width, group_size_for
from gemq.runtime.cuda_graph import Replayed
from gemq.runtime.memory import Place, Waiting
from gemq.runtime.ranks import SINGLE, Ranks

GIVEN = 5
"""Tensors of the size of hidden states that a layer's CUDA graphs are given and give: see ``_PackedLayer.capture``."""


@dataclass(frozen=True)
class Distillation:
    """What is trained, and towards what.

    loss: ``kl`` from the full-precision model, or ``next_token``
    sets: any of ``routers``, ``norms`` and ``grids`` (the experts' scales and offsets)
    """

    training: Training
    loss: str
    sets: tuple[str, ...]


class PackedExperts:
    """One matrix of a layer's experts, packed, with trainable scales and offsets."""

    def __init__(
        self, refined: RefinedLayer, experts: Experts, matrix: Matrix, widths: Sequence[Width], group_size: int
    ):
        self.matrix, self.widths = matrix, widths
        self.names = [f"{experts.path}.{e}.{matrix.name}" for e in range(experts.count)]
        packed = [PackedMatrix(*(refined.tensors[f"{n}.{p}"] for p in PackedMatrix._fields)) for n in self.names]
        self.codes = codes_of(packed, self.widths, group_size_for(matrix.columns, group_size))
        grids = [one.grids(width) for one, width in zip(packed, self.widths, strict=True)]
        scales, offsets = (torch.stack(parts) for parts in zip(*grids, strict=True))
        # their codes stay packed: of these only scales and offsets are used
        q = Quantized(packed[0].codes, scales, offsets)
        self.grids = TrainableMatrices(q, highest_codes(self.widths, scales.device), None)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[E, rows, columns], differentiable in scales and offsets."""
        return weights(*self.grids.grid(), self.codes, dtype)

    def held(self) -> list[Tensor]:
        """All tensors."""
        grids = self.grids
        return [*self.codes.held(), grids.base_scale, grids.base_offset, grids.highest, *grids.grids()]

    def result(self) -> dict[str, Tensor]:
        """Scales and offsets by their checkpoint names, on the CPU."""
        q = self.grids.result()
        found = {}
        for part, whole in zip(("scales", "offsets"), encode(q.scales, q.offsets, self.grids.highest), strict=True):
            found.update(
                {f"{name}.{part}": own.to("cpu", copy=True) for name, own in zip(self.names, whole, strict=True)}
            )
        return found


class Student:
    """The packed model as a function of its trainable parameters."""

    def __init__(
        self,
        replay: Replay,
        refined: Callable[[int], RefinedLayer],
        widths: Sequence[Sequence[ExpertWidths]],
        dense_bits: int,
        how: Distillation,
        steps: int,
        stored: dict[str, torch.dtype],
        group_size: int,
        sharded: bool,
        beside: int,
    ):
        """sharded: other ranks train on other windows; ``beside``: bytes that layers' CUDA graphs take together"""
        self.replay, self.group = replay, replay.ranks if sharded else SINGLE
        self.layers = [
            _PackedLayer(replay, i, refined(i), row, dense_bits, how, steps, stored, group_size, self.group)
            for i, row in enumerate(widths)
        ]
        # what waits elsewhere comes to other addresses each time
        here = not replay.passes_more and all(layer.waiting.place is Place.DEVICE for layer in self.layers)
        self._beside = beside if replay.device.type == "cuda" and here and replay.memory.room(beside) else 0
        pool = torch.cuda.graph_pool_handle() if self._beside else None
        for layer in self.layers:
            layer.capture(bool(self._beside), pool, how.training.tell)
        names = _tail_norms(replay) if "norms" in how.sets else []
        tail = {name: replay.model.get_parameter(name).detach().float().clone() for name in names}
        self.tail = _Tuned(replay, tail, stored)
        self.optimizer = how.training.optimizer(steps, (), (), list(tail.values())) if tail else None

    def inputs(self, activations: Activations, batch: int) -> list[Tensor]:
        """What each layer receives [B, S, H], and what the last one gives, outside autograd."""
        hidden = [activations.hidden[batch]]
        for index, layer in enumerate(self.layers):
            hidden.append(layer.output(hidden[-1], activations.calls[batch][index]))
        return hidden

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        return self.replay.logits(ids, hidden, self.tail.overrides())

    def descend(
        self,
        losses: Iterable[Tensor],
        last: Tensor,
        inputs: list[Tensor],
        activations: Activations,
        batch: int,
    ) -> None:
        """One step down the gradient of the sum of ``losses``, from behind the last layer to the first.

        last: what the last layer gave, a leaf; ``inputs`` of the layers, which are computed again
        """
        trained = [parameter for parameter in self.tail.parameters.values() if parameter.requires_grad]
        parts = [torch.autograd.grad(part, [last, *trained]) for part in losses]
        gradient, *of_tail = (sum(each[1:], start=each[0]) for each in zip(*parts, strict=True))
        set_gradients(trained, of_tail, self.group)
        if self.optimizer is not None:
            self.optimizer.update()
        for index in reversed(range(len(self.layers))):
            gradient = self.layers[index].descend(inputs.pop(), gradient, activations.calls[batch][index])

    def tensors(self) -> dict[str, Tensor]:
        return {name: t for layer in self.layers for name, t in layer.tensors().items()}

    def tuned(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for tuned in (*(layer.tuned for layer in self.layers), self.tail):
            found.update(tuned.result())
        return found

    def is_finite(self) -> bool:
        """Whether all that is trained is finite, parameters that held-out windows do not reach included."""
        return all_finite(self.tail.parameters.values()) and all(layer.is_finite() for layer in self.layers)

    def close(self) -> None:
        for layer in self.layers:
            layer.close()
        self.replay.memory.on_device.give(self._beside)


class _Tuned:
    """Routers and norms under training, float32, by their names inside the model."""

    def __init__(self, replay: Replay, parameters: dict[str, Tensor], stored: dict[str, torch.dtype]):
        self.replay, self.parameters, self.stored = replay, parameters, stored

    def overrides(self) -> dict[str, Tensor]:
        model = self.replay.model
        return {n: rounded_to(p, self.stored[n]).to(model.get_parameter(n).dtype) for n, p in self.parameters.items()}

    def result(self) -> dict[str, Tensor]:
        ranks = self.replay.ranks
        found = {n: rounded_to(p.detach(), self.stored[n]) for n, p in self.parameters.items()}
        return {n: ranks.broadcast(t, 0).to("cpu", copy=True) for n, t in found.items()}


class _PackedLayer:
    """One finished layer: packed matrices, what is not quantized, and what is trained of it."""

    def __init__(
        self,
        replay: Replay,
        index: int,
        refined: RefinedLayer,
        widths: Sequence[ExpertWidths],
        dense_bits: int,
        how: Distillation,
        steps: int,
        stored: dict[str, torch.dtype],
        group_size: int,
        group: Ranks,
    ):
        """among: ranks that have other windows"""
        self.replay, self.index, self.group = replay, index, group
        self.layer = layer = replay.structure.layers[index]
        of_matrices = matrix_widths(layer, widths)
        self.experts = (
            [PackedExperts(refined, layer.experts, m, of_matrices[m.name], group_size) for m in layer.experts.matrices]
            if layer.experts
            else []
        )
        self.linears = {}
        for linear in layer.linears if dense_bits < 16 else ():
            packed = PackedMatrix(*(refined.tensors[f"{linear.path}.{part}"] for part in PackedMatrix._fields))
            codes = codes_of([packed], [dense_bits], group_size_for(linear.columns, group_size))
            scales, offsets = packed.grids(dense_bits)
            self.linears[f"{linear.path}.weight"] = codes, scales[None], offsets[None]
        matrices = layer.experts.matrices if layer.experts else ()
        replaced = {*self.linears, *(f"{layer.experts.path}.{m.name}" for m in matrices if layer.experts)}
        self.rest = replay.rest(index, replaced)
        self.rest.update({n: t.to(self.rest[n].dtype) for n, t in refined.tuned.items()})
        wanted = {n: self.rest[n].float().clone() for n in _wanted(replay, layer, how.sets)}
        self.tuned = _Tuned(replay, wanted, stored)
        grids = [g for m in self.experts for g in m.grids.grids()] if "grids" in how.sets else []
        training = how.training
        self.with_grids = bool(grids)
        self.optimizer = training.optimizer(steps, (), grids, list(wanted.values())) if grids or wanted else None
        self.trained = [p for p in (*grids, *wanted.values()) if p.requires_grad]
        self.waiting = Waiting(replay.memory, self._held, 3 * sum(p.numel() * 4 for p in self.trained))

    def capture(self, usable: bool, pool: Any, tell: Callable[[], None]) -> None:
        """Prepares the layer's two steps. ``pool``: of the CUDA graphs of all layers, which run one after the other."""
        self._output, self._descend = (
            Replayed(run, self.replay.device, tell, usable=usable, pool=pool) for run in (self._run, self._step)
        )

    def _held(self) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors that stay as they are, and those that a step changes."""
        fixed = [*self.rest.values(), *(t for codes, *grids in self.linears.values() for t in (*codes.held(), *grids))]
        fixed += [t for m in self.experts for t in m.held()]
        changing = list(self.trained)
        if self.optimizer is not None and self.optimizer.inner is not None:
            changing += [t for state in self.optimizer.inner.state.values() for t in state.values()]
        known = {id(t) for t in changing}
        return [t for t in fixed if id(t) not in known], changing

    @torch.no_grad()
    def output(self, hidden: Tensor, call: Call) -> Tensor:
        """The layer's output [B, S, H], outside autograd."""
        self.waiting.come()
        output: Tensor = self._output(call, hidden)
        self.waiting.leave()
        return output

    def descend(self, hidden: Tensor, gradient: Tensor, call: Call) -> Tensor:
        """The next step, down the gradient of the layer's output. Returns that of its input ``hidden``."""
        self.waiting.come()
        of_hidden: Tensor = self._descend(call, hidden, gradient)
        self.waiting.leave(changed=True)
        return of_hidden

    def is_finite(self) -> bool:
        """Whether all that is trained of the layer is finite."""
        self.waiting.come()
        finite = all_finite(self.trained)
        self.waiting.leave()
        return finite

    def close(self) -> None:
        """Lets go of everything."""
        self._output.close()
        self._descend.close()
        self.waiting.close()

    def _step(self, call: Call, hidden: Tensor, gradient: Tensor) -> Tensor:
        leaf = self.replay.leaf(hidden)
        output = self._run(call, leaf)
        # every parameter's, wanted or not: one that no token met has none
        of_hidden, *of_all = torch.autograd.grad(output, [leaf, *self.trained], gradient, allow_unused=True)
        set_gradients(self.trained, of_all, self.group)
        if self.optimizer is not None:
            self.optimizer.update()
        for parameter in self.trained:
            parameter.grad = None
        return of_hidden

    def _run(self, call: Call, hidden: Tensor) -> Tensor:
        """The layer's output [B, S, H]; dequantized for the moment, differentiable in what is trained."""
        model = self.replay.model
        overrides = {**self.rest, **self.tuned.overrides()}
        for name, (codes, scales, offsets) in self.linears.items():
            weight = codes.weights(scales, offsets, model.get_parameter(name).dtype)
            overrides[name] = as_parameter(model, name, weight)
        if self.layer.experts is not None:
            dtype = model.get_parameter(f"{self.layer.experts.path}.{self.experts[0].matrix.name}").dtype
            unpacked = [m.weight(dtype) for m in self.experts]
            overrides.update(expert_overrides(model, self.layer.experts, unpacked))
        return self.replay.run(self.index, hidden, call, overrides)

    def tensors(self) -> dict[str, Tensor]:
        """Experts' scales and offsets, if they are trained."""
        self.waiting.come()
        found = {name: t for m in self.experts for name, t in m.result().items()} if self.with_grids else {}
        self.waiting.leave()
        return found


def _wanted(replay: Replay, layer: Layer, sets: tuple[str, ...]) -> list[str]:
    def is_router(name: str) -> bool:
        return layer.router is not None and name.startswith(layer.router + ".")

    return [n for n in tunable_names(replay, layer) if ("routers" if is_router(n) else "norms") in sets]


def _tail_norms(replay: Replay) -> list[str]:
    """Norms behind the last layer: those outside the list of layers."""
    inside = replay.structure.layers_path + "."
    return [
        f"{path}.{name}"
        for path, module in replay.model.named_modules()
        if is_norm(module) and not path.startswith(inside)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point()
    ]
