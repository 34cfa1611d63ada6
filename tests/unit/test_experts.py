"""The experts' arithmetic, step by step, against the modules' own forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gemq.models.experts import (
    all_pairs_forward,
    apply_down,
    apply_first,
    expert_weight,
    experts_forward,
    record_experts_calls,
    route,
)
from gemq.models.structure import find_structure
from support.families import FAMILIES, TOY, tiny, tokens

torch.set_num_threads(1)


def by_hand(module, experts, call, weights=None):
    """Computes the block's output [T, H] from its steps."""
    first, down = weights or (expert_weight(module, m.name) for m in experts.matrices)
    routed = route(call.top_k_index, call.top_k_weights, experts.count)
    h = apply_first(module, experts.matrices[0].name, first, call.hidden[routed.token], routed)
    out = apply_down(module, down, h, routed) * routed.weight.unsqueeze(1)
    return torch.zeros_like(call.hidden).index_add_(0, routed.token, out)


def first_call(family: str, dtype: torch.dtype = torch.float32):
    model = tiny(family, dtype=dtype)
    _, layer = find_structure(model).moe_layers[-1]
    module = model.get_submodule(layer.experts.path)
    with record_experts_calls(module) as calls, torch.no_grad():
        model(tokens())
    (call,) = calls
    return module, layer.experts, call


@pytest.mark.sample
@pytest.mark.parametrize("family", [*FAMILIES, TOY])
def test_steps_reproduce_the_modules_output(family):
    module, experts, call = first_call(family)
    assert call.top_k_index.dtype == torch.int64
    assert call.hidden.shape == (36, 64)
    # float32: products over groups of rows and sums over experts in another order than the module's
    scale = call.output.abs().max().item()
    torch.testing.assert_close(by_hand(module, experts, call), call.output, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.sample
@pytest.mark.parametrize("family", [*FAMILIES, TOY])
def test_every_expert_on_every_token_gives_the_same_output(family):
    module, _, call = first_call(family)
    if getattr(module, "batched_rows", False):
        pytest.skip("routes rows, not tokens")
    arguments = call.hidden, call.top_k_index, call.top_k_weights
    with torch.no_grad():
        expected, output = experts_forward(module, *arguments), all_pairs_forward(module, *arguments)
    scale = expected.abs().max().item()
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.sample
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_calls_do_not_depend_on_the_implementation(implementation):
    model = tiny("qwen3_moe")
    model.set_experts_implementation(implementation)
    _, layer = find_structure(model).moe_layers[0]
    module = model.get_submodule(layer.experts.path)
    with record_experts_calls(module) as calls, torch.no_grad():
        model(tokens())
        model(tokens())
    assert len(calls) == 2
    torch.testing.assert_close(by_hand(module, layer.experts, calls[0]), calls[0].output, rtol=1e-4, atol=1e-4)


def test_watching_ends_with_the_context():
    model = tiny("mixtral")
    _, layer = find_structure(model).moe_layers[0]
    module = model.get_submodule(layer.experts.path)
    with pytest.raises(KeyError), record_experts_calls(module) as calls:
        raise KeyError
    model(tokens())
    assert calls == []


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("keywords", [False, True])
def test_arguments_are_told_apart(swapped, keywords):
    """By keyword or in place, weights before indices or after."""

    class Echo(nn.Module):
        def forward(self, hidden_states: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return hidden_states

    hidden, index, weights = torch.randn(1, 4, 8), torch.zeros(4, 2, dtype=torch.int64), torch.rand(4, 2)
    b, c = (weights, index) if swapped else (index, weights)
    module = Echo()
    with record_experts_calls(module) as calls:
        _ = module(hidden_states=hidden, b=b, c=c) if keywords else module(hidden, b, c)
    assert calls[0].top_k_index is index
    assert calls[0].top_k_weights is weights
    assert calls[0].hidden.shape == (4, 8)


def test_route_sorts_pairs_by_expert():
    index = torch.tensor([[2, 0], [0, 1], [2, 1]])
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], requires_grad=True)
    routed = route(index, weights, 4)
    assert routed.counts == [2, 2, 2, 0]
    assert routed.expert.tolist() == [0, 0, 1, 1, 2, 2]
    assert routed.token.tolist() == [0, 1, 1, 2, 0, 2]
    torch.testing.assert_close(routed.weight, torch.tensor([0.2, 0.3, 0.4, 0.6, 0.1, 0.5]))
    routed.weight.sum().backward()
    assert torch.equal(weights.grad, torch.ones(3, 2))


def test_indices_past_the_last_expert_are_dropped():
    """Expert parallelism marks unused slots this way. Families with idle experts also route beyond E."""
    index = torch.tensor([[3, 0], [4, 3], [1, 7]])
    weights = torch.arange(6.0).view(3, 2)
    routed = route(index, weights, 3)
    assert routed.counts == [1, 1, 0]
    assert routed.expert.tolist() == [0, 1]
    assert routed.token.tolist() == [0, 2]
    assert routed.weight.tolist() == [1.0, 4.0]
    none = route(torch.full((2, 2), 9), torch.ones(2, 2), 3)
    assert none.counts == [0, 0, 0]
    assert none.token.shape == none.weight.shape == (0,)


def test_no_pairs_at_all():
    module, experts, call = first_call("mixtral")
    routed = route(call.top_k_index[:0], call.top_k_weights[:0], experts.count)
    h = apply_first(module, "gate_up_proj", expert_weight(module, "gate_up_proj"), call.hidden[:0], routed)
    assert apply_down(module, expert_weight(module, "down_proj"), h, routed).shape == (0, 64)


@pytest.mark.sample
@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "nemotron_h"])
def test_weights_are_read_as_outputs_by_inputs(family):
    module, experts, _ = first_call(family)
    for matrix in experts.matrices:
        weight = expert_weight(module, matrix.name)
        assert weight.shape == (experts.count, matrix.rows, matrix.columns)
        assert not weight.requires_grad
        stored = getattr(module, matrix.name)
        assert torch.equal(weight, stored.transpose(1, 2) if family == "gpt_oss" else stored)


@pytest.mark.parametrize("family", ["gpt_oss", "olmoe", "nemotron_h"])
def test_steps_are_differentiable(family):
    """Gradients reach the inputs and the routing weights as through the module itself."""
    module, experts, call = first_call(family)
    gradients = []
    for function in (lambda c: by_hand(module, experts, c), lambda c: module(c.hidden, c.top_k_index, c.top_k_weights)):
        call.hidden = call.hidden.detach().requires_grad_()
        call.top_k_weights = call.top_k_weights.detach().requires_grad_()
        gradients.append(torch.autograd.grad(function(call).square().sum(), (call.hidden, call.top_k_weights)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
