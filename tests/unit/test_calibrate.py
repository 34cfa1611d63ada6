"""What is gathered in one pass over a layer, against hooks on the whole model and sums in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import FIVE, MORE, OWN, tiny, tokens
from gemq.calibration.activations import Activations, KeptCalls, layer_moments
from gemq.calibration.windows import Windows
from gemq.errors import UserError
from gemq.models.replay import Replay
from gemq.models.structure import Layer, find_structure
from gemq.runtime.ranks import Ranks

torch.set_num_threads(1)
IDS = tokens(7, 10)
WINDOWS = Windows(IDS, torch.tensor([0, 0, 0, 1, 1, 2, 2]), ("a", "b", "c"), (30, 20, 20))


def start(family: str, batch_tokens: int = 30, seed: int = 0) -> tuple[Replay, Activations]:
    model = tiny(family)
    replay = Replay(model, find_structure(model))
    return replay, Activations.start(replay, WINDOWS, batch_tokens, seed)


@pytest.mark.sample
def test_windows_keep_their_sources():
    """Batches mix sources in an order that the seed fixes; every window is there once, with its own source."""
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
    other = Activations.start(replay, WINDOWS, 30, 1)
    assert not all(torch.equal(a, b) for a, b in zip(activations.ids, other.ids, strict=True))
    assert all(torch.equal(h, replay.inputs(i)[0]) for h, i in zip(activations.hidden, activations.ids, strict=True))


def test_the_order_of_windows_leaves_the_global_generator_alone():
    replay, _ = start("olmoe")
    before = torch.get_rng_state()
    Activations.start(replay, WINDOWS, 30, 3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.sample
@pytest.mark.parametrize("family", [*MORE, OWN])
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
        moments, outputs = layer_moments(replay, i, activations, layer.linears, every(layer))
        assert set(moments.linears) == {x.path for x in layer.linears}
        for linear in layer.linears:
            x = seen[linear.path].reshape(-1, linear.columns).double()
            found = moments.linears[linear.path]
            assert found.counts.tolist() == [70]
            close(found.sums[0], x.T @ x)
        if layer.experts:
            assert moments.experts is not None
            hidden, index, weights = calls[layer.experts.path]
            if index.is_floating_point():
                index = weights
            first, down = moments.experts
            assert (
                first.counts.tolist()
                == down.counts.tolist()
                == torch.bincount(index.flatten(), minlength=layer.experts.count).tolist()
            )
            module = model.get_submodule(layer.experts.path)
            for e in range(layer.experts.count):
                x = hidden[(index == e).any(-1)]
                close(first.sums[e], x.double().T @ x.double())
                h = inner(module, e, x).double()
                close(down.sums[e], h.T @ h)
        else:
            assert moments.experts is None
        before = [x.clone() for x in activations.hidden]
        activations.advance(replay, i)
        assert all(torch.equal(a, b) for a, b in zip(activations.hidden, outputs, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(activations.hidden, before, strict=True))


def inner(module: Any, e: int, x: Tensor) -> Tensor:
    """What ``down_proj`` of expert e receives, written out."""
    weight = module.gate_up_proj[e] if module.has_gate else module.up_proj[e]
    y = x @ (weight if module.is_transposed else weight.T)
    if module.has_bias:
        y = y + module.gate_up_proj_bias[e]
    return module._apply_gate(y) if module.has_gate else module.act_fn(y)


def close(found: Tensor, expected: Tensor) -> None:
    """Sums of 70 float32 products, over inputs that float32 layers made in another batch: 1e-4 of the largest."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4 * expected.abs().max().item() + 1e-9)


def every(layer: Layer) -> slice | None:
    """All experts of a layer."""
    return slice(0, layer.experts.count) if layer.experts else None


@pytest.mark.parametrize("family", FIVE)
def test_what_is_watched_is_the_same_if_a_layer_runs_no_further(family):
    """And outputs are left out. The first micro-batch shows how often things are called."""
    replay, activations = start(family, 10)
    index, layer = replay.structure.moe_layers[0]
    for i in range(index):
        activations.advance(replay, i)
    attention = [x for x in layer.linears if x.kind == "attention"]
    for linears, own in ((attention, None), (layer.linears, every(layer)), ([], slice(1, 3))):
        whole, _ = layer_moments(replay, index, activations, linears, own)
        found, outputs = layer_moments(replay, index, activations, linears, own, with_outputs=False)
        assert not len(outputs)
        pairs = [(whole.linears[x.path], found.linears[x.path]) for x in linears]
        pairs += zip(whole.experts or (), found.experts or (), strict=True)
        for a, b in pairs:
            assert torch.equal(a.sums, b.sums)
            assert torch.equal(a.counts, b.counts)


