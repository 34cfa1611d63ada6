"""Ranks of vLLM that divide a layer's experts add up to the whole layer, for families with odd experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemq.integrations.vllm.served_experts import (
    ExpertsShare,
    ServedExperts,
    experts_of_rank,
    local_index_of,
    packed_family_experts,
    rank_rows,
    share_of_parameter,
)
from gemq.kernels.modules import PackedExperts, PackedMatrices
from gemq.models.structure import find_structure
from gemq.quant.packing import PackedMatrix
from gemq.quant.widths import Width
from support.families import tiny
from support.packed_cases import random_matrix, random_routing

EXPERTS, SLOTS, GROUP = 4, 2, 16
WIDTHS = (Width.ONE_BIT, Width.TERNARY, Width.TWO_BIT, Width.THREE_BIT)


class Layer:
    """Experts of a family, whole, and the pieces from which ranks are built."""

    def __init__(self, family: str) -> None:
        [(_, layer), *_] = find_structure(model := tiny(family)).moe_layers
        assert layer.experts is not None
        self.family: Any = model.get_submodule(layer.experts.path)
        self.parameters = {n: p.detach() for n, p in self.family.named_parameters() if not n.endswith("_proj")}
        self.skeleton: Any = self.family.to("meta")
        generator = torch.Generator().manual_seed(0)
        self.hidden = layer.experts.matrices[-1].rows
        self.inner = layer.experts.matrices[-1].columns
        self.matrices: dict[str, list[PackedMatrix]] = {}
        for matrix in layer.experts.matrices:
            self.matrices[matrix.name] = [
                random_matrix(matrix.rows, matrix.columns, width, GROUP, generator) for width in WIDTHS
            ]

    def rank(self, experts: list[int], start: int, stop: int, local_index: Tensor | None = None) -> ServedExperts:
        """Return what a rank with neurons ``start`` to ``stop`` of some experts computes."""
        is_concatenated = getattr(self.skeleton, "is_concatenated", True)
        rows = rank_rows(self.skeleton.has_gate, is_concatenated, self.inner, start, stop)
        share = ExpertsShare(experts, rows, slice(start // GROUP, stop // GROUP), start == 0)
        packed = {}
        for name, matrices in self.matrices.items():
            chosen = [matrices[expert] for expert in experts]
            if name == "down_proj":
                packed[name] = PackedMatrices([columns(matrix, share.groups) for matrix in chosen])
            else:
                packed[name] = PackedMatrices([PackedMatrix.cat([m.select(r) for r in rows]) for m in chosen])
        module: PackedExperts = packed_family_experts(self.skeleton, packed)
        for name, value in self.parameters.items():
            module.register_parameter(name, nn.Parameter(share_of_parameter(name, value, share)))
        return ServedExperts(module, local_index, weights_inputs=False)


def columns(matrix: PackedMatrix, groups: slice) -> PackedMatrix:
    """Return some groups of a matrix's columns."""
    count = matrix.scales.shape[1]
    return matrix.map(lambda t: t.unflatten(1, (count, -1))[:, groups].flatten(1))


@pytest.fixture(params=["olmoe", "gpt_oss", "nemotron_h"])
def layer(request: pytest.FixtureRequest) -> Layer:
    return Layer(request.param)


@pytest.fixture
def call(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    index, weights = random_routing(9, SLOTS, EXPERTS, generator, torch.float32, "cpu")
    index[-1] = torch.tensor([-1, 2**31 - 1])  # padding
    return torch.randn(9, layer.hidden, generator=generator), index.int(), weights


def test_ranks_with_a_part_of_every_expert_add_up(layer: Layer, call: tuple[Tensor, Tensor, Tensor]) -> None:
    experts, middle = list(range(EXPERTS)), layer.inner // GROUP // 2 * GROUP
    expected = layer.rank(experts, 0, layer.inner)(*call)
    ranks = [layer.rank(experts, 0, middle), layer.rank(experts, middle, layer.inner)]
    torch.testing.assert_close(sum(rank(*call) for rank in ranks), expected, rtol=1e-4, atol=1e-5)
    assert expected[:-1].abs().amin(1).gt(0).all()
    assert not expected[-1].any()


def test_ranks_with_whole_experts_add_up(layer: Layer, call: tuple[Tensor, Tensor, Tensor]) -> None:
    expected = layer.rank(list(range(EXPERTS)), 0, layer.inner)(*call)
    total = torch.zeros_like(expected)
    for expert_map in (torch.tensor([-1, 0, -1, 1]), torch.tensor([1, -1, 0, -1])):
        experts = experts_of_rank(expert_map)
        total += layer.rank(experts, 0, layer.inner, local_index_of(expert_map))(*call)
    assert experts == [2, 0]  # in the order of the rank
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)


def test_routing_weights_can_multiply_the_inputs(layer: Layer, call: tuple[Tensor, Tensor, Tensor]) -> None:
    served = layer.rank(list(range(EXPERTS)), 0, layer.inner)
    hidden, index, weights = call
    ones = torch.ones(len(index), 1)
    expected = sum(served(hidden * weights[:, k, None], index[:, k, None], ones) for k in range(SLOTS))
    served.weights_inputs = True
    torch.testing.assert_close(served(hidden, index, weights), expected, rtol=1e-4, atol=1e-5)
