"""Trellis codes: rings of bits, the Viterbi encoder, its kernels, rotations and error feedback."""

from __future__ import annotations

from support.interpreted import DEVICE  # first: skips the module where triton is missing

# isort: split

import pytest
import torch

from gemq.errors import UserError
from gemq.quant import trellis, trellis_kernel
from gemq.quant.gptq import gptq
from gemq.quant.grid import dequantize
from gemq.quant.hessian import factorize
from gemq.quant.widths import Width
from support.gptq_problems import DAMPENING, objective, pick, problem

torch.set_num_threads(1)
ALL_EIGHTHS = range(trellis.MIN_EIGHTHS, trellis.MAX_EIGHTHS + 1)


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
        trellis.eighths(bits)
    assert trellis.eighths(2.375) == 19


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
    eighths, table = trellis.eighths(bits), trellis.byte_sum_table(12)
    result = trellis.decode(trellis.encode(x * gain, eighths, table), eighths, table) / gain
    assert ((x - result).square().mean() / x.square().mean()).item() == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize(("bits", "state_bits"), [(1, 8), (1.625, 9), (2.5, 8), (4, 10)])
def test_kernels_against_the_reference(bits, state_bits, monkeypatch):
    """Costs without their lowest bits choose other states where two are equal to six digits."""
    eighths, table = trellis.eighths(bits), trellis.byte_sum_table(state_bits).to(DEVICE)
    x = gaussians(3, 16, seed=4).to(DEVICE)
    monkeypatch.setattr(trellis_kernel, "MAX_BUFFER_BYTES", 2 * 2 * 16 << state_bits >> 5)  # two tiles a launch
    for overlap in (None, torch.tensor([1, 7, 12], device=DEVICE)):
        states, totals = trellis_kernel.viterbi(x, eighths, table, overlap)
        expected, expected_totals = trellis.viterbi(x, eighths, table, overlap)
        torch.testing.assert_close(totals, expected_totals, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close((x - table[states.long()]).square().sum(1), totals, rtol=1e-4, atol=1e-5)
        assert (states == expected).float().mean() > 0.6
        if overlap is not None:
            assert torch.equal(states[:, -1] & ((len(table) >> trellis.new_bits(eighths)[0]) - 1), overlap.int())


@pytest.mark.parametrize(("size", "block"), [(256, 128), (576, 64), (48, 16), (7, 1)])
def test_hadamard_blocks(size, block):
    identity = torch.eye(size)
    matrix = trellis.hadamard(identity)
    assert trellis.hadamard_block(size) == block
    torch.testing.assert_close(matrix @ matrix.T, identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(trellis.hadamard(matrix), identity, rtol=0, atol=1e-5)
    mask = torch.block_diag(*[torch.ones(block, block)] * (size // block)).bool()
    assert not matrix[~mask].any()
    torch.testing.assert_close(matrix[mask].abs(), torch.full((size * block,), block**-0.5))


def test_signs_are_random_and_repeatable():
    first, second = (trellis.random_signs((4, 500), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first.abs(), torch.ones(4, 500))
    assert (first.mean(1).abs() < 0.2).all()


def outlier_problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices with large columns and rows, and inputs with large channels."""
    weight, hessian = problem(experts=2, rows=96, columns=160)
    weight[:, :, 7] *= 30
    weight[:, 5] *= 20
    channel = torch.ones(160, dtype=torch.float64)
    channel[[3, 80]] = 50
    return weight, hessian * channel * channel.unsqueeze(1)


def test_rotated_matrices_look_gaussian_and_keep_their_products():
    weight, hessian = outlier_problem()
    vectors = trellis.incoherence(weight, hessian.diagonal(dim1=1, dim2=2), torch.Generator().manual_seed(0))
    rotated = trellis.rotate_weight(weight, vectors)
    torch.testing.assert_close(trellis.restore_weight(rotated, vectors), weight, rtol=1e-4, atol=1e-6)
    square = rotated.square()
    for blocks in (square.unflatten(1, (-1, 32)).mean((2, 3)), square.unflatten(2, (-1, 32)).mean((1, 3))):
        torch.testing.assert_close(blocks, torch.ones_like(blocks), rtol=0.01, atol=0)
    assert rotated.abs().amax() < 6 < 20 < (weight / weight.square().mean().sqrt()).abs().amax()

    x = torch.randn(2, 160, generator=torch.Generator().manual_seed(1))
    rotated_x = trellis.hadamard(vectors.inputs * x)
    product = vectors.outputs * trellis.hadamard((rotated @ rotated_x.unsqueeze(2)).squeeze(2))
    torch.testing.assert_close(product, (weight @ x.unsqueeze(2)).squeeze(2), rtol=1e-3, atol=1e-3)
    outer = x.unsqueeze(2) * x.unsqueeze(1)
    expected = rotated_x.unsqueeze(2) * rotated_x.unsqueeze(1)
    torch.testing.assert_close(trellis.rotate_hessian(outer, vectors), expected, rtol=1e-3, atol=1e-2)


def test_scales_do_not_depend_on_how_a_channel_is_scaled():
    """A channel of the inputs times a power of two, and its column divided by it: the same rotated matrix."""
    weight, hessian = problem(rows=32, columns=64)
    channel = torch.ones(64)
    channel[[3, 40]] = torch.tensor([64.0, 0.125])
    rotated = []
    for factor in (torch.ones(64), channel):
        diagonal = hessian.float().diagonal(dim1=1, dim2=2) * factor.square()
        vectors = trellis.incoherence(weight / factor, diagonal, torch.Generator().manual_seed(0))
        rotated.append(trellis.rotate_weight(weight / factor, vectors))
    torch.testing.assert_close(*rotated, rtol=1e-4, atol=1e-4)


def test_feedback_and_rotation_beat_scalar_codes():
    weight, hessian = outlier_problem()
    h = hessian.float()
    scalar = dequantize(pick(gptq(weight, factorize(h, DAMPENING).upper, (Width.TWO_BIT,), 32), 0))
    eighths, table = 16, trellis.byte_sum_table(10)
    vectors = trellis.incoherence(weight, hessian.diagonal(dim1=1, dim2=2), torch.Generator().manual_seed(0))
    rotated, rotated_h = trellis.rotate_weight(weight, vectors), trellis.rotate_hessian(h, vectors)
    words, values = trellis.quantize_ldlq(rotated, factorize(rotated_h, DAMPENING).upper, eighths, table)
    assert words.shape == (2, 6, 10, eighths)
    tiles = trellis.decode(words, eighths, table) / trellis.LDLQ_GAIN
    torch.testing.assert_close(tiles.unflatten(3, (16, 16)).transpose(2, 3).reshape(values.shape), values)

    identity = torch.eye(160).expand(2, -1, -1)
    _, unaware = trellis.quantize_ldlq(rotated, identity, eighths, table)
    restored, restored_unaware = (trellis.restore_weight(v, vectors) for v in (values, unaware))
    error = objective(weight, restored, hessian)
    assert (error < 0.8 * objective(weight, restored_unaware, hessian)).all()
    assert (error < 0.75 * objective(weight, scalar, hessian)).all()
    factors = trellis.refit_outputs(weight, restored, h)
    assert (objective(weight, restored * factors.unsqueeze(2), hessian) <= error * (1 + 1e-5)).all()


def test_a_matrix_without_weights_stays_zero():
    weight = torch.zeros(1, 16, 32)
    vectors = trellis.incoherence(weight, torch.zeros(1, 32), torch.Generator().manual_seed(0))
    rotated = trellis.rotate_weight(weight, vectors)
    _, values = trellis.quantize_ldlq(rotated, torch.eye(32).unsqueeze(0), 8, trellis.byte_sum_table(8))
    assert trellis.restore_weight(values, vectors).abs().max() < 1e-6


def test_matrices_that_tiles_do_not_fit():
    with pytest.raises(UserError, match="24 x 32 weights cannot be cut into tiles"):
        trellis.quantize_ldlq(torch.zeros(1, 24, 32), torch.eye(32).unsqueeze(0), 16, trellis.byte_sum_table(8))
