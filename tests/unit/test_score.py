"""Scores against their definition: loops over tokens in float64, and autograd through the whole model."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gemq.allocation.scores import LayerScores, loss_gradients, pair_costs, reverse_layer, smooth_usage
from gemq.calibration.activations import Activations
from gemq.calibration.windows import Windows
from gemq.models.experts import expert_weight, record_experts_calls, route, route_without_sync
from gemq.models.replay import Replay
from gemq.models.structure import Experts, find_structure
from gemq.runtime.device import FixedOrder
from gemq.runtime.ranks import SINGLE
from support.families import FAMILIES, MAIN_FAMILIES, TOY, tiny, tokens

torch.set_num_threads(1)
IDS = tokens(6, 10)
WINDOWS = Windows(IDS, torch.tensor([0, 0, 1, 1, 1, 2]), ("a", "b", "c"), (20, 30, 10))
WIDTHS = (1, 2)


def start(family: str, micro_batch_tokens: int = 20) -> tuple[Replay, Activations, list[list[Tensor]]]:
    """A replay, activations at the last layer's output and the inputs of every layer."""
    model = tiny(family)
    replay = Replay(model, find_structure(model))
    activations = Activations.start(replay, WINDOWS, micro_batch_tokens, 0)
    inputs = []
    for i in range(len(replay.structure.layers)):
        inputs.append(activations.hidden.copy())
        activations.advance(replay, i)
    return replay, activations, inputs


