"""Calibration activations, one layer at a time: what a layer receives, and the second moments of its linears' inputs.

Used by every stage that walks the layers forward. Knows models and moments, no files.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gemq.calibration.windows import Windows
from gemq.errors import UserError
from gemq.models.experts import ExpertsCall, apply_first, call_of, expert_weight, route_to
from gemq.models.replay import Call, Replay
from gemq.models.structure import Experts, Linear
from gemq.quant.hessian import Moments
from gemq.runtime.activation_store import Batches
from gemq.runtime.memory import Memory
from gemq.runtime.ranks import MAX_EXCHANGE_BYTES, SINGLE, Ranks


@dataclass
class Activations:
    """Calibration windows on their way through the layers, in micro-batches fixed by the recipe: a rank's own.

    ids:    per micro-batch [B, S] int64
    source: per micro-batch [B] int64, which calibration source each window came from
    calls:  per micro-batch, one call per layer
    hidden: per micro-batch [B, S, H], the input of the layer to run next
    order:  [N] int64, the windows' places in the set that they come from, in the order of all micro-batches
    every:  ids of all ranks' micro-batches; empty: there are no others
    together, at_once: how many neighbours go through a layer at once, and how many of any kind (see ``Ranks``)
    """

    ids: list[Tensor]
    source: list[Tensor]
    calls: list[list[Call]]
    hidden: Batches
    order: Tensor
    every: list[Tensor] = field(default_factory=list)
    together: int = 1
    at_once: int = 1
    _joined_calls: dict[tuple[int, ...], list[Call]] = field(default_factory=dict)
    _to_train: dict[bool, Activations] = field(default_factory=dict)

    @classmethod
    def start(cls, replay: Replay, windows: Windows, batch_tokens: int, seed: int) -> Activations:
        """The hidden states in front of the first layer. A micro-batch mixes the sources, in an order set by seed."""
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        source, calls, hidden = [], [], Batches(replay.memory)
        parts = list(windows.batches(batch_tokens))
        every = [windows.tokens[order[part]].to(replay.device) for part in parts]
        own = replay.ranks.local_batches(len(parts))
        for number in own:
            first, call = replay.inputs(every[number])
            calls.append(call)
            source.append(windows.source[order[parts[number]]].to(replay.device))
            hidden.append(first)
        # what travels beside hidden states does so as an attribute of a micro-batch's
        at_once = 1 if replay.passes_more else replay.ranks.max_batches_per_forward
        together = min(at_once, replay.ranks.batches_per_forward(len(parts)))
        return cls([every[number] for number in own], source, calls, hidden, order, every, together, at_once)

    @property
    def total(self) -> int:
        """Micro-batches of all ranks."""
        return len(self.every or self.ids)

    def can_shard_windows(self, ranks: Ranks) -> bool:
        """Whether ranks can train on their own windows of each micro-batch: on GPUs, if each has as many of them."""
        return ranks.shards_windows and not any(len(ids) % ranks.count for ids in self.every)

    def to_train(self, replay: Replay, sharded: bool = False) -> Activations:
        """All ranks' micro-batches, for those who train on them. Without ``source``.

        sharded: of each micro-batch, this rank's windows
        """
        ranks = replay.ranks
        if ranks.count == 1:
            return self
        if sharded not in self._to_train:
            ids = [every[ranks.local_slice(len(every))] if sharded else every for every in self.every]
            calls = [replay.inputs(some)[1] for some in ids]
            empty = Batches(replay.memory)
            self._to_train[sharded] = dataclasses.replace(
                self, ids=ids, source=[], calls=calls, hidden=empty, _joined_calls={}
            )
        return dataclasses.replace(self._to_train[sharded], hidden=self.share(replay, self.hidden, sharded))

    def share(self, replay: Replay, own: Batches, sharded: bool = False) -> Batches:
        """A tensor [B, ...] of each micro-batch, from every rank's own; ``sharded``: this rank's windows of it."""
        ranks = replay.ranks
        if ranks.count == 1:
            return own
        every = ranks.gather_micro_batches(own, self.total)
        return Batches(replay.memory, (t[ranks.local_slice(len(t))].clone() for t in every) if sharded else every)

    def give(self, replay: Replay) -> None:
        """Lets other ranks have what ``to_train`` gives them, where this one has no use for it."""
        for _ in replay.ranks.gather_micro_batches(self.hidden, self.total):
            pass

    def runs(self) -> list[range]:
        """Places of this rank's micro-batches, by those that go through a layer together."""
        count = len(self.ids)
        return [range(start, min(start + self.together, count)) for start in range(0, count, self.together)]

    def call(self, replay: Replay, index: int, places: Sequence[int]) -> Call:
        """What layer ``index`` is given beside the hidden states of these micro-batches, one behind the other."""
        if len(places) == 1:
            return self.calls[places[0]][index]
        key = tuple(places)
        if key not in self._joined_calls:
            self._joined_calls[key] = replay.inputs(torch.cat([self.ids[place] for place in key]))[1]
        return self._joined_calls[key][index]

    @torch.no_grad()
    def advance(self, replay: Replay, index: int, overrides: dict[str, Tensor] | None = None) -> None:
        """Runs layer ``index`` on everything, with ``overrides`` as in ``Replay.run``. Overwrites ``hidden``."""
        self.advance_all(replay, index, [self.hidden], overrides)

    @torch.no_grad()
    def advance_all(
        self, replay: Replay, index: int, states: Sequence[Batches], overrides: dict[str, Tensor] | None = None
    ) -> None:
        """The same for other models' hidden states of these windows, [B, S, H] a micro-batch, which are overwritten."""
        for run in self.runs():
            places = [(state, place) for state in states for place in run]
            for start in range(0, len(places), self.at_once):
                some = places[start : start + self.at_once]
                hidden = [state[place] for state, place in some]
                call = self.call(replay, index, [place for _, place in some])
                output = replay.run(index, joined(hidden), call, overrides)
                for (state, place), part in zip(some, apart(output, hidden), strict=True):
                    state[place] = part


