"""Products with 4-bit weights on a CPU against float64, and the inputs that they support."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemq.kernels import cpu_int4, reference
from gemq.kernels.modules import PackedLinear, PackedMatrices
from gemq.quant.grid import Quantized
from gemq.quant.packing import PackedMatrix
from gemq.quant.widths import Width

torch.set_num_threads(1)


def random_matrix(rows: int, columns: int, width: Width, group_size: int) -> PackedMatrix:
    """Return a matrix with offsets anywhere in the range, as fitted grids have."""
    groups = columns // group_size
    codes = torch.randint(width.levels, (rows, columns), dtype=torch.uint8)
    scales = torch.rand(rows, groups) + 0.2
    offsets = scales * -width.max_code * torch.rand(rows, groups)
    return PackedMatrix.pack(Quantized(codes, scales, offsets), width)


def linear(matrix: PackedMatrix, bias: bool = False) -> PackedLinear:
    """Return a packed linear with the matrix."""
    rows, groups = matrix.scales.shape
    plain = nn.Linear(groups * matrix.group_size, rows, bias=bias, dtype=torch.bfloat16)
    return PackedLinear.from_linear(plain, matrix)


def error(result: Tensor, truth: Tensor) -> float:
    """Return the relative error of a result."""
    return ((result.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("width", Width)
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(48, 96, 32), (272, 192, 64), (256, 512, 128)])
@torch.no_grad()
def test_products_are_as_exact_as_the_reference(width, rows, columns, group_size):
    torch.manual_seed(int(width.value * 10) + rows)
    module = linear(random_matrix(rows, columns, width, group_size), bias=rows == 48)
    for tokens in (1, 5, 16):
        x = torch.randn(2, tokens // 2 or 1, columns).bfloat16()[: 1 if tokens == 1 else 2]
        assert cpu_int4.covers(module, x)
        truth = x.double() @ module.dequantize(torch.float32).double().T
        truth = truth if module.bias is None else truth + module.bias.double()
        result = cpu_int4.linear_forward(module, x)
        assert result.shape == truth.shape
        assert result.dtype == torch.bfloat16
        assert error(result, truth) < 1.6 * max(error(reference.linear_forward(module, x), truth), 2**-9)


class Experts(nn.Module):
    """The attributes of a family's packed experts that the kernels use."""

    has_gate, has_bias = True, True

    def __init__(self, widths: tuple[Width, ...], hidden: int, inner: int, group_size: int) -> None:
        super().__init__()
        for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            matrices = [random_matrix(rows, columns, width, group_size) for width in widths]
            setattr(self, name, PackedMatrices(matrices))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(len(widths), 2 * inner).bfloat16())
        self.down_proj_bias = nn.Parameter(torch.randn(len(widths), hidden).bfloat16())

    def _packed(self) -> dict[str, PackedMatrices]:
        return dict(self.named_children())  # type: ignore[arg-type]

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return torch.tanh(gate) * up


@torch.no_grad()
def test_experts_of_mixed_widths():
    torch.manual_seed(0)
    module: Any = Experts(tuple(Width), 128, 64, 64)
    for tokens in (1, 2, 16):
        x = torch.randn(tokens, 128).bfloat16()
        index = torch.stack([torch.randperm(7)[:3] for _ in range(tokens)])  # 6 marks an unused slot
        weights = torch.rand(tokens, 3).bfloat16()
        truth = reference.experts_forward(module, x.double(), index, weights.double())
        result = cpu_int4.experts_forward(module, x, index, weights)
        assert error(result, truth) < 1.6 * error(reference.experts_forward(module, x, index, weights), truth)


@torch.no_grad()
def test_changed_weights_are_converted_again():
    module = linear(random_matrix(32, 64, Width.TWO_BIT, 32))
    x = torch.randn(1, 64).bfloat16()
    expected = 2 * cpu_int4.linear_forward(module, x)
    module.scales.add_(8)  # doubles scales, and with them offsets
    torch.testing.assert_close(cpu_int4.linear_forward(module, x), expected)


def test_unsupported_inputs():
    module = linear(random_matrix(32, 64, Width.TWO_BIT, 32))
    x = torch.randn(1, 64).bfloat16()
    assert cpu_int4.covers(module, x)
    assert not cpu_int4.covers(module, x.float())
    assert not cpu_int4.covers(module, torch.randn(17, 64).bfloat16())
    assert not cpu_int4.covers(module, x.clone().requires_grad_())
    assert not cpu_int4.covers(linear(random_matrix(40, 64, Width.TWO_BIT, 32)), x)  # rows
    assert not cpu_int4.covers(linear(random_matrix(32, 64, Width.TWO_BIT, 16)), x)  # groups
