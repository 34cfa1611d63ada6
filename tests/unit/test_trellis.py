"""Trellis codes: rings of bits, the Viterbi encoder, its kernels, rotations and error feedback."""

from __future__ import annotations

from support.interpreted import DEVICE  # first: skips the module where triton is missing

# isort: split

import pytest
import torch

from gemq.errors import UserError
from gemq.quant import trellis, trellis_feedback, trellis_kernel
from gemq.quant.gptq import gptq
from gemq.quant.grid import dequantize
from gemq.quant.hessian import factorize
from gemq.quant.rotation import block_side, rotate, rotate_back, rotate_hessian
from gemq.quant.trellis_matrix import TrellisMatrix
from gemq.quant.trellis_quantize import quantize, rotated_problem
from gemq.quant.widths import MAX_EIGHTHS, MIN_EIGHTHS, TrellisWidth, Width
from support.gptq_problems import DAMPENING, objective, pick, problem

torch.set_num_threads(1)
ALL_EIGHTHS = range(MIN_EIGHTHS, MAX_EIGHTHS + 1)


def gaussians(tiles: int, weights: int = trellis.TILE_WEIGHTS, seed: int = 0) -> torch.Tensor:
    return torch.randn(tiles, weights, generator=torch.Generator().manual_seed(seed))


