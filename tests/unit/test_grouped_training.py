"""Operations of experts in training on a GPU against plain torch: products, gather, combine, gate, gradients."""

from __future__ import annotations

from support.interpreted import DEVICE  # first: skips the module where triton is missing

# isort: split

import pytest
import torch
from torch import Tensor

from gemq.kernels.training.expert_ops import RankPairs, combine, gather, projection, residual_gradient, silu_gate
from gemq.layers.candidate_training import _residuals
from gemq.models import experts, grouped
from gemq.models.experts import RoutedPairs, route, route_local, route_without_sync
from gemq.models.structure import find_structure
from support.families import tiny

torch.set_num_threads(1)


def routing(tokens: int = 13, k: int = 2, count: int = 4, past: bool = False) -> tuple[Tensor, Tensor]:
    """Return random expert indices, with unused slots if ``past``, and weights."""
    generator = torch.Generator().manual_seed(tokens + k)
    index = torch.rand(tokens, count + past, generator=generator).topk(k).indices
    index = torch.where(index == 1, (index + 1) % (count + past), index)  # expert 1 gets no token
    return index.to(DEVICE), torch.rand(tokens, k, generator=generator).to(DEVICE)


def assert_same(result: Tensor, expected: Tensor) -> None:
    """Check equality up to another order of sums."""
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("past", [False, True])
def test_route_all_is_route_with_dropped_pairs_at_weight_zero(past):
    index, weights = routing(past=past)
    routed, pairs = route(index, weights, 4), route_without_sync(index, weights, 4)
    num_routed = len(routed.token)
    assert sum(pairs.counts) == index.numel()
    assert torch.equal(pairs.token[:num_routed], routed.token)
    assert torch.equal(pairs.expert[:num_routed], routed.expert)
    assert torch.equal(pairs.weight[:num_routed], routed.weight)
    assert (num_routed < index.numel()) == past
    assert not pairs.weight[num_routed:].any()
    assert pairs.positions is not None
    assert torch.equal(pairs.token[pairs.positions], torch.arange(len(index), device=DEVICE)[:, None].expand_as(index))


def test_stacked_pairs_belong_to_experts_of_their_own():
    index, weights = routing(k=3)
    routed = route(index, weights, 4)
    twice = routed.stack_copies(slice(2, 4), 2)
    selected = routed.expert >= 2
    count = int(selected.sum())
    assert twice.counts == routed.counts[2:] * 2
    assert twice.counts == RoutedPairs(twice.token, twice.expert, twice.weight, twice.ends).counts
    for i in range(2):
        copy = slice(i * count, (i + 1) * count)
        assert torch.equal(twice.token[copy], routed.token[selected])
        assert torch.equal(twice.expert[copy], routed.expert[selected] - 2 + 2 * i)
        assert torch.equal(twice.weight[copy], routed.weight[selected])
    assert twice.bias_experts is not None
    assert twice.bias_experts.tolist() == [2, 3, 2, 3]


def test_gathering_and_combining_with_gradients():
    index, weights = routing(tokens=9, k=2)
    routed = route_without_sync(index, weights, 4)
    assert routed.positions is not None
    hidden = torch.randn(9, 40, device=DEVICE)
    gradient = torch.randn(9, 40, device=DEVICE)

    def kernels(x: Tensor, w: Tensor) -> Tensor:
        return combine(gather(x, routed.token, routed.positions) * 2, w, routed.token, routed.positions)

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, routed.token, x[routed.token] * 2 * w.unsqueeze(1))

    outcomes = []
    for function in (kernels, plain):
        x, w = hidden.clone().requires_grad_(), routed.weight.clone().requires_grad_()
        y = function(x, w)
        outcomes.append([y, *torch.autograd.grad((y * gradient).sum(), (x, w))])
    for result, expected in zip(*outcomes, strict=True):
        assert_same(result, expected)