class KeptCalls(Sequence[ExpertsCall]):
    """Calls of an experts module, one per micro-batch, where memory has room for them. Outputs are left out."""

    def __init__(self, memory: Memory):
        self._hidden = Batches(memory)
        self._routing: list[tuple[Tensor, Tensor]] = []

    def extend(self, call: ExpertsCall, tokens: Sequence[int]) -> None:
        """Keeps a call of micro-batches with so many ``tokens``: one of each.

        Experts that are given a row of every token for each of them have those rows one behind the other.
        """
        rows = (call.hidden, call.top_k_index, call.top_k_weights)
        if len(tokens) == 1:
            tokens = [len(call.hidden)]
        of_tokens = (t.unflatten(0, (-1, sum(tokens))).split(list(tokens), 1) for t in rows)
        for each in zip(*of_tokens, strict=True):
            hidden, index, weights = (part.flatten(0, 1) for part in each)
            self._hidden.append(hidden)
            self._routing.append((index, weights))

    def __len__(self) -> int:
        return len(self._routing)

    def __getitem__(self, index: Any) -> Any:
        """The call of a micro-batch (no slices)."""
        hidden = self._hidden[index]
        top_k_index, top_k_weights = self._routing[index]
        return ExpertsCall(hidden, top_k_index, top_k_weights, hidden.new_empty(0))


