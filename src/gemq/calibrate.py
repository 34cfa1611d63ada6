"""Calibration activations, one layer at a time: what a layer receives, and the second moments of its linears' inputs.

Used by every stage that walks the layers forward. Knows models and moments, no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemq.data.windows import Windows
from gemq.models.experts import ExpertsCall, apply_first, expert_weight, route, watch_experts
from gemq.models.stream import Call, Replay
from gemq.models.structure import Linear
from gemq.quant.hessian import Moments
from gemq.resources.batches import Batches
from gemq.resources.memory import Memory
from gemq.resources.ranks import Ranks


@dataclass
class Activations:
    """Calibration windows on their way through the layers, in micro-batches fixed by the recipe: a rank's own.

    ids:    per micro-batch [B, S] int64
    source: per micro-batch [B] int64, which calibration source each window came from
    calls:  per micro-batch, one call per layer
    hidden: per micro-batch [B, S, H], the input of the layer to run next
    order:  [N] int64, the windows' places in the set that they come from, in the order of all ranks' micro-batches
    every:  ids and calls of all ranks' micro-batches; empty: there are no others
    """

    ids: list[Tensor]
    source: list[Tensor]
    calls: list[list[Call]]
    hidden: Batches
    order: Tensor
    every: tuple[list[Tensor], list[list[Call]]] = ([], [])

    @classmethod
    def start(cls, replay: Replay, windows: Windows, batch_tokens: int, seed: int) -> Activations:
        """The hidden states in front of the first layer. A micro-batch mixes the sources, in an order set by seed."""
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        ids, source, calls, hidden = [], [], [], Batches(replay.memory)
        parts = list(windows.batches(batch_tokens))
        own = replay.ranks.own(len(parts))
        for number, part in enumerate(parts):
            tokens = windows.tokens[order[part]].to(replay.device)
            first, call = replay.inputs(tokens)
            ids.append(tokens)
            calls.append(call)
            if number in own:
                source.append(windows.source[order[part]].to(replay.device))
                hidden.append(first)
        mine = slice(own.start, own.stop)
        return cls(ids[mine], source, calls[mine], hidden, order, (ids, calls))

    @property
    def total(self) -> int:
        """Micro-batches of all ranks."""
        return len(self.every[0] or self.ids)

    def whole(self, replay: Replay) -> Activations:
        """All ranks' micro-batches, for those who train on them. Without ``source``."""
        if replay.ranks.count == 1:
            return self
        ids, calls = self.every
        return Activations(ids, [], calls, shared(replay, self.hidden, self.total), self.order, self.every)

    @torch.no_grad()
    def advance(self, replay: Replay, index: int, overrides: dict[str, Tensor] | None = None) -> None:
        """Runs layer ``index`` on everything, with ``overrides`` as in ``Replay.run``. Overwrites ``hidden``."""
        advance(replay, index, self.hidden, self.calls, overrides)


def shared(replay: Replay, own: Batches, total: int) -> Batches:
    """A tensor of each of ``total`` micro-batches, from every rank's own."""
    if replay.ranks.count == 1:
        return own
    return Batches(replay.memory, replay.ranks.share(own, total))


@torch.no_grad()
def advance(
    replay: Replay,
    index: int,
    hidden: Batches,
    calls: list[list[Call]],
    overrides: dict[str, Tensor] | None = None,
) -> None:
    """Runs layer ``index`` on every micro-batch's hidden states [B, S, H], which its outputs replace."""
    for i, call in enumerate(calls):
        hidden[i] = replay.run(index, hidden[i], call[index], overrides)


