"""Experts in host memory: which ones stay on the GPU, and that outputs do not depend on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemq.errors import UserError
from gemq.kernels import dispatch
from gemq.kernels.offload import choose_residents, expert_code_bytes, offload_experts
from gemq.quant.widths import Width
from support.packed_cases import Experts, random_routing

EXPERTS, SLOTS = 6, 2
CPU = torch.device("cpu")


def affine_layer(seed: int) -> Any:
    """Return experts with affine codes."""
    widths = [Width.ONE_BIT, Width.TERNARY, Width.TWO_BIT, Width.THREE_BIT, Width.TWO_BIT, Width.TERNARY]
    return Experts(64, 32, widths, torch.Generator().manual_seed(seed))


def trellis_layer(seed: int) -> Any:
    """Return experts with trellis codes."""
    from support.trellis_cases import TrellisExperts

    return TrellisExperts(64, 32, [8, 12, 16, 20, 24, 13], 12, torch.Generator().manual_seed(seed))


LAYERS = {"affine": affine_layer, "trellis": trellis_layer}


def test_the_most_used_experts_of_all_layers_stay():
    sizes = [[10, 10, 10], [10, 10, 10]]
    usage = [[0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]
    assert choose_residents(sizes, usage, 60) == [frozenset({0, 1, 2})] * 2
    # 10 for the staging area, 40 for residents
    assert choose_residents(sizes, usage, 50) == [frozenset({0, 1}), frozenset({0, 2})]
    assert choose_residents(sizes, usage, 30) == [frozenset(), frozenset()]
    with pytest.raises(ValueError, match="29 bytes are less than a layer's 30"):
        choose_residents(sizes, usage, 29)


def test_experts_of_equal_usage_are_taken_from_all_layers_in_turn():
    sizes = [[10] * 4] * 3
    assert choose_residents(sizes, [[0.25] * 4] * 3, 80) == [frozenset({0, 1})] * 3


@pytest.mark.parametrize("kind", LAYERS)
def test_offloaded_experts_are_stored_and_dequantized_as_before(kind):
    layer = LAYERS[kind](0)
    expected = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    weights = [layer.down_proj.dequantize(expert, torch.float32) for expert in range(EXPERTS)]
    sizes = expert_code_bytes(layer)
    residency = offload_experts([layer], [[0.0, 0.3, 0.0, 0.3, 0.4, 0.0]], sum(sizes), CPU)
    assert residency.residents == (frozenset(range(EXPERTS)),)

    layer = LAYERS[kind](0)
    residency = offload_experts(
        [layer, LAYERS[kind](1)], [[0.0, 0.3, 0.0, 0.3, 0.4, 0.0]] * 2, 2 * sum(sizes) - 99, CPU
    )
    assert 0 < residency.offloaded_bytes < residency.resident_bytes
    state = layer.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    for expert, weight in enumerate(weights):
        assert torch.equal(layer.down_proj.dequantize(expert, torch.float32), weight)


def two_layers(kind: str) -> tuple[list[Any], Any]:
    """Return two layers with a third of their experts offloaded, and where these are."""
    layers = [LAYERS[kind](seed) for seed in range(2)]
    sizes = [sum(expert_code_bytes(layer)) for layer in layers]
    usage = [[0.1, 0.3, 0.0, 0.1, 0.4, 0.1]] * 2
    residency = offload_experts(layers, usage, sizes[0] + sizes[1] // 2, CPU)
    assert all(0 < len(residents) < EXPERTS for residents in residency.residents)
    return layers, residency


@pytest.mark.parametrize("pairs", [[[5, 0], [2, 6]], [[-1, 3]], [[e % 7] for e in range(40)]])
def test_the_codes_of_chosen_experts_are_fetched(pairs, monkeypatch):
    pytest.importorskip("support.interpreted")
    from gemq.kernels import fetch

    monkeypatch.setattr(fetch, "MATRIX_PROGRAMS", 2)
    monkeypatch.setattr(fetch, "BLOCK_UNITS", 16)
    monkeypatch.setattr(fetch, "MAX_SEARCHED_PAIRS", 16)
    layers, residency = two_layers("affine")
    pool = layers[0].down_proj.codes
    index = torch.tensor(pairs)
    for layer, residents in zip(layers, residency.residents, strict=True):
        pool[residency.resident_bytes :] = 0x55
        assert torch.equal(fetch.fetch_codes(index, layer.fetch_table, pool, True), index)
        for matrices in layer.packed_projections().values():
            for expert in range(EXPERTS):
                start = int(matrices.table[expert, 1])
                codes = pool[start : start + matrices.code_bytes(expert)]
                is_there = expert in residents or expert in index or index.numel() > 16
                expected = matrices.matrix(expert).codes.flatten()
                assert torch.equal(codes, expected if is_there else torch.full_like(codes, 0x55))


@pytest.mark.parametrize("kind", LAYERS)
def test_kernels_give_the_same_outputs_with_experts_in_host_memory(kind, monkeypatch):
    pytest.importorskip("support.interpreted")
    from gemq.kernels import fetch

    monkeypatch.setattr(dispatch, "mode", "triton")
    monkeypatch.setattr(fetch, "MATRIX_PROGRAMS", 1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 64, generator=generator)
    weights = torch.rand(1, SLOTS, generator=generator)
    index = torch.tensor([[4, 2]])
    with torch.no_grad():
        expected = dispatch.experts_forward(LAYERS[kind](0), hidden, index, weights)
        layers, residency = two_layers(kind)
        assert 4 in residency.residents[0]
        assert 2 not in residency.residents[0]
        assert torch.equal(dispatch.experts_forward(layers[0], hidden, index, weights), expected)


def test_training_is_refused(monkeypatch):
    pytest.importorskip("support.interpreted")
    monkeypatch.setattr(dispatch, "mode", "triton")
    layers = [affine_layer(seed) for seed in range(2)]
    offload_experts(layers, [[0.1] * EXPERTS] * 2, sum(expert_code_bytes(layers[0])), CPU)
    hidden = torch.randn(1, 64, requires_grad=True)
    index, weights = random_routing(1, SLOTS, EXPERTS, torch.Generator(), torch.float32, CPU)
    with pytest.raises(UserError, match="cannot be trained"):
        dispatch.experts_forward(layers[0], hidden, index, weights)
