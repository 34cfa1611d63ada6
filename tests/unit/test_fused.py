"""The kernel that takes a training step, against the plain matrices under torch's AdamW."""

from __future__ import annotations

from support.interpreted import DEVICE  # first: skips the module where triton is missing

# isort: split

import pytest
import torch
from torch import Tensor

from gemq.layers.training import Optimizer
from gemq.quant.gptq import max_codes
from gemq.quant.grid import Quantized, dequantize, nearest
from gemq.quant.trainable import MARGIN, TrainableMatrices
from gemq.quant.trainable_gpu import INT16_STEPS, FusedMatrices, StepSchedule, decode_soft_codes
from gemq.quant.widths import Width

torch.set_num_threads(1)
WIDTHS = (Width.ONE_BIT, Width.TWO_BIT, Width.THREE_BIT)
STEPS = 12
ROWS, COLUMNS, GROUP = 6, 96, 32


def start(seed: int = 0) -> tuple[Quantized, Tensor, Tensor]:
    """Grids, soft_codes that round to their codes, and max_code codes of three matrices of different widths."""
    generator = torch.Generator().manual_seed(seed)
    max_code = max_codes(WIDTHS, torch.device("cpu"))
    codes = (torch.rand(3, ROWS, COLUMNS, generator=generator) * (max_code.view(-1, 1, 1) + 1)).floor()
    jitter = (torch.rand(codes.shape, generator=generator) - 0.5) * 0.9
    grid = [torch.rand(3, ROWS, COLUMNS // GROUP, generator=generator).add(0.5) for _ in range(2)]
    grid = nearest(grid[0], -grid[1], max_code.view(-1, 1, 1))
    return Quantized(codes.to(torch.uint8), *grid), codes + jitter, max_code


def target(seed: int = 1) -> Tensor:
    return torch.randn(3, ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def encoded(soft_codes: Tensor, max_code: Tensor) -> Tensor:
    """Soft codes [..., R, C] float32 as int16. ``max_code`` broadcasts."""
    position = (soft_codes + MARGIN) * (INT16_STEPS / (max_code + 2 * MARGIN))
    return (position.round().clamp(0, INT16_STEPS) - 32768).to(torch.int16)


def constant(codes: float, grids: float, steps: int = STEPS) -> StepSchedule:
    """Steps at one learning rate of codes and one of grids."""
    return StepSchedule.create(codes, grids, [1.0] * steps, torch.zeros((), dtype=torch.int64, device=DEVICE))


def trained_plainly(by_range: bool) -> TrainableMatrices:
    q, soft_codes, max_code = start()
    matrices = TrainableMatrices(q, max_code, soft_codes, by_range)
    assert matrices.soft_codes is not None
    optimizer = Optimizer((([matrices.soft_codes], 2e-2), (matrices.grids(), 3e-3)), [1.0] * STEPS)
    for number in range(STEPS):
        loss = (matrices.weight() - target()).square().sum()
        optimizer.step(loss * (1 + number % 3))
        matrices.keep_in_range()
    return matrices


def trained_fused(by_range: bool, fixed: bool, compute: torch.dtype = torch.float32) -> FusedMatrices:
    q, soft_codes, max_code = start()
    if fixed:
        soft_codes = encoded(soft_codes, max_code.view(-1, 1, 1))
    q = Quantized(*(t.to(DEVICE) for t in q))
    matrices = FusedMatrices(q, max_code.to(DEVICE), soft_codes.to(DEVICE), compute, by_range)
    assert torch.equal(matrices.weight().detach(), dequantize(q, compute))
    steps = constant(2e-2, 3e-3)
    for number in range(STEPS):
        ((matrices.weight().float() - target().to(DEVICE)).square().sum() * (1 + number % 3)).backward()
        matrices.step(steps)
        steps.step_index.add_(1)
        matrices.keep_in_range()
        assert matrices.leaf.grad is None
    return matrices


def test_a_matrix_is_rounded_alike_whichever_others_are_trained_with_it():
    """Experts are trained some at a time, or by several ranks."""
    q, soft_codes, max_code = start()
    soft_codes = encoded(soft_codes, max_code.view(-1, 1, 1))

    def trained(selection: slice, numbers: Tensor | None) -> Tensor:
        selected = Quantized(*(t[selection].to(DEVICE) for t in q))
        arguments = max_code[selection].to(DEVICE), soft_codes[selection].to(DEVICE, copy=True), torch.bfloat16
        matrices = FusedMatrices(selected, *arguments, matrix_ids=None if numbers is None else numbers.to(DEVICE))
        steps = constant(2e-2, 3e-3)
        for _ in range(4):
            (matrices.weight().float() - target()[selection].to(DEVICE)).square().sum().backward()
            matrices.step(steps)
            steps.step_index.add_(1)
        return matrices.state.soft_codes

    all_trained = trained(slice(None), None)
    assert torch.equal(trained(slice(1, 3), torch.tensor([1, 2])), all_trained[1:])
    assert not torch.equal(trained(slice(1, 3), None), all_trained[1:])


@pytest.mark.parametrize("by_range", [False, True])
def test_steps_are_adamws(by_range):
    plain, fused = trained_plainly(by_range), trained_fused(by_range, fixed=False)
    assert plain.soft_codes is not None
    expected = (plain.soft_codes / plain.unit).detach()
    assert (expected - start()[1]).abs().max() > 0.05
    torch.testing.assert_close(fused.state.soft_codes.cpu(), expected, rtol=0, atol=2e-4)
    for ours, theirs in zip(fused.state.changes, plain.grids(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.detach(), rtol=0, atol=1e-5)
    fused_result, plain_result = (Quantized(*(t.cpu() for t in m.result())) for m in (fused, plain))
    assert (fused_result.codes == plain_result.codes).float().mean() > 0.995
    torch.testing.assert_close(fused_result.scales, plain_result.scales, rtol=2e-3, atol=0)
    torch.testing.assert_close(fused.weight().detach().cpu(), dequantize(fused_result))


def test_sixteen_bits_are_close_to_float32():
    """Latents to parts of 1e-4 of their range, moments to 2^-9: far less than what a step moves."""
    exact, fused = trained_fused(True, fixed=False), trained_fused(True, fixed=True)
    assert fused.state.soft_codes.dtype == torch.int16
    assert {t.dtype for t in fused.state.moments} == {torch.bfloat16}
    max_code = fused.max_code.view(-1, 1, 1)
    difference = (decode_soft_codes(fused.state.soft_codes, max_code) - exact.state.soft_codes).abs()
    moved = (exact.state.soft_codes.cpu() - start()[1]).abs().mean()
    assert difference.mean().cpu() < 0.02 * moved
    assert (fused.result().codes == exact.result().codes).float().mean() > 0.99


def test_steps_smaller_than_a_part_count_on_average():
    codes = torch.ones(1, 64, 32, dtype=torch.uint8, device=DEVICE)
    grid = torch.ones(1, 64, 1, device=DEVICE)
    max_code = torch.full((1,), 3.0, device=DEVICE)
    matrices = FusedMatrices(Quantized(codes, grid, grid), max_code, encoded(codes.float(), max_code), torch.float32)
    int16_step = 3.8 / 65535
    initial = decode_soft_codes(matrices.state.soft_codes, max_code).mean().item()
    steps = constant(int16_step / 10, 0.0, 20)
    for _ in range(20):
        matrices.weight().sum().backward()
        matrices.step(steps, seed=3)
        steps.step_index.add_(1)
    moved = initial - decode_soft_codes(matrices.state.soft_codes, max_code).mean().item()
    assert moved == pytest.approx(2 * int16_step, rel=0.1)  # Adam's steps of equal gradients are the rate


def test_soft_codes_stay_in_range_in_bfloat16():
    q, soft_codes, max_code = start()
    q = Quantized(*(t.to(DEVICE) for t in q))
    fixed = encoded(soft_codes, max_code.view(-1, 1, 1)).to(DEVICE)
    matrices = FusedMatrices(q, max_code.to(DEVICE), fixed, torch.bfloat16)
    (matrices.weight().float() * torch.sign(target()).to(DEVICE)).sum().backward()
    matrices.step(constant(100.0, 0.0, 1))
    result = matrices.result()
    expected = torch.where(target() > 0, torch.zeros(1), max_code.view(-1, 1, 1)).to(torch.uint8)
    assert torch.equal(result.codes.cpu(), expected)
    # Triton's interpreter cuts bfloat16 off where a GPU rounds
    torch.testing.assert_close(matrices.weight().detach().float(), dequantize(result), rtol=2**-7, atol=2**-12)