class KeptCalls(Sequence[ExpertsCall]):
    """Calls of an experts module, one per micro-batch, where memory has room for them. Outputs are left out."""

    def __init__(self, memory: Memory):
        self._hidden = Batches(memory)
        self._routing: list[tuple[Tensor, Tensor]] = []

    def extend(self, calls: Iterable[ExpertsCall]) -> None:
        for call in calls:
            self._hidden.append(call.hidden)
            self._routing.append((call.top_k_index, call.top_k_weights))

    def whole(self, replay: Replay, total: int) -> KeptCalls:
        """Those of all ranks' ``total`` micro-batches."""
        if replay.ranks.count == 1:
            return self
        found = KeptCalls(self._hidden.memory)
        found._hidden = shared(replay, self._hidden, total)
        parts = [list(replay.ranks.share([r[i] for r in self._routing], total)) for i in range(2)]
        found._routing = list(zip(*parts, strict=True))
        return found

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
    experts: of the two matrices of the routed experts, or None in a dense layer
    """

    linears: dict[str, Moments]
    experts: tuple[Moments, Moments] | None

    def meet(self, linears: Sequence[Linear], ranks: Ranks, shards: int) -> None:
        """Adds up all ranks' shards, ``shards`` of each. A rank may have met fewer linears than another."""
        if ranks.count > 1:
            seen = [self.linears.get(x.path) for x in linears]
            first = [-1 if m is None else next(i for i, o in enumerate(seen) if o is m) for m in seen]
            same = torch.tensor(first, dtype=torch.int64)
            ranks.most(same)
            for number, linear in zip(same.tolist(), linears, strict=True):
                if number >= 0 and linear.path not in self.linears:
                    made = self.linears.get(linears[number].path) or Moments(1, linear.columns, ranks.device)
                    self.linears[linear.path] = made
        for moments in self.distinct(linears):
            moments.close(shards - 1)
            moments.finish(ranks)

    def distinct(self, linears: Sequence[Linear]) -> list[Moments]:
        """Every one once, in an order that all ranks share."""
        found = [self.linears[x.path] for x in linears if x.path in self.linears]
        return list({id(m): m for m in (*found, *(self.experts or ()))}.values())


@torch.no_grad()
def layer_moments(
    replay: Replay,
    index: int,
    activations: Activations,
    linears: Sequence[Linear],
    with_experts: bool,
    kept: KeptCalls | list[ExpertsCall] | None = None,
    with_outputs: bool = True,
) -> tuple[LayerMoments, Batches]:
    """Runs layer ``index`` on everything and collects all ranks' moments. Returns them with the layer's outputs.

    kept:         receives the calls of the experts module, one per micro-batch, for those who train on them
    with_outputs: False keeps none of the outputs
    """
    layer = replay.structure.layers[index]
    experts = layer.experts if with_experts else None
    found = LayerMoments({}, None)
    outputs = Batches(replay.memory)
    with ExitStack() as stack:
        _watch_linears(stack, replay.model, linears, found.linears)
        module = replay.model.get_submodule(experts.path) if experts else None
        watched = stack.enter_context(watch_experts(module)) if module is not None else []
        if experts:
            first, down = experts.matrices
            found.experts = (
                Moments(experts.count, first.columns, replay.device),
                Moments(experts.count, down.columns, replay.device),
            )
        ends = replay.ranks.shard_ends(activations.total)
        for number, (hidden, calls) in enumerate(zip(activations.hidden, activations.calls, strict=True)):
            closed = sum(end <= number for end in ends)
            if closed:
                for moments in found.distinct(linears):
                    moments.close(closed)
            output = replay.run(index, hidden, calls[index])
            if with_outputs:
                outputs.append(output)
            for call in watched:
                assert experts is not None
                assert found.experts is not None
                routed = route(call.top_k_index, call.top_k_weights, experts.count)
                x = call.hidden.index_select(0, routed.token)
                found.experts[0].add(x, routed.counts)
                weight = expert_weight(module, experts.matrices[0].name)
                found.experts[1].add(apply_first(module, experts.matrices[0].name, weight, x, routed), routed.counts)
            if kept is not None:
                kept.extend(watched)
            watched.clear()
    found.meet(linears, replay.ranks, len(ends) + 1)
    return found, outputs


def _watch_linears(stack: ExitStack, model: nn.Module, linears: Iterable[Linear], moments: dict[str, Moments]) -> None:
    """Hooks that add up the moments of linears' inputs. Query, key and value receive one tensor: it is added once."""
    last: dict[str, Any] = {"tensor": None, "path": None}

    def watch(linear: Linear) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if x is last["tensor"]:
                moments[linear.path] = moments[last["path"]]
                return
            last.update(tensor=x, path=linear.path)
            if linear.path not in moments:
                moments[linear.path] = Moments(1, linear.columns, x.device)
            rows = x.reshape(-1, linear.columns)
            moments[linear.path].add(rows, [len(rows)])

        module = model.get_submodule(linear.path)
        stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    for linear in linears:
        watch(linear)
