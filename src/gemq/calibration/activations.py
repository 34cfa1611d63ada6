"""Calibration activations, one layer at a time: inputs of the layers, and Hessians of their linears' inputs.

Used by every stage that runs the layers in order. Must not import files.

Shapes: B windows in a micro-batch, S tokens in a window, H hidden size, N windows in all.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemq.calibration.expert_hessians import ExpertHessians
from gemq.calibration.input_recorder import (
    InputRecorder,
    RecordedExpertCalls,
    RecordedInputs,
    all_gather_recordings,
    cat_rows,
    split_rows,
)
from gemq.calibration.windows import Windows
from gemq.models.replay import Call, Replay
from gemq.models.structure import Linear
from gemq.quant.hessian import HessianAccumulator
from gemq.runtime.activation_store import ActivationStore
from gemq.runtime.integers import ceil_div
from gemq.runtime.ranks import MAX_EXCHANGE_BYTES, SINGLE, Ranks


@dataclass
class Activations:
    """This rank's calibration windows on their way through the layers, in micro-batches fixed by the recipe.

    Attributes:
        ids: per micro-batch, token ids [B, S] int64.
        source: per micro-batch, the calibration source of each window, [B] int64.
        calls: per micro-batch, one call per layer.
        hidden: per micro-batch, the input [B, S, H] of the layer to run next.
        order: [N] int64, indices of the windows in their set, in the order of all ranks' micro-batches.
        all_ids: ``ids`` of all ranks' micro-batches. Empty if there are no other ranks.
        batches_per_forward: consecutive micro-batches that run through a layer in one forward.
        max_batches_per_forward: the same for states of several models, whose micro-batches need not be consecutive.
    """

    ids: list[Tensor]
    source: list[Tensor]
    calls: list[list[Call]]
    hidden: ActivationStore
    order: Tensor
    all_ids: list[Tensor] = field(default_factory=list)
    batches_per_forward: int = 1
    max_batches_per_forward: int = 1
    _group_calls: dict[tuple[int, ...], list[Call]] = field(default_factory=dict)
    _for_training: dict[bool, Activations] = field(default_factory=dict)

    @classmethod
    def start(cls, replay: Replay, windows: Windows, micro_batch_tokens: int, seed: int) -> Activations:
        """Hidden states before the first layer.

        Args:
            replay: the model.
            windows: all calibration windows.
            micro_batch_tokens: tokens of a micro-batch.
            seed: sets the order of the windows, in which a micro-batch mixes the sources.
        """
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        batches = list(windows.batches(micro_batch_tokens))
        all_ids = [windows.tokens[order[batch]].to(replay.device) for batch in batches]
        local_batches = replay.ranks.local_batches(len(batches))
        ids, source, calls, hidden = [], [], [], ActivationStore(replay.memory)
        for index in local_batches:
            inputs, layer_calls = replay.inputs(all_ids[index])
            ids.append(all_ids[index])
            source.append(windows.source[order[batches[index]]].to(replay.device))
            calls.append(layer_calls)
            hidden.append(inputs)
        # outputs besides hidden states are an attribute of one micro-batch's tensor, which concatenation would lose
        max_batches = 1 if replay.has_extra_outputs else replay.ranks.max_batches_per_forward
        batches_per_forward = min(max_batches, replay.ranks.batches_per_forward(len(batches)))
        return cls(ids, source, calls, hidden, order, all_ids, batches_per_forward, max_batches)

    @property
    def total(self) -> int:
        """Number of micro-batches of all ranks."""
        return len(self.all_ids or self.ids)

    def can_shard_windows(self, ranks: Ranks) -> bool:
        """Whether training can divide each micro-batch's windows among ranks: on GPUs, into equal parts."""
        return ranks.shards_windows and not any(len(ids) % ranks.count for ids in self.all_ids)

    def gather_for_training(self, replay: Replay, sharded: bool = False) -> Activations:
        """Gathers the micro-batches of all ranks for training. Without ``source``. Runs collectives.

        Args:
            replay: the model and its ranks.
            sharded: Of each micro-batch, take this rank's windows only.
        """
        ranks = replay.ranks
        if ranks.count == 1:
            return self
        if sharded not in self._for_training:
            ids = self.all_ids
            if sharded:
                ids = [batch_ids[ranks.local_slice(len(batch_ids))] for batch_ids in ids]
            calls = [replay.inputs(batch_ids)[1] for batch_ids in ids]
            no_hidden = ActivationStore(replay.memory)
            self._for_training[sharded] = dataclasses.replace(
                self, ids=ids, source=[], calls=calls, hidden=no_hidden, _group_calls={}
            )
        return dataclasses.replace(self._for_training[sharded], hidden=self.gather(replay, self.hidden, sharded))

    def gather(self, replay: Replay, local: ActivationStore, sharded: bool = False) -> ActivationStore:
        """Gathers a tensor [B, ...] of every micro-batch from its rank. Runs collectives.

        Args:
            replay: the model and its ranks.
            local: tensors of this rank's micro-batches.
            sharded: Of each micro-batch, take this rank's windows only.
        """
        ranks = replay.ranks
        if ranks.count == 1:
            return local
        gathered = ranks.gather_micro_batches(local, self.total)
        if sharded:
            gathered = (tensor[ranks.local_slice(len(tensor))].clone() for tensor in gathered)
        return ActivationStore(replay.memory, gathered)

    def join_gather(self, replay: Replay) -> None:
        """Takes part in the collectives of ``gather_for_training`` on a rank that does not need its result."""
        for _ in replay.ranks.gather_micro_batches(self.hidden, self.total):
            pass

    def forward_groups(self) -> list[range]:
        """This rank's micro-batches, as ranges of those that run through a layer in one forward."""
        count, step = len(self.ids), self.batches_per_forward
        return [range(start, min(start + step, count)) for start in range(0, count, step)]

    def call(self, replay: Replay, index: int, batches: Sequence[int]) -> Call:
        """The call of layer ``index`` for the concatenated windows of some micro-batches."""
        if len(batches) == 1:
            return self.calls[batches[0]][index]
        key = tuple(batches)
        if key not in self._group_calls:
            ids = torch.cat([self.ids[batch] for batch in key])
            self._group_calls[key] = replay.inputs(ids)[1]
        return self._group_calls[key][index]

    @torch.no_grad()
    def advance(self, replay: Replay, index: int, overrides: dict[str, Tensor] | None = None) -> None:
        """Runs layer ``index`` on all micro-batches and overwrites ``hidden``.

        Args:
            replay: the model.
            index: of the layer.
            overrides: as in ``Replay.run``.
        """
        self.advance_all(replay, index, [self.hidden], overrides)

    @torch.no_grad()
    def advance_all(
        self, replay: Replay, index: int, states: Sequence[ActivationStore], overrides: dict[str, Tensor] | None = None
    ) -> None:
        """Runs layer ``index`` on several models' hidden states of these windows and overwrites them.

        Args:
            replay: the model.
            index: of the layer.
            states: for each model, [B, S, H] per micro-batch.
            overrides: as in ``Replay.run``.
        """
        for group in self.forward_groups():
            slots = [(state, batch) for state in states for batch in group]
            for start in range(0, len(slots), self.max_batches_per_forward):
                chunk = slots[start : start + self.max_batches_per_forward]
                inputs = [state[batch] for state, batch in chunk]
                call = self.call(replay, index, [batch for _, batch in chunk])
                outputs = replay.run(index, cat_rows(inputs), call, overrides)
                for (state, batch), output in zip(chunk, split_rows(outputs, inputs), strict=True):
                    state[batch] = output