@dataclass
class LayerMoments:
    """Second moments of one layer.

    linears: by module path; linears that receive the same tensor share one object
    experts: of the two matrices of this rank's experts, or None where none were asked for
    """

    linears: dict[str, Moments]
    experts: tuple[Moments, Moments] | None

    def add_linears(self, linears: Sequence[Linear], taken: _Taken) -> None:
        """Adds what a run gave to these linears."""
        for linear, first, rows in zip(linears, taken.same, taken.inputs, strict=True):
            if rows is not None:
                if linear.path not in self.linears:
                    self.linears[linear.path] = Moments(1, linear.columns, rows.device)
                self.linears[linear.path].add(rows, torch.full((1,), len(rows), device=rows.device))
            elif first >= 0:
                self.linears[linear.path] = self.linears[linears[first].path]

    def add_experts(self, module: Any, experts: Experts, own: slice, call: ExpertsCall) -> None:
        """Adds what a run gave to some experts of a module."""
        assert self.experts is not None
        name = experts.matrices[0].name
        weight = expert_weight(module, name)[own]
        routed = route_to(call, own, weight)
        x = call.hidden.index_select(0, routed.token)
        self.experts[0].add(x, routed.ends)
        self.experts[1].add(apply_first(module, name, weight, x, routed), routed.ends)

    def finish(self, ranks: Ranks) -> None:
        """Ends the adding. ``ranks``: those that the experts are spread over."""
        for moments in {id(m): m for m in self.linears.values()}.values():
            moments.finish()
        for moments in self.experts or ():
            moments.finish(ranks)


@torch.no_grad()
def layer_moments(
    replay: Replay,
    index: int,
    activations: Activations,
    linears: Sequence[Linear],
    own: slice | None,
    kept: KeptCalls | None = None,
    with_outputs: bool = True,
) -> tuple[LayerMoments, Batches]:
    """Runs layer ``index`` on this rank's micro-batches; returns the moments of all ranks', and the layer's outputs.

    In step, ranks give each other what their linears and experts receive, and each adds it up in the order of the
    micro-batches: the same sums, in which experts are this rank's own and linears all, as one rank would have.

    own:          the experts whose moments are wanted, with a start and a stop; None: of none
    kept:         receives the calls of the experts module, one per micro-batch, for those who train on them
    with_outputs: False keeps no outputs, and runs a layer no further than to what is watched
    """
    ranks, experts = replay.ranks, replay.structure.layers[index].experts if own is not None else None
    module = replay.model.get_submodule(experts.path) if experts else None
    found, outputs = LayerMoments({}, None), Batches(replay.memory)
    if experts and own is not None:
        first, down = (Moments(own.stop - own.start, m.columns, replay.device) for m in experts.matrices)
        found.experts = first, down
    if not linears and module is None and not with_outputs:
        return found, outputs
    received, runs = _Received(replay.model, linears, module), activations.runs()
    tokens = iter([ids.numel() for ids in activations.every or activations.ids])
    for rounds in _blocks(replay, activations, len(linears) + 1):
        block = []
        for number in rounds:
            received.clear()
            if number < len(runs):  # a rank may have one fewer
                hidden = [activations.hidden[place] for place in runs[number]]
                with received.watching(to_the_end=with_outputs):
                    output = replay.run(index, joined(hidden), activations.call(replay, index, runs[number]))
                    if with_outputs:
                        for part in apart(output, hidden):
                            outputs.append(part)
            block.append(received.taken())
        for taken in _of_all(ranks, block):
            found.add_linears(linears, taken)
            each = list(itertools.islice(tokens, activations.together))  # of the micro-batches of this run
            if taken.call is not None and experts and own is not None:
                found.add_experts(module, experts, own, taken.call)
                if kept is not None:
                    kept.extend(taken.call, each)
    spread = experts is not None and own is not None and own.stop - own.start < experts.count
    found.finish(ranks if spread else SINGLE)
    return found, outputs