def test_rows_of_other_ranks_are_never_read():
    """The sums and gradients of two ranks add up to those of one. Rows of the other rank are NaN."""
    index, weights = routing(tokens=9, k=2)
    hidden, gradient = (torch.randn(9, 40, device=DEVICE) for _ in range(2))

    def run(routed: RoutedPairs, shared: RankPairs | None) -> list[Tensor]:
        x, w = hidden.clone().requires_grad_(), routed.weight.clone().requires_grad_()
        assert routed.positions is not None
        y = gather(x, routed.token, routed.positions, shared) * 2
        if shared is not None:
            is_local = torch.arange(len(y), device=DEVICE)[:, None] < shared.num_pairs
            y = torch.where(is_local, y, torch.nan) + torch.where(is_local, 0.0, torch.nan)
        out = combine(y, w, routed.token, routed.positions, shared)
        grad_x, grad_w = torch.autograd.grad((out * gradient).sum(), (x, w))
        assert routed.positions is not None
        return [out, grad_x, grad_w[routed.positions]]

    shards = [route_local(index, weights, local_experts) for local_experts in (slice(0, 3), slice(3, 4))]
    assert sum(int(shard.ends[-1]) for shard in shards) == index.numel()
    results = [run(shard, RankPairs(shard.ends[-1:], lambda rows: rows, lambda rows: rows)) for shard in shards]
    for expected, rank_0, rank_1 in zip(run(route_without_sync(index, weights, 4), None), *results, strict=True):
        assert_same(rank_0 + rank_1, expected)


def test_gate_with_gradient():
    x = torch.randn(7, 2 * 20, device=DEVICE, requires_grad=True)
    gradient = torch.randn(7, 20, device=DEVICE)
    gate, up = x.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    result = silu_gate(x)
    assert_same(result, expected)
    assert_same(*(torch.autograd.grad((y * gradient).sum(), x)[0] for y in (result, expected)))


def test_gradient_of_residuals():
    out = torch.randn(3 * 5, 40, device=DEVICE, requires_grad=True)
    exact, weight, energy = torch.randn(5, 40, device=DEVICE), torch.rand(5, device=DEVICE), torch.tensor(0.3)
    weight, energy = weight.repeat(3), energy.to(DEVICE)
    (expected,) = torch.autograd.grad(_residuals(out, exact, weight).square().sum() / energy, out)
    assert_same(residual_gradient(out.detach(), exact, weight, energy), expected)


@pytest.mark.parametrize("squares", [False, True])
def test_changes_along_a_direction(squares):
    direction, changed, exact = (torch.randn(5, 1100, device=DEVICE).bfloat16() for _ in range(3))
    products = direction.float() * (changed.float() - exact.float())
    result = projection(direction, changed, exact, squares)
    torch.testing.assert_close(result, (products.square() if squares else products).sum(1), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_product_with_gradients(transposed):
    """One product per expert, one of which has no rows, is the reference. bfloat16 rounds results to 2^-9."""
    counts, dtype = [9, 0, 17, 6], torch.bfloat16
    ends = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    x = torch.randn(sum(counts), 24, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(4, 16, 24, device=DEVICE).to(dtype)
    if transposed:
        weight = weight.mT.contiguous().mT
    weight.requires_grad_()
    expected = torch.cat([rows.float() @ w.float().T for rows, w in zip(x.split(counts), weight, strict=True)])
    result = grouped.linear(x, weight, ends)
    gradient = torch.randn_like(result)
    torch.full((1 << 20,), torch.nan, device=DEVICE)  # unwritten memory would be NaN
    results = [result, *torch.autograd.grad(result, (x, weight), gradient)]
    references = [expected, *torch.autograd.grad(expected, (x, weight), gradient.float())]
    for a, b in zip(results, references, strict=True):
        assert ((a.float() - b.float()).norm() / b.float().norm()).item() < 6e-3
    assert not results[2][1].any()


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_grouped_forward_is_the_plain_one(family, monkeypatch):
    """With biases, transposed weights and other gates; gradients of hidden states, routing weights and weights."""
    model = tiny(family).to(DEVICE)
    _, layer = find_structure(model).moe_layers[-1]
    assert layer.experts is not None
    module = model.get_submodule(layer.experts.path).to(torch.bfloat16)
    index, weights = routing(tokens=20, k=2, count=layer.experts.count)
    hidden = torch.randn(20, 64, device=DEVICE).to(torch.bfloat16)
    results = []
    for usable in (True, False):
        monkeypatch.setattr(grouped, "usable", lambda *_, usable=usable: usable)
        x, w = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        module.requires_grad_()
        y = experts.experts_forward(module, x, index, w)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), (x, w, module.down_proj))])
    for a, b in zip(*results, strict=True):
        assert ((a - b).float().norm() / b.float().norm()).item() < 3e-2
