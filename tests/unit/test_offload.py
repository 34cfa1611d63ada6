"""Experts in host memory: which ones stay on the GPU, and that outputs do not depend on it."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import gemq
from gemq.checkpoint.bounded_load import expert_usage, fit_into
from gemq.checkpoint.skeleton import build_skeleton, read_config
from gemq.checkpoint.stored import StoredCheckpoint
from gemq.errors import UserError
from gemq.kernels import dispatch
from gemq.kernels.offload import choose_residents, expert_code_bytes, offload_experts
from gemq.quant.widths import Width
from gemq.recipe_values import parse_size
from gemq.runtime.fallbacks import pop_messages
from support.families import tiny_config
from support.packed_cases import Experts, random_routing
from support.packed_checkpoints import write_packed

EXPERTS, SLOTS, HIDDEN = 6, 2, 32
CPU = torch.device("cpu")


def affine_layer(seed: int) -> Any:
    """Return experts with affine codes."""
    widths = [Width.ONE_BIT, Width.TERNARY, Width.TWO_BIT, Width.THREE_BIT, Width.TWO_BIT, Width.TERNARY]
    return Experts(HIDDEN, 16, widths, torch.Generator().manual_seed(seed), group_sizes=(16, 16))


def trellis_layer(seed: int) -> Any:
    """Return experts with trellis codes."""
    from support.trellis_cases import TrellisExperts

    return TrellisExperts(HIDDEN, 16, [8, 12, 16, 20, 24, 13], 12, torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("chunk_bytes", [1 << 28, 128], ids=["whole", "in pieces"])
@pytest.mark.parametrize("pairs", [[[5, 0], [2, 6]], [[-1, 3]], [[e % 7] for e in range(40)]])
def test_the_codes_of_chosen_experts_are_fetched(pairs, chunk_bytes, monkeypatch):
    pytest.importorskip("support.interpreted")
    from gemq.kernels import fetch, offload

    monkeypatch.setattr(offload, "MAX_CHUNK_BYTES", chunk_bytes)

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
    hidden = torch.randn(1, HIDDEN, generator=generator)
    weights = torch.rand(1, SLOTS, generator=generator)
    index = torch.tensor([[4, 2]])
    with torch.no_grad():
        expected = dispatch.experts_forward(LAYERS[kind](0), hidden, index, weights)
        layers, residency = two_layers(kind)
        assert 4 in residency.residents[0]
        assert 2 not in residency.residents[0]
        assert torch.equal(dispatch.experts_forward(layers[0], hidden, index, weights), expected)


@torch.no_grad()
def test_the_reference_serves_experts_in_host_memory_if_fetching_fails(monkeypatch):
    pytest.importorskip("support.interpreted")
    from gemq.kernels import fetch

    def broken(*_: object) -> None:
        raise RuntimeError("PassManager::run failed")

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, HIDDEN, generator=generator)
    index, weights = torch.tensor([[4, 2]]), torch.rand(1, SLOTS, generator=generator)
    expected = dispatch.experts_forward(affine_layer(0), hidden, index, weights)
    layers, _ = two_layers("affine")
    monkeypatch.setattr(dispatch, "_choose", lambda *_: importlib.import_module("gemq.kernels.decode.operators"))
    monkeypatch.setattr(dispatch, "_failed", {})
    monkeypatch.setattr(dispatch, "fallbacks", type(dispatch.fallbacks)())
    monkeypatch.setattr(fetch, "fetch_codes", broken)
    with pytest.warns(UserWarning, match=r"PassManager::run failed.*slow reference"):
        result = dispatch.experts_forward(layers[0], hidden, index, weights)
    assert torch.equal(result, expected)
    assert list(dispatch.fallbacks.values()) == [1]


def test_training_is_refused(monkeypatch):
    pytest.importorskip("support.interpreted")
    monkeypatch.setattr(dispatch, "mode", "triton")
    layers = [affine_layer(seed) for seed in range(2)]
    offload_experts(layers, [[0.1] * EXPERTS] * 2, sum(expert_code_bytes(layers[0])), CPU)
    hidden = torch.randn(1, HIDDEN, requires_grad=True)
    index, weights = random_routing(1, SLOTS, EXPERTS, torch.Generator(), torch.float32, CPU)
    with pytest.raises(UserError, match="cannot be trained"):
        dispatch.experts_forward(layers[0], hidden, index, weights)


# Whole models


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint of two layers of four experts, with counts of the experts' tokens."""
    out = write_packed(tmp_path_factory.mktemp("offload") / "out")
    (out / "allocation.json").write_text('{"widths": [], "tokens": [[1, 5, 0, 2], [], [3, 3, 1, 1]]}')
    return out


def fit(checkpoint: Path, bound: int) -> tuple[Any, Any]:
    """Load a model, and fit it into a bound as if the CPU were a GPU."""
    model: Any = gemq.load(checkpoint, dtype="float32")
    stored = StoredCheckpoint.open(checkpoint)
    modules: Any = [model.get_submodule(path) for path in stored.format.experts]
    skeleton = build_skeleton(read_config(checkpoint), stored)
    return model, fit_into(model, skeleton, checkpoint, modules, bound, 32, 1, CPU)


@torch.no_grad()
def test_the_smallest_bound_that_the_message_names_gives_the_same_logits(checkpoint, tmp_path):
    ids = torch.arange(3, 23)[None]
    expected = gemq.load(checkpoint, dtype="float32")
    with pytest.raises(
        UserError, match=r"--gpu-memory 1MB is too small: one layer's experts take .* give at least"
    ) as error:
        fit(checkpoint, 1_000_000)
    smallest = parse_size(str(error.value).split()[-1])
    model, residency = fit(checkpoint, smallest)
    assert residency.resident_share < 1
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    with pytest.raises(RuntimeError, match="load the model again"):
        copy.deepcopy(model)
    assert fit(checkpoint, 2 * smallest)[1].resident_share == 1


def test_a_latent_cache_is_counted_as_it_is_stored(tmp_path):
    out = write_packed(tmp_path / "out", tiny_config("deepseek_v2"))
    with pytest.raises(UserError, match=r"the cache of 32 tokens 0\.01MB"):  # full keys and values take 0.05
        fit(out, 1_000_000)


def test_usage_is_read_from_the_allocation(checkpoint, tmp_path):
    assert expert_usage(checkpoint, [4, 4]) == [[0.125, 0.625, 0.0, 0.25], [0.375, 0.375, 0.125, 0.125]]
    assert not pop_messages()
    for text in ("{", "[]", '{"tokens": 3}', '{"tokens": [[1, 2]]}', '{"tokens": [["a", 1], [1, 2]]}'):
        (tmp_path / "allocation.json").write_text(text)
        assert expert_usage(tmp_path, [2, 2]) == [[0.5, 0.5]] * 2
    assert pop_messages()[0].startswith("5 times experts on the GPU were chosen without counts")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"gpu_memory": "8GB"},
            r"--gpu-memory \(gpu_memory\) bounds a GPU and the model is loaded on cpu: leave it out",
        ),
        ({"gpu_memory": "much"}, "gpu_memory: 'much' is not a size: write it like 12GB or 800MB"),
        ({"context": 4096}, "context and batch say what is to fit into gpu_memory: give gpu_memory too"),
        ({"gpu_memory": 0}, "gpu_memory cannot be 0: give bytes, or a text such as 8GB"),
    ],
)
def test_a_bound_that_cannot_work_is_refused(checkpoint, arguments, message):
    with pytest.raises(UserError, match=message):
        gemq.load(checkpoint, **arguments)