@dataclass
class LinearHessians:
    """Hessians of the inputs of the dense linears of one layer.

    Attributes:
        by_path: by module path. Linears that receive the same tensor share one object.
    """

    by_path: dict[str, HessianAccumulator] = field(default_factory=dict)

    def add(self, linears: Sequence[Linear], recorded: RecordedInputs) -> None:
        """Adds the recorded inputs of ``linears``."""
        for linear, first_index, rows in zip(linears, recorded.first_linear, recorded.rows, strict=True):
            if rows is not None:
                if linear.path not in self.by_path:
                    self.by_path[linear.path] = HessianAccumulator(1, linear.columns, rows.device)
                ends = torch.full((1,), len(rows), device=rows.device)
                self.by_path[linear.path].add(rows, ends)
            elif first_index >= 0:
                self.by_path[linear.path] = self.by_path[linears[first_index].path]

    def finish(self) -> None:
        """Call after the last inputs were added."""
        for hessians in {id(hessians): hessians for hessians in self.by_path.values()}.values():
            hessians.finish()


@torch.no_grad()
def layer_hessians(
    replay: Replay,
    index: int,
    activations: Activations,
    linears: Sequence[Linear],
    expert_hessians: Sequence[ExpertHessians],
    expert_calls: RecordedExpertCalls | None = None,
    with_outputs: bool = True,
) -> tuple[LinearHessians, ActivationStore]:
    """Runs layer ``index`` on this rank's micro-batches and accumulates Hessians over those of all ranks.

    Ranks exchange the inputs of linears and experts. Each rank adds all of them up in the order of the micro-batches,
    so that sums are those of a job with one rank.

    Args:
        replay: the model and its ranks.
        index: of the layer.
        activations: its inputs.
        linears: the linears whose Hessians to accumulate, on every rank.
        expert_hessians: accumulate those of this rank's experts; empty: no experts.
        expert_calls: receives the calls of the experts module, one per micro-batch, for training.
        with_outputs: False: returns no outputs, and runs the layer no further than to the last recorded module.

    Returns:
        The Hessians of the linears, and the layer's outputs [B, S, H] per micro-batch of this rank.
    """
    experts = replay.structure.layers[index].experts if expert_hessians else None
    module = replay.model.get_submodule(experts.path) if experts else None
    hessians = LinearHessians()
    outputs = ActivationStore(replay.memory)
    if not linears and module is None and not with_outputs:
        return hessians, outputs

    recorder = InputRecorder(replay.model, linears, module)
    expected_counts: list[int] | None = None
    groups = activations.forward_groups()
    all_token_counts = iter([ids.numel() for ids in activations.all_ids or activations.ids])
    for exchange in _exchange_ranges(replay, activations, len(linears) + 1):
        recordings = []
        for group_index in exchange:
            recorder.clear()
            if group_index < len(groups):  # this rank may have one group fewer than others
                group = groups[group_index]
                with recorder.recording(expected_counts):
                    _run_group(replay, index, activations, group, outputs if with_outputs else None)
                if not with_outputs and expected_counts is None:
                    expected_counts = recorder.call_counts()  # the first forward pass ran to its end
            recordings.append(recorder.recorded())
        for recorded in all_gather_recordings(replay.ranks, recordings):
            hessians.add(linears, recorded)
            token_counts = list(itertools.islice(all_token_counts, activations.batches_per_forward))
            call = recorded.experts_call
            if call is not None:
                for accumulator in expert_hessians:
                    accumulator.add(module, call)
                if expert_calls is not None:
                    expert_calls.extend(call, token_counts)
    hessians.finish()
    for accumulator in expert_hessians:
        has_all_experts = experts is None or accumulator.expert_slice == slice(0, experts.count)
        accumulator.finish(SINGLE if has_all_experts else replay.ranks)
    return hessians, outputs