def rings(tiles: int, words: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(words)
    return torch.randint(-(2**31), 2**31, (tiles, words), generator=generator).to(torch.int32)


def test_states_are_bits_of_the_ring():
    """Against strings of zeros and ones, at all widths."""
    for eighths in ALL_EIGHTHS:
        words = rings(1, eighths)
        ring = "".join(f"{word & 0xFFFFFFFF:032b}" for word in words[0].tolist())
        states = trellis.unpack(words, eighths, 13)[0].tolist()
        assert len(ring) == trellis.TILE_WEIGHTS * eighths // 8
        assert len(states) == trellis.TILE_WEIGHTS
        for t, state in enumerate(states):
            end = int((t + 1) * eighths / 8) + len(ring)
            assert state == int((ring * 2)[end - 13 : end], 2)


def test_packing_restores_any_ring():
    for eighths in ALL_EIGHTHS:
        words = rings(3, eighths)
        assert torch.equal(trellis.pack(trellis.unpack(words, eighths, 12), eighths), words)


@pytest.mark.parametrize("bits", [0.875, 1.1, 4.125, float("nan"), 1e9])
def test_widths_that_do_not_exist(bits):
    with pytest.raises(UserError, match=r"choose a multiple of 0\.125 from 1 to 4"):
        TrellisWidth.read(bits)
    assert TrellisWidth.read(2.375) == 2.375


@pytest.mark.parametrize("eighths", [8, 11, 12])
def test_search_against_all_rings(eighths):
    """Rings of 8 weights with 16 states. Over all overlaps, the constrained search finds the best ring of all."""
    table = gaussians(1, 16, seed=1)[0]
    x = gaussians(20, 8, seed=2)
    ring = torch.arange(1 << eighths)
    ends = torch.arange(1, 9) * eighths // 8
    doubled = ring << eighths | ring
    values = table[(doubled.unsqueeze(1) >> (eighths - ends)) & 15]  # [rings, 8]
    errors = (x.unsqueeze(1) - values).square().sum(2)
    best = errors.amin(1)
    first_step = trellis.new_bits(eighths)[0]
    overlaps = [torch.full((len(x),), overlap) for overlap in range(16 >> first_step)]
    searched = torch.stack([trellis.viterbi(x, eighths, table, overlap)[1] for overlap in overlaps])
    torch.testing.assert_close(searched.amin(0), best)

    states = trellis.encode_states(x, eighths, table)
    previous = states.roll(1, 1)
    steps = torch.tensor(trellis.new_bits(eighths))
    assert torch.equal(states >> steps, previous & ((16 >> steps) - 1)), "not a ring"
    error = (x - table[states.long()]).square().sum(1)
    assert (error >= best - 1e-5).all()
    assert error.sum() < 1.15 * best.sum()  # the first pass guesses the overlap, and so short a ring has much of it


@pytest.mark.parametrize(("bits", "gain", "expected"), [(1.5, 1.04, 0.1426), (2, 0.98, 0.0725), (3, 0.94, 0.0189)])
def test_error_on_gaussians(bits, gain, expected):
    """Mean squared errors of 98,000 weights. Scalar codes of 2 and 3 bits have 0.1175 and 0.0345."""
    x = gaussians(24)
    eighths, table = TrellisWidth.read(bits).eighths, trellis.byte_sum_table(12)
    result = trellis.decode(trellis.encode(x * gain, eighths, table), eighths, table) / gain
    assert ((x - result).square().mean() / x.square().mean()).item() == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize(("bits", "state_bits"), [(1, 8), (1.625, 9), (2.5, 8), (4, 10)])
def test_kernels_against_the_reference(bits, state_bits, monkeypatch):
    """Costs without their lowest bits choose other states where two are equal to six digits."""
    eighths, table = TrellisWidth.read(bits).eighths, trellis.byte_sum_table(state_bits).to(DEVICE)
    x = gaussians(3, 16, seed=4).to(DEVICE)
    monkeypatch.setattr(trellis_kernel, "SEARCH_BYTES", 2 * 2 * 16 << state_bits >> 5)  # two tiles a launch
    for overlap in (None, torch.tensor([1, 7, 12], device=DEVICE)):
        states, totals = trellis_kernel.viterbi(x, eighths, table, overlap)
        expected, expected_totals = trellis.viterbi(x, eighths, table, overlap)
        torch.testing.assert_close(totals, expected_totals, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close((x - table[states.long()]).square().sum(1), totals, rtol=1e-4, atol=1e-5)
        assert (states == expected).float().mean() > 0.6
        if overlap is not None:
            assert torch.equal(states[:, -1] & ((len(table) >> trellis.new_bits(eighths)[0]) - 1), overlap.int())


@pytest.mark.parametrize(("size", "side"), [(256, 128), (576, 64), (48, 16)])
def test_rotation_blocks(size, side):
    assert block_side(size) == side
    matrix = rotate(torch.eye(size)).T
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), rtol=0, atol=1e-5)
    torch.testing.assert_close(rotate_back(matrix.T), torch.eye(size), rtol=0, atol=1e-5)
    mask = torch.block_diag(*[torch.ones(side, side)] * (size // side)).bool()
    assert not matrix[~mask].any()
    torch.testing.assert_close(matrix[mask].abs(), torch.full((size * side,), side**-0.5))
    mean = rotate(torch.ones(size)).abs()  # no input takes up the mean of a block
    assert mean.max() <= 0.5 * side**0.5


def test_a_rotated_matrix_has_the_products_of_the_original():
    weight, _ = problem(experts=2, rows=96, columns=160)
    x = torch.randn(2, 160, generator=torch.Generator().manual_seed(1))
    product = rotate(weight) @ rotate(x).unsqueeze(2)
    torch.testing.assert_close(product, weight @ x.unsqueeze(2), rtol=1e-3, atol=1e-3)
    outer = x.unsqueeze(2) * x.unsqueeze(1)
    rotated_outer = rotate(x).unsqueeze(2) * rotate(x).unsqueeze(1)
    torch.testing.assert_close(rotate_hessian(outer), rotated_outer, rtol=1e-3, atol=1e-3)


def test_trellis_codes_beat_scalar_codes():
    weight, hessian = problem(experts=2, rows=96, columns=160)
    h = hessian.float()
    scalar = dequantize(pick(gptq(weight, factorize(h, DAMPENING).upper, (Width.TWO_BIT,), 32), 0))
    matrix = quantize(rotated_problem(weight, h, DAMPENING), TrellisWidth(16))
    unaware = quantize(rotated_problem(weight, torch.eye(160).expand(2, -1, -1), DAMPENING), TrellisWidth(16))
    error = objective(weight, matrix.dequantize(), hessian)
    assert (error < 0.8 * objective(weight, unaware.dequantize(), hessian)).all()
    assert (error < 0.75 * objective(weight, scalar, hessian)).all()
    assert matrix.nbytes == 2 * TrellisWidth(16).matrix_bytes(96, 160)


def test_feedback_between_rows_lowers_the_error_of_the_outputs(monkeypatch):
    """The cost is tr(D^T G D H)."""
    monkeypatch.setattr(trellis, "STATE_BITS", 8)
    weight, hessian = problem(experts=2, rows=48, columns=96)
    _, outputs = problem(experts=2, rows=16, columns=48)
    inputs, outputs = hessian.float(), outputs.float()

    def cost(matrix: TrellisMatrix) -> torch.Tensor:
        error = matrix.dequantize() - weight
        return (outputs @ error @ inputs * error).sum((1, 2))

    unaware = quantize(rotated_problem(weight, inputs, DAMPENING), TrellisWidth(16))
    aware = quantize(rotated_problem(weight, inputs, DAMPENING, outputs), TrellisWidth(16))
    assert (cost(aware) < 0.88 * cost(unaware)).all()
    no_outputs = rotated_problem(weight, inputs, DAMPENING, torch.zeros_like(outputs))
    assert quantize(no_outputs, TrellisWidth(16)).dequantize().isfinite().all()


def test_feedback_between_rows_without_interaction_is_that_between_columns(monkeypatch):
    monkeypatch.setattr(trellis_feedback, "OUTPUT_LDLQ_GAIN", trellis_feedback.LDLQ_GAIN)
    weight, hessian = problem(experts=2, rows=48, columns=64)
    upper, table = factorize(hessian.float(), DAMPENING).upper, trellis.byte_sum_table(8)
    words, values = trellis_feedback.quantize_ldlq(weight, upper, 13, table)
    identity = torch.eye(48).expand(2, -1, -1)
    both_words, both_values = trellis_feedback.quantize_ldlq_both(weight, upper, identity, 13, table)
    assert torch.equal(both_words, words)
    assert torch.equal(both_values, values)


def test_packed_tiles_are_in_rows_of_tiles():
    words = rings(6, 20).view(2, 3, 20)
    scales = torch.tensor([0.5, 2.0]).repeat(16)
    matrix = TrellisMatrix.pack(words, scales, TrellisWidth(20), 12)
    assert matrix.codes.shape == (2, 3 * 80)
    assert torch.equal(matrix.words(), words)
    tile = trellis.decode(words[1, 2], 20, trellis.byte_sum_table(12)).view(16, 16)
    assert torch.equal(matrix.values()[16:, 32:], tile)
    expected = rotate_back(matrix.values()) * scales.unsqueeze(1)
    assert torch.equal(matrix.dequantize(), expected)
    batch = matrix.map(lambda tensor: torch.stack([tensor, tensor]))
    assert torch.equal(batch.dequantize()[1], expected)
    assert torch.equal(TrellisMatrix.from_tensors(matrix.named("m"), "m", TrellisWidth(20), 12).codes, matrix.codes)


def test_a_matrix_without_weights_stays_zero():
    weight = torch.zeros(1, 16, 32)
    matrix = quantize(rotated_problem(weight, torch.zeros(1, 32, 32), DAMPENING), TrellisWidth(8))
    assert matrix.dequantize().abs().max() < 1e-6


def test_matrices_that_tiles_do_not_fit():
    with pytest.raises(UserError, match="24 x 32 weights cannot be cut into tiles"):
        trellis_feedback.quantize_ldlq(
            torch.zeros(1, 24, 32), torch.eye(32).unsqueeze(0), 16, trellis.byte_sum_table(8)
        )
