"""GPTQ's kernel and the blocked factorization against the plain loop and the library's."""

from __future__ import annotations

from support.interpreted import DEVICE  # first: skips the module where triton is missing

# isort: split

import pytest
import torch

from gemq.quant import hessian
from gemq.quant.gptq import _column_loop, max_codes
from gemq.quant.gptq_kernel import quantize
from gemq.quant.grid import dequantize
from gemq.quant.hessian import factorize
from gemq.quant.widths import Width
from support.gptq_problems import ALL, DAMPENING, objective, pick, problem

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("rows", "columns", "group_size", "widths"), [(5, 96, 32, ALL[:3]), (33, 64, 16, ALL[3:]), (6, 128, 64, ALL[::2])]
)
def test_kernel_against_plain_loop(rows, columns, group_size, widths):
    """Sums in another order flip a rounding here and there, and those after it: at most 1 % of the codes."""
    weight, h = problem(2, rows, columns, seed=rows)
    upper = factorize(h.float(), DAMPENING).upper
    max_code = max_codes(widths, weight.device).unsqueeze(1).expand(-1, 2)
    shape = (len(widths), *weight.shape)
    expected_soft_codes, soft_codes = (
        torch.empty(shape),
        torch.empty(2 * len(widths), *weight.shape, device=DEVICE)[::2],
    )
    expected = _column_loop(weight, upper, max_code.unsqueeze(2), group_size, expected_soft_codes)
    result = quantize(weight.to(DEVICE), upper.to(DEVICE), max_code.to(DEVICE), group_size, soft_codes)
    for i in range(len(widths)):
        ours, theirs = (pick(type(q)(*(t.cpu() for t in q)), i) for q in (result, expected))
        assert (ours.codes == theirs.codes).float().mean() >= 0.99
        assert objective(weight, dequantize(ours), h).sum().item() == pytest.approx(
            objective(weight, dequantize(theirs), h).sum().item(), rel=1e-3
        )
        same = (ours.codes == theirs.codes).all(-1)  # rows where no rounding was flipped
        assert same.float().mean() > 0.5
        torch.testing.assert_close(soft_codes[i].cpu()[same], expected_soft_codes[i][same], rtol=0, atol=0.02)
        torch.testing.assert_close(soft_codes[i].cpu().round().clamp(0, max_code[i, 0]), ours.codes.float())


def test_a_width_for_each_expert():
    weight, h = problem(3, 10, 64)
    upper = factorize(h.float(), DAMPENING).upper
    max_code = max_codes((Width.ONE_BIT, Width.THREE_BIT, Width.EIGHT_BIT), weight.device).unsqueeze(0)
    expected = _column_loop(weight, upper, max_code.unsqueeze(2), 32, None)
    result = quantize(weight.to(DEVICE), upper.to(DEVICE), max_code.to(DEVICE), 32, None)
    assert (result.codes.cpu() == expected.codes).float().mean() >= 0.99
    assert result.codes.amax((0, 2, 3)).tolist() == [1, 7, 255]


@pytest.mark.parametrize("value", [0.0, -0.37, -7e4, 1e30])
def test_weights_all_alike(value):
    weight = torch.full((1, 4, 32), value)
    result = quantize(weight.to(DEVICE), torch.eye(32, device=DEVICE)[None], torch.ones(1, 1, device=DEVICE), 32, None)
    assert all(torch.isfinite(t.float()).all() for t in result)
    expected = _column_loop(weight, torch.eye(32)[None], torch.ones(1, 1, 1), 32, None)
    assert torch.equal(dequantize(result).cpu(), dequantize(expected))


@pytest.mark.parametrize("columns", [96, 128, 160])
def test_factorization_in_blocks(columns):
    _, h = problem(3, 1, columns)
    h = (h + 0.01 * torch.eye(columns)).float()
    h[1, 3, 3] = -1.0
    expected, wrong = hessian._factor(h)
    result, failed = hessian._factor_in_blocks(h.clone(), 32)
    assert failed.tolist() == wrong.tolist() == [False, True, False]
    exact = torch.linalg.inv(h[[0, 2]].double())
    for upper in (expected, result):  # U^T U is the inverse
        upper = upper[[0, 2]].double()
        assert not upper.tril(-1).any()
        assert ((upper.mT @ upper - exact).norm() / exact.norm()).item() < 1e-4