@pytest.mark.sample
@pytest.mark.parametrize("family", [*MORE, OWN])
def test_micro_batches_that_go_through_a_layer_at_once(family, monkeypatch):
    """As on a GPU: the same moments, outputs and kept calls as one after the other, but for rounding."""
    found = []
    for at_once in (1, 3):
        monkeypatch.setattr(Ranks, "max_batches_per_forward", property(lambda _, at_once=at_once: at_once))
        monkeypatch.setattr("gemq.runtime.ranks.MIN_FORWARDS", 1)
        replay, activations = start(family, 10)
        assert len(activations.forward_groups()) == (7 if at_once == 1 or replay.passes_more else 3)
        index, layer = replay.structure.moe_layers[0]
        states = [activations.hidden.copy() for _ in range(2)]
        for i in range(index):
            activations.advance(replay, i)
            activations.advance_all(replay, i, states)
        kept = KeptCalls(replay.memory)
        moments, outputs = layer_moments(replay, index, activations, layer.linears, every(layer), kept)
        activations.advance_all(replay, index, states)
        assert moments.experts is not None
        sums = [m.sums for m in (*moments.linears.values(), *moments.experts)]
        calls = [t for call in kept for t in (call.hidden, call.top_k_weights)]
        found.append([*sums, *outputs, *states[0], *states[1], *calls])
        assert len(outputs) == len(kept) == 7
    for one, joined in zip(*found, strict=True):
        close(joined.detach(), one.detach().double())


def test_moments_of_some_experts_are_theirs_among_all():
    replay, activations = start("olmoe", 10)
    whole, _ = layer_moments(replay, 0, activations, [], slice(0, 4))
    part, _ = layer_moments(replay, 0, activations, [], slice(1, 3))
    assert whole.experts is not None
    assert part.experts is not None
    for a, b in zip(whole.experts, part.experts, strict=True):
        assert torch.equal(a.sums[1:3], b.sums)
        assert torch.equal(a.counts[1:3], b.counts)


def test_query_key_and_value_share_one_moment():
    replay, activations = start("olmoe")
    moments, _ = layer_moments(replay, 0, activations, replay.structure.layers[0].linears, None)
    q, k, v, o = (moments.linears[f"model.layers.0.self_attn.{x}_proj"] for x in "qkvo")
    assert q is k
    assert k is v
    assert o is not q
    assert q.counts.tolist() == [70]  # added once, not three times
    assert moments.experts is None


def test_two_branches_of_one_linear_are_both_counted():
    """A linear that is called twice in a layer, with the same tensor in between going to another."""
    replay, activations = start("olmoe")

    class Twice(nn.Module):
        def __init__(self, inside: nn.Module):
            super().__init__()
            self.inside = inside

        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.inside(self.inside(hidden, *args, **kwargs), *args, **kwargs)

    linears = replay.structure.layers[0].linears
    replay.layers[0] = Twice(replay.layers[0])
    moments, _ = layer_moments(replay, 0, activations, linears, every(replay.structure.layers[0]))
    assert all(moments.linears[x.path].counts.tolist() == [140] for x in linears)
    assert moments.experts is not None
    assert int(moments.experts[0].counts.sum()) == 280


def test_a_layer_that_overwrites_what_a_linear_received_is_refused():
    """Inputs are added up when the layer has run: they must still be what they were."""
    replay, activations = start("olmoe")
    linears = replay.structure.layers[0].linears

    def spoil(_: nn.Module, args: tuple[Any, ...], __: Tensor) -> None:
        args[0].add_(1)

    handle = replay.model.get_submodule(linears[0].path).register_forward_hook(spoil)
    with pytest.raises(UserError, match="overwrites what one of its linears has received"):
        layer_moments(replay, 0, activations, linears, None)
    handle.remove()


def test_only_what_is_asked_for():
    replay, activations = start("qwen2_moe")
    shared = [x for x in replay.structure.layers[0].linears if x.kind == "shared"]
    moments, _ = layer_moments(replay, 0, activations, shared, None)
    assert set(moments.linears) == {x.path for x in shared}
    kept = KeptCalls(replay.memory)
    moments, _ = layer_moments(replay, 0, activations, [], every(replay.structure.layers[0]), kept)
    assert moments.linears == {}
    assert len(kept) == len(activations.ids)


@pytest.mark.parametrize("family", FIVE)
def test_micro_batches_change_sums_only_in_rounding(family):
    """The routing and the counts do not change at all."""
    found = []
    for batch_tokens in (10, 70):
        replay, activations = start(family, batch_tokens)
        index = replay.structure.moe_layers[0][0]
        for i in range(index):
            activations.advance(replay, i)
        moments, _ = layer_moments(replay, index, activations, [], every(replay.structure.layers[index]))
        assert moments.experts is not None
        found.append(moments.experts)
    for one, whole in zip(*found, strict=True):
        assert torch.equal(one.counts, whole.counts)
        close(one.sums, whole.sums.double())


def test_hooks_are_gone_afterwards():
    replay, activations = start("mixtral")
    layer = replay.structure.layers[0]
    layer_moments(replay, 0, activations, layer.linears, every(layer))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in replay.model.modules())