class _Received:
    """What linears and an experts module receive while a layer runs, each as often as it is called."""

    def __init__(self, model: nn.Module, linears: Sequence[Linear], module: nn.Module | None):
        self._linears = [model.get_submodule(linear.path) for linear in linears]
        self._experts = module
        self._calls_of_a_run: list[int] = []
        self.clear()

    def clear(self) -> None:
        self._inputs: list[list[Tensor]] = [[] for _ in self._linears]
        self._versions: list[tuple[Tensor, int]] = []
        self._calls: list[ExpertsCall] = []

    def _count(self) -> list[int]:
        return [*map(len, self._inputs), *([len(self._calls)] if self._experts is not None else [])]

    @contextmanager
    def watching(self, to_the_end: bool) -> Iterator[None]:
        """Collects while the context is open. Unless a run shall go ``to_the_end``, it ends where the first one, which
        does, had received everything.
        """

        def stop() -> None:
            if not to_the_end and 0 not in self._calls_of_a_run and self._count() == self._calls_of_a_run:
                raise _Enough

        def of_experts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls.append(call_of(module, args, kwargs))
            stop()

        def of_linear(number: int) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                self._inputs[number].append(x)
                self._versions.append((x, x._version))
                stop()

            return hook

        with ExitStack() as stack:
            for number, linear in enumerate(self._linears):
                handle = linear.register_forward_pre_hook(of_linear(number), with_kwargs=True)
                stack.callback(handle.remove)
            if self._experts is not None:
                handle = self._experts.register_forward_pre_hook(of_experts, with_kwargs=True)
                stack.callback(handle.remove)
            with suppress(_Enough):
                yield
        self._calls_of_a_run = self._calls_of_a_run or self._count()

    def taken(self) -> _Taken:
        """What was received since ``clear``."""
        if any(x._version != version for x, version in self._versions):
            raise UserError(
                "a layer overwrites what one of its linears has received: gemq cannot calibrate it; this family is not "
                "supported yet"
            )
        received = [[id(x) for x in each] for each in self._inputs]
        same = [received.index(each) if each else -1 for each in received]
        inputs = [
            joined([x.flatten(0, -2) for x in each]) if first == number else None
            for number, (first, each) in enumerate(zip(same, self._inputs, strict=True))
        ]
        parts = zip(*((c.hidden, c.top_k_index, c.top_k_weights, c.output) for c in self._calls), strict=True)
        return _Taken(same, inputs, ExpertsCall(*map(joined, parts)) if self._calls else None)


class _Taken(NamedTuple):
    """What a layer's linears and experts received in a run.

    same:   for each linear the number of the first that received the very tensors; -1: it did not run
    inputs: for that first one their rows [T, columns], None for the others
    call:   of the experts module, several calls as one, without output; None: it did not run
    """

    same: list[int]
    inputs: list[Tensor | None]
    call: ExpertsCall | None


def _blocks(replay: Replay, activations: Activations, kinds: int) -> Iterator[range]:
    """Rounds of runs, one of each rank, by which ranks meet; ``kinds`` of inputs of a layer travel."""
    ranks, together = replay.ranks, 1
    rounds = -(-activations.total // (activations.together * ranks.count))
    if ranks.count > 1:
        hidden = replay.model.config.get_text_config().hidden_size * replay.model.dtype.itemsize
        tokens = activations.every[0].numel() * activations.together
        together = max(1, MAX_EXCHANGE_BYTES // (tokens * hidden * min(kinds, 3) * ranks.count))
    return (range(start, min(start + together, rounds)) for start in range(0, rounds, together))


def _of_all(ranks: Ranks, block: Sequence[_Taken]) -> Iterator[_Taken]:
    """What all ranks' layers received in some rounds, in the order of the runs, on every rank."""
    if ranks.count == 1:
        yield from block
        return
    count = len(block[0].inputs)
    tensors: list[Tensor | None] = []
    for taken in block:
        c = taken.call
        tensors += [*taken.inputs, *([None] * 3 if c is None else [c.hidden, c.top_k_index, c.top_k_weights])]
    found = ranks.all_gather_tensors(tensors, [number for taken in block for number in taken.same])
    for i in range(len(block)):
        for given, same in found:
            own = given[i * (count + 3) : (i + 1) * (count + 3)]
            hidden, index, weights = own[count:]
            call = None
            if hidden is not None and index is not None and weights is not None:
                call = ExpertsCall(hidden, index, weights, hidden.new_empty(0))
            yield _Taken(same[i * count : (i + 1) * count], own[:count], call)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows one behind the other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def apart(rows: Tensor, parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """The rows that stand in place of each of ``parts``, which ``joined`` had put together."""
    return [rows] if len(parts) == 1 else rows.split([len(x) for x in parts])


class _Enough(Exception):
    """All that was watched has been received."""
