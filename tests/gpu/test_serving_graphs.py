"""Operators as vLLM calls them: CUDA graphs of several batch sizes, padding tokens, experts of other ranks.

Run with ``python -m pytest tests/gpu/test_serving_graphs.py -m gpu``. vLLM is not needed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gemq.integrations.vllm.served_experts import ServedExperts, local_index_of
from gemq.kernels import fallbacks, reference
from gemq.kernels.modules import PackedLinear
from gemq.quant.widths import Width
from support.packed_cases import Experts, random_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIZES = (512, 300, 64, 17, 16, 5, 1)
"""Tokens of each graph. vLLM captures the largest first, and all share memory. Both families of kernels are in it."""

UNUSED = (-1, 24, 2**31 - 1, -(2**31))
"""Expert indices of padding tokens. vLLM writes -1; whatever else is there must not be read as an address either."""

EXPERTS, SLOTS, HIDDEN = 24, 4, 256
WIDTHS = (Width.ONE_BIT, Width.TERNARY, Width.TWO_BIT, Width.THREE_BIT)


class Batch:
    """The fixed tensors that a graph reads."""

    def __init__(self, tokens: int, hidden: int) -> None:
        self.x = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device="cuda")
        self.index = torch.full((tokens, SLOTS), -1, dtype=torch.int32, device="cuda")  # vLLM's type
        self.weights = torch.zeros(tokens, SLOTS, device="cuda")

    def fill(self, used: int, seed: int) -> None:
        """Draw ``used`` tokens. The others are padding, with indices of unused slots."""
        generator = torch.Generator().manual_seed(seed)
        tokens = len(self.x)
        index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:SLOTS] for _ in range(tokens)])
        padding = torch.tensor(UNUSED).repeat(tokens, SLOTS)[:, :SLOTS]
        self.index.copy_(torch.where(torch.arange(tokens)[:, None] < used, index, padding))
        self.x.copy_(torch.randn(self.x.shape, generator=generator))
        self.x[used:] = float("nan")  # what lies in vLLM's buffers may be anything
        self.weights.copy_(torch.rand(self.weights.shape, generator=generator))


def packed_experts(groups: int, bias: bool) -> Experts:
    """Return experts with ``groups`` groups of 128 columns in a row of the first projection, and one in down."""
    generator = torch.Generator().manual_seed(groups)
    module = Experts(128 * groups, 128, WIDTHS * 6, generator, group_sizes=(128, 128), bias=bias)
    return module.to("cuda")


def assert_close(result: Tensor, expected: Tensor, used: int) -> None:
    """Check the rows of real tokens against the reference, up to rounding of bfloat16."""
    result, expected = result[:used].float(), expected[:used].float()
    assert result.isfinite().all()
    assert (result - expected).norm() <= 0.02 * expected.norm()


def captured(call: Any, pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Return a graph of ``call`` and its output. The first call compiles kernels, as vLLM's profiling run does."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = call()
    return graph, out


@pytest.mark.parametrize(("groups", "bias"), [(1, False), (2, False), (2, True)])
def test_experts_of_all_batch_sizes_in_graphs_that_share_memory(groups: int, bias: bool) -> None:
    module, counted = packed_experts(groups, bias), dict(fallbacks)
    served, pool = ServedExperts(module, None, weights_inputs=False), torch.cuda.graph_pool_handle()
    batches = [Batch(tokens, 128 * groups) for tokens in SIZES]
    with torch.inference_mode():
        graphs = [captured(lambda b=batch: served(b.x, b.index, b.weights), pool) for batch in batches]
        for seed in range(2):
            for batch, (graph, out) in zip(batches, graphs, strict=True):
                used = max(1, len(batch.x) - 3 * seed)
                batch.fill(used, seed)
                graph.replay()
                index = batch.index[:used].long()
                expected = reference.experts_forward(module, batch.x[:used], index, batch.weights[:used])
                assert_close(out, expected, used)
    assert dict(fallbacks) == counted


@pytest.mark.parametrize("rank", [0, 1])
def test_experts_of_one_rank_in_a_graph(rank: int) -> None:
    module = packed_experts(2, True)
    rank_experts = range(rank, EXPERTS, 2)
    expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
    expert_map[list(rank_experts)] = torch.arange(EXPERTS // 2, dtype=torch.int32)
    share = Experts(
        256, 128, (WIDTHS * 6)[rank::2], torch.Generator().manual_seed(0), group_sizes=(128, 128), bias=True
    )
    for name in ("gate_up_proj", "down_proj"):
        matrices = [getattr(module, name).matrix(expert) for expert in rank_experts]
        setattr(share, name, type(module.down_proj)(matrices))
        setattr(share, f"{name}_bias", torch.nn.Parameter(getattr(module, f"{name}_bias")[rank::2].clone()))
    served = ServedExperts(share.to("cuda"), local_index_of(expert_map).cuda(), weights_inputs=False)
    pool = torch.cuda.graph_pool_handle()
    with torch.inference_mode():
        for tokens in (100, 16, 1):
            batch = Batch(tokens, HIDDEN)
            graph, out = captured(lambda b=batch: served(b.x, b.index, b.weights), pool)
            used = max(1, tokens - 2)
            batch.fill(used, tokens)
            graph.replay()
            index = torch.where(batch.index[:used] % 2 == rank, batch.index[:used], -1).long()
            expected = reference.experts_forward(module, batch.x[:used], index, batch.weights[:used])
            assert_close(out, expected, used)


@pytest.mark.parametrize("groups", [1, 2])
def test_linears_of_all_batch_sizes_in_graphs_that_share_memory(groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    linear: PackedLinear = random_linear(256, 128 * groups, Width.FOUR_BIT, 128, generator).to("cuda")
    pool = torch.cuda.graph_pool_handle()
    with torch.inference_mode():
        inputs = [torch.zeros(tokens, 2 * linear.in_features, dtype=torch.bfloat16, device="cuda") for tokens in SIZES]
        # a view with strides, as slices of fused projections are
        graphs = [captured(lambda x=x: linear(x[:, : linear.in_features]), pool) for x in inputs]
        for x, (graph, out) in zip(inputs, graphs, strict=True):
            x.copy_(torch.randn(x.shape, generator=generator))
            graph.replay()
            assert_close(out, reference.linear_forward(linear, x[:, : linear.in_features]), len(x))
