"""Records what the linears and the experts module of one layer receive while the layer runs.

Must not import windows, texts or files.

Shapes: T tokens, K experts per token, H hidden size, C input columns of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemq.errors import UserError
from gemq.models.experts import ExpertsCall, parse_experts_call
from gemq.models.structure import Linear
from gemq.runtime.activation_store import ActivationStore
from gemq.runtime.compat import torch_private
from gemq.runtime.memory import MemoryBudget
from gemq.runtime.ranks import Ranks

TENSORS_PER_CALL = 3
"""Tensors of an experts call in an exchange: hidden states, expert indices and routing weights."""


class StopForward(Exception):
    """Ends a forward pass once everything that it should record has been recorded."""


@dataclass(frozen=True)
class RecordedInputs:
    """What the recorded modules received in one forward pass of a layer.

    Attributes:
        first_linear: for each linear, the index of the first linear that received the same tensors; -1 if it did not
            run.
        rows: for each linear, its inputs [T, C]; None if it did not run or an earlier linear received the same.
        experts_call: the calls of the experts module as one call, without its output; None if it did not run.
    """

    first_linear: list[int]
    rows: list[Tensor | None]
    experts_call: ExpertsCall | None

    def flatten(self) -> list[Tensor | None]:
        """All tensors in a fixed order, for an exchange between ranks."""
        call = self.experts_call
        if call is None:
            return [*self.rows, *[None] * TENSORS_PER_CALL]
        return [*self.rows, call.hidden, call.top_k_index, call.top_k_weights]

    @classmethod
    def unflatten(cls, tensors: Sequence[Tensor | None], first_linear: Sequence[int]) -> RecordedInputs:
        """The inverse of ``flatten``."""
        num_linears = len(first_linear)
        hidden, index, weights = tensors[num_linears:]
        call = None
        if hidden is not None and index is not None and weights is not None:
            call = ExpertsCall(hidden, index, weights, hidden.new_empty(0))
        return cls(list(first_linear), list(tensors[:num_linears]), call)


class InputRecorder:
    """Records the inputs of linears and of an experts module by forward hooks, every call of each.

    Args:
        model: holds the modules.
        linears: the linears to record.
        experts: the experts module to record, if any.
    """

    def __init__(self, model: nn.Module, linears: Sequence[Linear], experts: nn.Module | None):
        self._linears = [model.get_submodule(linear.path) for linear in linears]
        self._experts = experts
        self.clear()

    def clear(self) -> None:
        """Forgets the inputs recorded so far."""
        self._inputs: list[list[Tensor]] = [[] for _ in self._linears]
        self._versions: list[tuple[Tensor, int]] = []
        self._calls: list[ExpertsCall] = []

    def call_counts(self) -> list[int]:
        """Number of recorded calls of each linear, followed by that of the experts module if it is recorded."""
        counts = [len(inputs) for inputs in self._inputs]
        if self._experts is not None:
            counts.append(len(self._calls))
        return counts

    @contextmanager
    def recording(self, expected_counts: Sequence[int] | None = None) -> Iterator[None]:
        """Records while the context is open.

        Args:
            expected_counts: The forward pass ends by ``StopForward`` once ``call_counts`` equals this. Without it,
                or if a count is zero, the pass runs to its end, since an uncalled module might still be called.
        """
        stops_early = expected_counts is not None and 0 not in expected_counts

        def stop_if_complete() -> None:
            if stops_early and self.call_counts() == expected_counts:
                raise StopForward

        def record_experts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls.append(parse_experts_call(module, args, kwargs))
            stop_if_complete()

        def linear_hook(index: int) -> Callable[..., None]:
            def record_linear(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                self._inputs[index].append(x)
                self._versions.append((x, torch_private.write_count(x)))
                stop_if_complete()

            return record_linear

        with ExitStack() as stack:
            for index, linear in enumerate(self._linears):
                handle = linear.register_forward_pre_hook(linear_hook(index), with_kwargs=True)
                stack.callback(handle.remove)
            if self._experts is not None:
                handle = self._experts.register_forward_pre_hook(record_experts, with_kwargs=True)
                stack.callback(handle.remove)
            with suppress(StopForward):
                yield

    def recorded(self) -> RecordedInputs:
        """The inputs recorded since ``clear``.

        Raises:
            UserError: the layer overwrote one of them after it was received.
        """
        self._check_not_overwritten()
        first_linear = [self._first_with_same_inputs(index) for index in range(len(self._linears))]
        rows: list[Tensor | None] = []
        for index, inputs in enumerate(self._inputs):
            if first_linear[index] == index:
                rows.append(cat_rows([x.flatten(0, -2) for x in inputs]))
            else:
                rows.append(None)
        return RecordedInputs(first_linear, rows, self._joined_call())

    def _check_not_overwritten(self) -> None:
        """Raises UserError if a recorded tensor was modified in place: it was kept without a copy."""
        if any(torch_private.write_count(x) != version for x, version in self._versions):
            raise UserError(
                "a layer overwrites what one of its linears has received: gemq cannot calibrate it; this family is not "
                "supported yet"
            )

    def _first_with_same_inputs(self, index: int) -> int:
        """Index of the first linear that received the same tensor objects as linear ``index``; -1 without a call."""
        inputs = self._inputs[index]
        if not inputs:
            return -1
        identities = [id(x) for x in inputs]
        for earlier in range(index):
            if [id(x) for x in self._inputs[earlier]] == identities:
                return earlier
        return index

    def _joined_call(self) -> ExpertsCall | None:
        """The recorded calls of the experts module, concatenated along their rows."""
        if not self._calls:
            return None
        hidden = cat_rows([call.hidden for call in self._calls])
        index = cat_rows([call.top_k_index for call in self._calls])
        weights = cat_rows([call.top_k_weights for call in self._calls])
        return ExpertsCall(hidden, index, weights, hidden.new_empty(0))


def all_gather_recordings(ranks: Ranks, recordings: Sequence[RecordedInputs]) -> Iterator[RecordedInputs]:
    """Yields all ranks' recordings, ordered by position in ``recordings`` and then by rank. One exchange for all.

    Args:
        ranks: the processes, all of which must call this with the same number of recordings.
        recordings: this rank's, all of the same linears.
    """
    if ranks.count == 1:
        yield from recordings
        return
    num_linears = len(recordings[0].first_linear)
    num_tensors = num_linears + TENSORS_PER_CALL
    tensors: list[Tensor | None] = []
    integers: list[int] = []
    for recording in recordings:
        tensors += recording.flatten()
        integers += recording.first_linear
    gathered = ranks.all_gather_tensors(tensors, integers)
    for position in range(len(recordings)):
        tensor_range = slice(position * num_tensors, (position + 1) * num_tensors)
        integer_range = slice(position * num_linears, (position + 1) * num_linears)
        for rank_tensors, rank_integers in gathered:
            yield RecordedInputs.unflatten(rank_tensors[tensor_range], rank_integers[integer_range])


class RecordedExpertCalls(Sequence[ExpertsCall]):
    """Recorded calls of an experts module without outputs, one per micro-batch, offloaded when memory is short."""

    def __init__(self, memory: MemoryBudget):
        self._hidden = ActivationStore(memory)
        self._routing: list[tuple[Tensor, Tensor]] = []

    def extend(self, call: ExpertsCall, token_counts: Sequence[int]) -> None:
        """Appends the call of one forward pass over several micro-batches, split into one call for each of them.

        Args:
            call: rows of all micro-batches. Experts modules that receive a row for each token and expert have those of
                the first expert first, ``sum(token_counts)`` rows, then those of the next.
            token_counts: tokens of each micro-batch, in order.
        """
        if len(token_counts) == 1:  # nothing to split, also if a layer calls its experts several times
            token_counts = [len(call.hidden)]
        hidden = _split_tokens(call.hidden, token_counts)
        index = _split_tokens(call.top_k_index, token_counts)
        weights = _split_tokens(call.top_k_weights, token_counts)
        for batch_hidden, batch_index, batch_weights in zip(hidden, index, weights, strict=True):
            self._hidden.append(batch_hidden)
            self._routing.append((batch_index, batch_weights))

    def __len__(self) -> int:
        return len(self._routing)

    def __getitem__(self, index: Any) -> Any:
        """The call of micro-batch ``index``, which must not be a slice."""
        hidden = self._hidden[index]
        top_k_index, top_k_weights = self._routing[index]
        return ExpertsCall(hidden, top_k_index, top_k_weights, hidden.new_empty(0))


def _split_tokens(rows: Tensor, token_counts: Sequence[int]) -> Iterator[Tensor]:
    """Splits rows [N * T, ...], T the sum of ``token_counts``, into [N * t, ...] for each micro-batch of t tokens."""
    by_token = rows.unflatten(0, (-1, sum(token_counts)))
    for batch_rows in by_token.split(list(token_counts), 1):
        yield batch_rows.flatten(0, 1)


def cat_rows(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.cat`` along the first dimension, without a copy for a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def split_rows(rows: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """Splits ``rows`` along the first dimension into the lengths of the tensors ``like``; inverts ``cat_rows``."""
    return [rows] if len(like) == 1 else rows.split([len(x) for x in like])
