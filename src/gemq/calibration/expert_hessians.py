"""Hessians of a layer's experts, from recorded calls of their module.

Shapes: E experts of this rank, R rows and C columns of the first matrix, I columns of the second (down), P pairs of
token and expert.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from gemq.models.experts import ExpertsCall, apply_first, apply_first_with_slopes, expert_weight, route_local_call
from gemq.models.structure import Experts
from gemq.quant.compensation import ChangeAccumulator
from gemq.quant.hessian import HessianAccumulator
from gemq.runtime.ranks import Ranks


class ExpertHessians(Protocol):
    """What accumulates Hessians of the experts of this rank.

    Attributes:
        expert_slice: these experts, with a start and a stop.
    """

    expert_slice: slice

    def add(self, module: Any, call: ExpertsCall) -> None:
        """Adds what the experts computed in a recorded call of their module."""

    def finish(self, ranks: Ranks) -> None:
        """Call after the last call was added, with the ranks among which the layer's experts are divided."""


class InputHessians:
    """Hessians of the inputs of both matrices in full precision.

    Attributes:
        first: of the inputs of the first matrix.
        down: of those of the second matrix; None if they were not requested.
        slopes: second moments of the derivatives of the second matrix's inputs by the first matrix's outputs, times
            routing weights; None if they were not requested.
    """

    def __init__(
        self,
        experts: Experts,
        expert_slice: slice,
        device: torch.device,
        *,
        with_down: bool = True,
        with_slopes: bool = False,
    ) -> None:
        self.expert_slice = expert_slice
        count = expert_slice.stop - expert_slice.start
        first, down = experts.matrices
        self._first_name = first.name
        self.first = HessianAccumulator(count, first.columns, device)
        self.down = HessianAccumulator(count, down.columns, device) if with_down else None
        self.slopes = HessianAccumulator(count, first.rows, device) if with_slopes else None

    def by_matrix(self) -> list[HessianAccumulator]:
        """Returns the Hessians of the inputs of the matrices, in the order of the matrices."""
        return [self.first] if self.down is None else [self.first, self.down]

    def add(self, module: Any, call: ExpertsCall) -> None:
        """Adds the inputs of both matrices."""
        weight = expert_weight(module, self._first_name)[self.expert_slice]
        pairs = route_local_call(call, self.expert_slice, weight)
        x = call.hidden.index_select(0, pairs.token)
        self.first.add(x, pairs.ends)
        if self.slopes is not None:
            h, slopes = apply_first_with_slopes(module, self._first_name, weight, x, pairs)
            self.slopes.add(slopes * pairs.weight.unsqueeze(1).to(slopes.dtype), pairs.ends)
        elif self.down is not None:
            h = apply_first(module, self._first_name, weight, x, pairs)
        else:
            return
        if self.down is not None:
            self.down.add(h, pairs.ends)

    def finish(self, ranks: Ranks) -> None:
        """See ``ExpertHessians``."""
        for hessians in (self.first, self.down, self.slopes):
            if hessians is not None:
                hessians.finish(ranks)


class HiddenHessians:
    """Hessians of the inputs of the second matrix after the first one was quantized.

    Attributes:
        hessians: of these inputs.
    """

    def __init__(self, experts: Experts, expert_slice: slice, quantized_first: Tensor) -> None:
        """
        Args:
            experts: description of the experts.
            expert_slice: the experts to accumulate.
            quantized_first: [E, R, C], quantized first matrices of these experts.
        """
        self.expert_slice = expert_slice
        self._first_name = experts.matrices[0].name
        self._quantized_first = quantized_first
        self.hessians = HessianAccumulator(len(quantized_first), experts.matrices[1].columns, quantized_first.device)

    def add(self, module: Any, call: ExpertsCall) -> None:
        """Adds the inputs of the second matrix."""
        pairs = route_local_call(call, self.expert_slice, self._quantized_first)
        x = call.hidden.index_select(0, pairs.token)
        self.hessians.add(apply_first(module, self._first_name, self._quantized_first, x, pairs), pairs.ends)

    def finish(self, ranks: Ranks) -> None:
        """See ``ExpertHessians``."""
        self.hessians.finish(ranks)


class HiddenChanges:
    """How the inputs of the second matrix changed when the first one was quantized.

    Attributes:
        changes: of these inputs.
    """

    def __init__(self, experts: Experts, expert_slice: slice, quantized_first: Tensor) -> None:
        """Takes the arguments of ``HiddenHessians``."""
        self.expert_slice = expert_slice
        self._first_name = experts.matrices[0].name
        self._quantized_first = quantized_first
        self.changes = ChangeAccumulator(len(quantized_first), experts.matrices[1].columns, quantized_first.device)

    def add(self, module: Any, call: ExpertsCall) -> None:
        """Adds the inputs of the second matrix, with both first matrices."""
        weight = expert_weight(module, self._first_name)[self.expert_slice]
        pairs = route_local_call(call, self.expert_slice, weight)
        x = call.hidden.index_select(0, pairs.token)
        h = apply_first(module, self._first_name, self._quantized_first, x, pairs)
        self.changes.add(h, apply_first(module, self._first_name, weight, x, pairs) - h, pairs.ends)

    def finish(self, ranks: Ranks) -> None:
        """Does nothing: sums of changes are not averaged over experts."""