def candidates_of(module: Any, experts: Experts, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Weights with noise, larger at the first width than at the second."""
    generator = torch.Generator().manual_seed(seed)
    candidates = []
    for size in (0.1, 0.02):
        pair = [expert_weight(module, m.name) for m in experts.matrices]
        candidates.append(tuple(w + size * torch.randn(w.shape, generator=generator) for w in pair))
    return candidates


class Totals(NamedTuple):
    """``LayerScores.total``."""

    costs: Tensor
    tokens: Tensor


def scores_of(family: str, form: str, micro_batch_tokens: int = 20, units_per_expert: int = 1) -> dict[int, Totals]:
    replay, activations, inputs = start(family, micro_batch_tokens)
    gradients = loss_gradients(replay, activations, "data", 0)
    scores_by_layer: dict[int, LayerScores] = {}
    for i in reversed(range(len(replay.structure.layers))):
        activations.hidden = inputs.pop()
        experts = replay.structure.layers[i].experts
        for batch, call, gradient in reverse_layer(replay, i, activations, gradients):
            assert (call is None) == (experts is None)
            if call is None or gradient is None or experts is None:
                continue
            module = replay.model.get_submodule(experts.path)
            scores = scores_by_layer.setdefault(i, LayerScores(3, experts.count, replay.device))
            routed, costs = pair_costs(
                module, experts, call, gradient, candidates_of(module, experts, i), form, units_per_expert
            )
            scores.add(routed, costs, activations.source[batch].repeat_interleave(10))
    return {i: Totals(*scores.total(SINGLE, activations.total)) for i, scores in scores_by_layer.items()}


def whole_model_gradients(model: Any, structure: Any, loss_of) -> dict[int, tuple[Any, Tensor]]:
    """Calls of the experts and the gradients at their outputs [T, H], by plain autograd over all windows."""
    modules = {i: model.get_submodule(x.experts.path) for i, x in structure.moe_layers}
    watches = {i: record_experts_calls(m) for i, m in modules.items()}
    calls = {i: w.__enter__() for i, w in watches.items()}
    embedded = model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
    logits = model(IDS, use_cache=False).logits
    embedded.remove()
    for w in watches.values():
        w.__exit__(None, None, None)
    gradients = torch.autograd.grad(loss_of(logits), [c[0].output for c in calls.values()])
    return {i: (calls[i][0], g.reshape(60, -1)) for i, g in zip(calls, gradients, strict=True)}


def next_token_loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum")


@pytest.mark.sample
@pytest.mark.parametrize("family", [*FAMILIES, TOY])
def test_reverse_pass_equals_whole_model_autograd(family):
    """At the output of every layer's experts. One batch, in order, so that rows correspond."""
    model = tiny(family)
    structure = find_structure(model)
    replay = Replay(model, structure)
    expected = whole_model_gradients(model, structure, next_token_loss)
    hidden, calls = replay.inputs(IDS)
    activations = Activations([IDS], [WINDOWS.source], [calls], [hidden], torch.arange(len(IDS)))
    inputs = []
    for i in range(len(structure.layers)):
        inputs.append(activations.hidden.copy())
        activations.advance(replay, i)
    gradients = loss_gradients(replay, activations, "data", 0)
    seen = set()
    for i in reversed(range(len(structure.layers))):
        activations.hidden = inputs.pop()
        for _, call, gradient in reverse_layer(replay, i, activations, gradients):
            if call is None or gradient is None:
                continue
            seen.add(i)
            expected_call, expected_gradient = expected[i]
            assert torch.equal(call.top_k_index, expected_call.top_k_index)
            assert not call.hidden.requires_grad
            assert not call.top_k_weights.requires_grad
            # the same kernels; only the order in which a sum's gradients are added may differ
            torch.testing.assert_close(
                gradient, expected_gradient, rtol=1e-5, atol=1e-6 * expected_gradient.abs().max().item()
            )
    assert seen == set(expected)


@pytest.mark.parametrize(
    ("form", "units_per_expert"), [("token", 1), ("token", 2), ("elementwise", 1), ("elementwise", 2)]
)
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2", "gpt_oss", "nemotron_h"])
def test_costs_equal_the_definition(family, form, units_per_expert):
    """Loops over tokens, experts and widths in float64, with gradients from plain autograd."""
    model = tiny(family)
    structure = find_structure(model)
    expected = whole_model_gradients(model, structure, next_token_loss)
    scores = scores_of(family, form, units_per_expert=units_per_expert)
    for i, layer in structure.moe_layers:
        experts = layer.experts
        module = model.get_submodule(experts.path)
        call, gradient = expected[i]
        candidates = candidates_of(module, experts, i)
        exact = [expert_weight(module, m.name) for m in experts.matrices]
        costs = torch.zeros(3, experts.count, units_per_expert, 2, dtype=torch.float64)
        counts = torch.zeros(3, experts.count, dtype=torch.int64)
        for t in range(60):
            source = int(WINDOWS.source[t // 10])
            for slot, e in enumerate(call.top_k_index[t].tolist()):
                counts[source, e] += 1
                exact_output = expert_output(module, exact, e, call.hidden[t])
                for b, candidate in enumerate(candidates):
                    changed = (
                        [candidate] if units_per_expert == 1 else [(candidate[0], exact[1]), (exact[0], candidate[1])]
                    )
                    for unit, pair in enumerate(changed):
                        change = expert_output(module, pair, e, call.hidden[t]) - exact_output
                        change = change * call.top_k_weights[t, slot].double()
                        product = gradient[t].double() * change
                        costs[source, e, unit, b] += product.sum() ** 2 if form == "token" else (product**2).sum()
        assert torch.equal(scores[i].tokens, counts)
        # differences of float32 outputs, 2e-7 of outputs up to 50 times the differences, squared
        torch.testing.assert_close(scores[i].costs, costs.detach(), rtol=1e-3, atol=1e-5 * costs.max().item())
        assert (scores[i].costs[..., 0].sum() > scores[i].costs[..., 1].sum()).all()


def expert_output(module: Any, weights: Any, e: int, x: Tensor) -> Tensor:
    """One expert on one token in float64: [H]."""
    gate_up, down = (w[e].double() for w in weights)
    y = gate_up @ x.detach().double()
    if module.has_bias:
        y = y + module.gate_up_proj_bias[e].double()
    h = module._apply_gate(y.unsqueeze(0))[0] if module.has_gate else module.act_fn(y)
    out = down @ h
    return out + module.down_proj_bias[e].double() if module.has_bias else out


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_scores_do_not_depend_on_micro_batches(family):
    single_batch, small_batches = scores_of(family, "token", 60), scores_of(family, "token", 10)
    for i, scores in single_batch.items():
        assert torch.equal(scores.tokens, small_batches[i].tokens)
        torch.testing.assert_close(
            scores.costs, small_batches[i].costs, rtol=1e-3, atol=1e-5 * scores.costs.max().item()
        )


def test_exact_weights_cost_nothing():
    replay, activations, inputs = start("olmoe")
    gradients = loss_gradients(replay, activations, "data", 0)
    activations.hidden = inputs.pop()
    experts = replay.structure.layers[2].experts
    module = replay.model.get_submodule(experts.path)
    for _, call, gradient in reverse_layer(replay, 2, activations, gradients):
        exact = tuple(expert_weight(module, m.name) for m in experts.matrices)
        for units_per_expert in (1, 2):
            _, costs = pair_costs(module, experts, call, gradient, [exact], "token", units_per_expert)
            assert costs.shape == (40, units_per_expert, 1)
            assert not costs.any()


def test_sources_add_up():
    scores = LayerScores(3, 4, torch.device("cpu"))
    index = torch.tensor([[0, 3], [1, 3], [3, 0], [2, 1]])
    routed = route(index, torch.ones(4, 2), 4)
    costs = torch.rand(8, 2, 2, dtype=torch.float64)
    source = torch.tensor([0, 2, 2, 0])
    scores.add(routed, costs, source)
    scores.add(routed, costs, source)
    totals = Totals(*scores.total(SINGLE, 2))
    for e in range(4):
        for s in range(3):
            is_pair = (routed.expert == e) & (source[routed.token] == s)
            assert totals.tokens[s, e] == 2 * is_pair.sum()
            torch.testing.assert_close(totals.costs[s, e], 2 * costs[is_pair].sum(0))
    torch.testing.assert_close(totals.costs.sum((0, 1)), 2 * costs.sum(0))
    assert not totals.tokens[1].any()


def test_dropped_pairs_count_for_no_expert():
    """Routing without waiting for the device gives them to the last expert, with a weight and so a cost of zero."""
    index = torch.tensor([[0, 4], [1, 3], [5, 0], [3, 1]])
    source = torch.zeros(4, dtype=torch.int64)
    totals = []
    for routing in (route, route_without_sync):
        routed = routing(index, torch.ones(4, 2), 4)
        scores = LayerScores(1, 4, torch.device("cpu"))
        scores.add(routed, routed.weight.double().view(-1, 1, 1), source)
        totals.append(scores.total(SINGLE, 1))
    assert all(torch.equal(a, b) for a, b in zip(*totals, strict=True))
    assert totals[0][1].tolist() == [[2, 2, 0, 2]]


# Labels


def test_sampled_labels_are_seeded_and_alone():
    replay, activations, _ = start("mixtral")
    torch.manual_seed(1)
    gradients = loss_gradients(replay, activations, "sampled", 5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    same_seed = loss_gradients(replay, activations, "sampled", 5)
    assert torch.equal(state, torch.get_rng_state())
    other_seed = loss_gradients(replay, activations, "sampled", 6)
    for a, b, c in zip(gradients, same_seed, other_seed, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


@pytest.mark.parametrize("labels", ["data", "sampled"])
def test_a_large_vocabularys_loss_goes_by_windows(labels, monkeypatch):
    replay, activations, _ = start("mixtral", 60)
    expected = loss_gradients(replay, activations, labels, 5)
    monkeypatch.setattr("gemq.models.replay.MAX_LOGITS_PER_CHUNK", 1)
    assert len(replay.logit_chunks(activations.ids[0])) == len(activations.ids[0]) > 1
    for a, b in zip(expected, loss_gradients(replay, activations, labels, 5), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_data_labels_leave_the_last_token_alone():
    """It has no next token, so that a causal model has no gradient at it."""
    replay, activations, _ = start("olmoe")
    for gradient in loss_gradients(replay, activations, "data", 0):
        assert not gradient[:, -1].any()
        assert gradient[:, :-1].abs().sum(-1).min() > 0
    for gradient in loss_gradients(replay, activations, "sampled", 0):
        assert gradient.abs().sum(-1).min() > 0


def test_sampled_labels_follow_the_models_prediction():
    """Over many seeds gradients average to zero, as the score of a distribution under itself does."""
    replay, activations, _ = start("mixtral", 60)
    draws = torch.stack([loss_gradients(replay, activations, "sampled", s)[0] for s in range(200)])
    noise = draws.std(0).mean() / 200**0.5
    assert draws.mean(0).abs().mean() < 1.1 * noise  # for a normal mean it is 0.8 of the noise
    assert loss_gradients(replay, activations, "data", 0)[0].abs().mean() > 5 * noise


# Smoothing


@pytest.mark.parametrize("k", [0.0, 0.5, 2.0, 1e9])
def test_smoothing_formula(k):
    generator = torch.Generator().manual_seed(0)
    costs = torch.rand(5, 2, 3, generator=generator, dtype=torch.float64)
    counts = torch.tensor([4, 0, 10, 1, 25])
    costs[1] = 0
    mean = 8.0
    smooth = smooth_usage(costs, counts, k)
    for e, n in enumerate(counts.tolist()):
        per_token = costs[e] / n if n else costs.sum(0) / 40  # no token: the layer's mean cost per token
        expected = per_token * (n + k * mean) / (1 + k)
        torch.testing.assert_close(smooth[e], expected)


def test_smoothing_keeps_what_it_should():
    costs = torch.rand(4, 1, 2, dtype=torch.float64)
    even = torch.full((4,), 7)
    torch.testing.assert_close(smooth_usage(costs, even, 3.0), costs)
    torch.testing.assert_close(smooth_usage(costs, torch.tensor([1, 2, 3, 4]), 0.0), costs)
    assert torch.equal(smooth_usage(costs, torch.zeros(4, dtype=torch.int64), 2.0), costs)


def test_operations_without_a_fixed_order_run_without_it():
    """The mode is always restored, and other errors are raised."""
    order, modes = FixedOrder(torch.device("cuda")), []

    def compute(message: str = "") -> int:
        modes.append(torch.get_deterministic_debug_mode())
        if message and modes[-1]:
            raise RuntimeError(message)
        return 7

    assert order.run(compute) == 7
    assert modes == [2]
    with pytest.raises(RuntimeError, match="out of memory"):
        order.run(lambda: compute("out of memory"))
    assert order.is_active
    assert order.run(lambda: compute("cumsum does not have a deterministic implementation")) == 7
    assert order.run(compute) == 7  # no second try
    assert modes == [2, 2, 2, 0, 0]
    assert torch.get_deterministic_debug_mode() == 0
    assert FixedOrder(torch.device("cpu")).run(compute) == 7
    assert modes[-1] == 0
