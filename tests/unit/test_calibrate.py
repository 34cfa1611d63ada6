"""What one pass over a layer records, compared with hooks on the whole model and sums in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemq.calibration.activations import Activations, layer_hessians
from gemq.calibration.expert_hessians import InputHessians
from gemq.calibration.input_recorder import RecordedExpertCalls
from gemq.calibration.windows import Windows
from gemq.errors import UserError
from gemq.models.replay import Replay
from gemq.models.structure import find_structure
from gemq.runtime.ranks import Ranks
from support.families import FAMILIES, MAIN_FAMILIES, TOY, tiny, tokens

torch.set_num_threads(1)
IDS = tokens(7, 10)
WINDOWS = Windows(IDS, torch.tensor([0, 0, 0, 1, 1, 2, 2]), ("a", "b", "c"), (30, 20, 20))


def start(family: str, micro_batch_tokens: int = 30, seed: int = 0) -> tuple[Replay, Activations]:
    model = tiny(family)
    replay = Replay(model, find_structure(model))
    return replay, Activations.start(replay, WINDOWS, micro_batch_tokens, seed)


@pytest.mark.sample
def test_windows_keep_their_sources():
    """Batches mix sources in an order set by the seed. Every window occurs once, with its own source."""
    replay, activations = start("olmoe")
    assert [len(x) for x in activations.ids] == [3, 3, 1]
    pairs = [
        (tuple(row.tolist()), int(s))
        for ids, source in zip(activations.ids, activations.source, strict=True)
        for row, s in zip(ids, source, strict=True)
    ]
    assert sorted(pairs) == sorted((tuple(r.tolist()), int(s)) for r, s in zip(IDS, WINDOWS.source, strict=True))
    again = Activations.start(replay, WINDOWS, 30, 0)
    assert all(torch.equal(a, b) for a, b in zip(activations.ids, again.ids, strict=True))
    other_seed = Activations.start(replay, WINDOWS, 30, 1)
    assert not all(torch.equal(a, b) for a, b in zip(activations.ids, other_seed.ids, strict=True))
    assert all(torch.equal(h, replay.inputs(i)[0]) for h, i in zip(activations.hidden, activations.ids, strict=True))


def test_the_order_of_windows_leaves_the_global_generator_alone():
    replay, _ = start("olmoe")
    state_before = torch.get_rng_state()
    Activations.start(replay, WINDOWS, 30, 3)
    assert torch.equal(state_before, torch.get_rng_state())


@pytest.mark.sample
@pytest.mark.parametrize("family", [*FAMILIES, TOY])
def test_moments_are_those_of_the_whole_model(family):
    """Every linear's and every expert's input over all windows, gathered by hooks on one forward of the model."""
    replay, activations = start(family)
    model, structure = replay.model, replay.structure
    seen: dict[str, Tensor] = {}
    calls: dict[str, tuple[Any, ...]] = {}
    handles = []
    for layer in structure.layers:
        for linear in layer.linears:
            hook = lambda _, args, path=linear.path: seen.__setitem__(path, args[0])
            handles.append(model.get_submodule(linear.path).register_forward_pre_hook(hook))
        if layer.experts:
            hook = lambda _, args, path=layer.experts.path: calls.__setitem__(path, args)
            handles.append(model.get_submodule(layer.experts.path).register_forward_pre_hook(hook))
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()

    for i, layer in enumerate(structure.layers):
        expert_hessians = input_hessians(replay, i)
        moments, outputs = layer_hessians(replay, i, activations, layer.linears, expert_hessians)
        assert set(moments.by_path) == {x.path for x in layer.linears}
        for linear in layer.linears:
            x = seen[linear.path].reshape(-1, linear.columns).double()
            moment = moments.by_path[linear.path]
            assert moment.counts.tolist() == [70]
            close(moment.sums[0], x.T @ x)
        if layer.experts:
            hidden, index, weights = calls[layer.experts.path]
            if index.is_floating_point():
                index = weights
            gate_up_moments, down_moments = expert_hessians[0].by_matrix()
            assert (
                gate_up_moments.counts.tolist()
                == down_moments.counts.tolist()
                == torch.bincount(index.flatten(), minlength=layer.experts.count).tolist()
            )
            module = model.get_submodule(layer.experts.path)
            for e in range(layer.experts.count):
                x = hidden[(index == e).any(-1)]
                close(gate_up_moments.sums[e], x.double().T @ x.double())
                h = inner(module, e, x).double()
                close(down_moments.sums[e], h.T @ h)
        inputs = [x.clone() for x in activations.hidden]
        activations.advance(replay, i)
        assert all(torch.equal(a, b) for a, b in zip(activations.hidden, outputs, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(activations.hidden, inputs, strict=True))


def inner(module: Any, e: int, x: Tensor) -> Tensor:
    """The input of ``down_proj`` of expert e, computed directly."""
    weight = module.gate_up_proj[e] if module.has_gate else module.up_proj[e]
    y = x @ (weight if module.is_transposed else weight.T)
    if module.has_bias:
        y = y + module.gate_up_proj_bias[e]
    return module._apply_gate(y) if module.has_gate else module.act_fn(y)


def close(actual: Tensor, expected: Tensor) -> None:
    """Sums of 70 float32 products, over inputs that float32 layers made in another batch: 1e-4 of the largest."""
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4 * expected.abs().max().item() + 1e-9)


def input_hessians(replay: Replay, index: int, expert_slice: slice | None = None) -> list[InputHessians]:
    """Of all experts of a layer, if it has any, or of some."""
    experts = replay.structure.layers[index].experts
    if experts is None:
        return []
    return [InputHessians(experts, expert_slice or slice(0, experts.count), replay.device)]


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_recorded_inputs_are_the_same_if_a_layer_stops_after_them(family):
    """No outputs are returned. The first micro-batch runs to the end and shows how often each module is called."""
    replay, activations = start(family, 10)
    index, layer = replay.structure.moe_layers[0]
    for i in range(index):
        activations.advance(replay, i)
    attention = [x for x in layer.linears if x.kind == "attention"]
    for linears, expert_slice in ((attention, None), (layer.linears, slice(0, 4)), ([], slice(1, 3))):
        experts, full_experts = (
            [] if expert_slice is None else input_hessians(replay, index, expert_slice) for _ in range(2)
        )
        full_moments, _ = layer_hessians(replay, index, activations, linears, full_experts)
        moments, outputs = layer_hessians(replay, index, activations, linears, experts, with_outputs=False)
        assert not len(outputs)
        pairs = [(full_moments.by_path[x.path], moments.by_path[x.path]) for x in linears]
        for full, single in zip(full_experts, experts, strict=True):
            pairs += zip(full.by_matrix(), single.by_matrix(), strict=True)
        for a, b in pairs:
            assert torch.equal(a.sums, b.sums)
            assert torch.equal(a.counts, b.counts)


@pytest.mark.sample
@pytest.mark.parametrize("family", [*FAMILIES, TOY])
def test_micro_batches_in_one_forward(family, monkeypatch):
    """As on a GPU: the moments, outputs and recorded calls are those of single micro-batches, but for rounding."""
    results = []
    for batches_per_forward in (1, 3):
        monkeypatch.setattr(
            Ranks,
            "max_batches_per_forward",
            property(lambda _, batches_per_forward=batches_per_forward: batches_per_forward),
        )
        monkeypatch.setattr("gemq.runtime.ranks.MIN_FORWARDS", 1)
        replay, activations = start(family, 10)
        assert len(activations.forward_groups()) == (7 if batches_per_forward == 1 or replay.has_extra_outputs else 3)
        index, layer = replay.structure.moe_layers[0]
        states = [activations.hidden.copy() for _ in range(2)]
        for i in range(index):
            activations.advance(replay, i)
            activations.advance_all(replay, i, states)
        recorded_calls = RecordedExpertCalls(replay.memory)
        experts = input_hessians(replay, index)
        moments, outputs = layer_hessians(replay, index, activations, layer.linears, experts, recorded_calls)
        activations.advance_all(replay, index, states)
        sums = [m.sums for m in (*moments.by_path.values(), *experts[0].by_matrix())]
        calls = [t for call in recorded_calls for t in (call.hidden, call.top_k_weights)]
        results.append([*sums, *outputs, *states[0], *states[1], *calls])
        assert len(outputs) == len(recorded_calls) == 7
    for single, grouped in zip(*results, strict=True):
        close(grouped.detach(), single.detach().double())


def test_moments_of_some_experts_equal_theirs_among_all():
    replay, activations = start("olmoe", 10)
    four_experts, two_experts = (
        input_hessians(replay, 0, expert_slice)[0] for expert_slice in (slice(0, 4), slice(1, 3))
    )
    layer_hessians(replay, 0, activations, [], [four_experts, two_experts])
    for a, b in zip(four_experts.by_matrix(), two_experts.by_matrix(), strict=True):
        assert torch.equal(a.sums[1:3], b.sums)
        assert torch.equal(a.counts[1:3], b.counts)


def test_query_key_and_value_share_one_moment():
    replay, activations = start("olmoe")
    moments, _ = layer_hessians(replay, 0, activations, replay.structure.layers[0].linears, [])
    q, k, v, o = (moments.by_path[f"model.layers.0.self_attn.{x}_proj"] for x in "qkvo")
    assert q is k
    assert k is v
    assert o is not q
    assert q.counts.tolist() == [70]  # added once, not three times


def test_two_branches_of_one_linear_are_both_counted():
    """A layer that calls each of its linears twice."""
    replay, activations = start("olmoe")

    class Twice(nn.Module):
        def __init__(self, inside: nn.Module):
            super().__init__()
            self.inside = inside

        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.inside(self.inside(hidden, *args, **kwargs), *args, **kwargs)

    linears = replay.structure.layers[0].linears
    replay.layers[0] = Twice(replay.layers[0])
    experts = input_hessians(replay, 0)
    moments, _ = layer_hessians(replay, 0, activations, linears, experts)
    assert all(moments.by_path[x.path].counts.tolist() == [140] for x in linears)
    assert int(experts[0].first.counts.sum()) == 280


def test_a_layer_that_overwrites_what_a_linear_received_is_refused():
    """Inputs are used after the layer has run, so they must not have changed."""
    replay, activations = start("olmoe")
    linears = replay.structure.layers[0].linears

    def spoil(_: nn.Module, args: tuple[Any, ...], __: Tensor) -> None:
        args[0].add_(1)

    handle = replay.model.get_submodule(linears[0].path).register_forward_hook(spoil)
    with pytest.raises(UserError, match="overwrites what one of its linears has received"):
        layer_hessians(replay, 0, activations, linears, [])
    handle.remove()


def test_only_requested_inputs_are_recorded():
    replay, activations = start("qwen2_moe")
    shared = [x for x in replay.structure.layers[0].linears if x.kind == "shared"]
    moments, _ = layer_hessians(replay, 0, activations, shared, [])
    assert set(moments.by_path) == {x.path for x in shared}
    recorded_calls = RecordedExpertCalls(replay.memory)
    moments, _ = layer_hessians(replay, 0, activations, [], input_hessians(replay, 0), recorded_calls)
    assert moments.by_path == {}
    assert len(recorded_calls) == len(activations.ids)


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_micro_batches_change_sums_only_in_rounding(family):
    """Routing and counts are equal."""
    results = []
    for micro_batch_tokens in (10, 70):
        replay, activations = start(family, micro_batch_tokens)
        index = replay.structure.moe_layers[0][0]
        for i in range(index):
            activations.advance(replay, i)
        experts = input_hessians(replay, index)
        layer_hessians(replay, index, activations, [], experts)
        results.append(experts[0].by_matrix())
    for small_batches, single_batch in zip(*results, strict=True):
        assert torch.equal(small_batches.counts, single_batch.counts)
        close(small_batches.sums, single_batch.sums.double())


def test_hooks_are_gone_afterwards():
    replay, activations = start("mixtral")
    layer = replay.structure.layers[0]
    layer_hessians(replay, 0, activations, layer.linears, input_hessians(replay, 0))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in replay.model.modules())