def _run_group(
    replay: Replay, index: int, activations: Activations, group: range, outputs: ActivationStore | None
) -> None:
    """Runs layer ``index`` on one forward group, and appends the output of each micro-batch to ``outputs``."""
    inputs = [activations.hidden[batch] for batch in group]
    output = replay.run(index, cat_rows(inputs), activations.call(replay, index, group))
    if outputs is not None:
        for batch_output in split_rows(output, inputs):
            outputs.append(batch_output)


def _exchange_ranges(replay: Replay, activations: Activations, num_inputs: int) -> Iterator[range]:
    """Yields ranges of forward groups of a rank whose recorded inputs are exchanged in one all-gather.

    Args:
        replay: the model and its ranks.
        activations: this rank's micro-batches.
        num_inputs: upper bound for the distinct input tensors of a forward group.
    """
    ranks, groups_per_exchange = replay.ranks, 1
    groups_per_rank = ceil_div(activations.total, activations.batches_per_forward * ranks.count)
    if ranks.count > 1:
        token_bytes = replay.model.config.get_text_config().hidden_size * replay.model.dtype.itemsize
        tokens = activations.all_ids[0].numel() * activations.batches_per_forward
        # linears mostly share their inputs, so that few layers have more than three
        group_bytes = tokens * token_bytes * min(num_inputs, 3) * ranks.count
        groups_per_exchange = max(1, MAX_EXCHANGE_BYTES // group_bytes)
    for start in range(0, groups_per_rank, groups_per_exchange):
        yield range(start, min(start + groups_per_exchange, groups_per_rank))
