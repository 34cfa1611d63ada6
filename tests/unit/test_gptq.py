"""GPTQ against a column-by-column float64 reference written here, and grids against plain min/max rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemq.quant.gptq import LLOYD_ROUNDS, WIDER, fit_grid, gptq, gptq_mixed, round_to_nearest
from gemq.quant.grid import Quantized, dequantize, nearest
from gemq.quant.hessian import factorize
from gemq.quant.widths import Width
from support.gptq_problems import ALL, DAMPENING, inputs, objective, pick, problem

torch.set_num_threads(1)

# The reference: one matrix, float64, an explicit inverse that shrinks by one column at a time.


def reference_grid(w: Tensor, levels: int, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset [R] of weights [R, G]: rounding and weighted regression in turn, row by row."""
    scales, offsets = [], []
    weights = importance / importance.sum()
    for row in w:
        scale, offset = (row.max() - row.min()) / (levels - 1), row.min()
        for _ in range(LLOYD_ROUNDS):
            code = ((row - offset) / (scale if scale > 0 else 1)).round().clamp(0, levels - 1)
            mean_code, mean_w = (weights * code).sum(), (weights * row).sum()
            variance = (weights * (code - mean_code) ** 2).sum()
            if variance > 1e-12:
                slope = (weights * (code - mean_code) * (row - mean_w)).sum() / variance
                scale = slope if slope > 0 else scale
            offset = mean_w - scale * mean_code
        # codes are chosen for what is stored, and so is the offset, once the scale is known
        stored, _ = nearest(scale * (WIDER if levels > 16 else 1), offset, levels - 1)
        offset = mean_w - stored * mean_code if stored < 1.2 * scale else offset
        scale, offset = nearest(stored, offset, levels - 1)
        scales.append(scale.double())
        offsets.append(offset.double())
    return torch.stack(scales), torch.stack(offsets)


def reference_gptq(weight: Tensor, hessian: Tensor, levels: int, group_size: int) -> tuple[Tensor, Tensor]:
    """(codes, dequantized) [R, C] by the textbook update (Frantar et al., algorithm 1, with no blocks)."""
    w = weight.double().clone()
    columns = w.shape[1]
    damped = hessian.double() + DAMPENING * hessian.double().diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverses = [torch.linalg.inv(damped)]
    for j in range(columns - 1):  # eliminate column j: Gaussian elimination on the inverse
        h = inverses[-1]
        inverses.append(h - torch.outer(h[:, j], h[j, :]) / h[j, j])
    pivots = torch.stack([inverses[j][j, j] for j in range(columns)])
    codes, values = torch.zeros_like(w), torch.zeros_like(w)
    for j in range(columns):
        if j % group_size == 0:
            group = slice(j, j + group_size)
            scale, offset = reference_grid(w[:, group], levels, 1 / pivots[group])
        codes[:, j] = ((w[:, j] - offset) / scale).round().clamp(0, levels - 1)
        values[:, j] = offset + scale * codes[:, j]
        error = (w[:, j] - values[:, j]) / inverses[j][j, j]
        w[:, j + 1 :] -= torch.outer(error, inverses[j][j, j + 1 :])
    return codes, values


@pytest.mark.parametrize(("columns", "group_size"), [(64, 16), (96, 32), (128, 64), (128, 128)])
def test_against_float64_reference(columns, group_size):
    """Measured: every code equal, objective to 4e-4 (where float32 puts one fp16 scale on the other side)."""
    weight, hessian = problem(columns=columns, seed=columns + group_size)
    q = gptq(weight, factorize(hessian.float(), DAMPENING).upper, ALL, group_size)
    for i, width in enumerate(ALL):
        equal = total = 0
        ours = theirs = 0.0
        for e in range(len(weight)):
            codes, values = reference_gptq(weight[e], hessian[e], width.levels, group_size)
            equal += int((codes == q.codes[i, e]).sum())
            total += codes.numel()
            ours += objective(weight[e], dequantize(pick(q, i, e)), hessian[e]).item()
            theirs += objective(weight[e], values, hessian[e]).item()
        assert equal >= 0.99 * total, (width, equal / total)
        assert ours == pytest.approx(theirs, rel=1e-3), width


def test_batched_experts_equal_one_by_one():
    weight, hessian = problem(experts=3)
    upper = factorize(hessian.float(), DAMPENING).upper
    batched = gptq(weight, upper, ALL, 32)
    for e in range(3):
        single = gptq(weight[e : e + 1], upper[e : e + 1], ALL, 32)
        for a, b in zip(single, batched, strict=True):
            torch.testing.assert_close(a[:, 0], b[:, e], rtol=0, atol=0)


def test_widths_together_equal_widths_apart():
    weight, hessian = problem()
    upper = factorize(hessian.float(), DAMPENING).upper
    batched = gptq(weight, upper, ALL, 32)
    rounded = round_to_nearest(weight, ALL, 32)
    for i, width in enumerate(ALL):
        for all_widths, single in (
            (batched, gptq(weight, upper, (width,), 32)),
            (rounded, round_to_nearest(weight, (width,), 32)),
        ):
            for a, b in zip(single, all_widths, strict=True):
                torch.testing.assert_close(a[0], b[i], rtol=0, atol=0)


@pytest.mark.parametrize("width", ALL)
def test_error_feedback_pays(width):
    """The point of GPTQ, at every width; the prototype without feedback inside a block at 1 bit missed it."""
    weight, hessian = problem(experts=4, rows=32, seed=3)
    with_feedback = gptq(weight, factorize(hessian.float(), DAMPENING).upper, (width,), 32)
    without = round_to_nearest(weight, (width,), 32)
    gain = objective(weight, dequantize(pick(with_feedback, 0)), hessian) / objective(
        weight, dequantize(pick(without, 0)), hessian
    )
    assert (gain < 0.9).all(), gain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shapes_types_and_inputs_untouched(dtype):
    weight, hessian = problem()
    weight = weight.to(dtype)
    original = weight.clone()
    q = gptq(weight, factorize(hessian.float(), DAMPENING).upper, (Width.ONE_BIT, Width.THREE_BIT), 16)
    assert torch.equal(weight, original)
    assert (q.codes.shape, q.codes.dtype) == ((2, 2, 12, 64), torch.uint8)
    assert q.scales.shape == q.offsets.shape == (2, 2, 12, 4)
    assert q.scales.dtype == q.offsets.dtype == torch.float32
    assert q.codes[0].max() <= 1
    assert q.codes[1].max() <= 7


def assert_sane(q: Quantized) -> None:
    """Every part finite, scales not negative, codes in range."""
    for i, width in enumerate(ALL):
        assert torch.isfinite(q.scales[i]).all()
        assert torch.isfinite(q.offsets[i]).all()
        assert (q.scales[i] > 0).all()
        assert all(map(torch.equal, nearest(q.scales[i], q.offsets[i], width.max_code), pick(q, i)[1:]))
        assert q.codes[i].max().item() < width.levels
        assert torch.isfinite(dequantize(pick(q, i))).all()
        assert torch.isfinite(dequantize(pick(q, i), torch.bfloat16)).all()


@pytest.mark.parametrize(
    "case",
    ["few tokens", "one token", "no token", "dead columns", "dead block", "equal columns", "zero hessian"],
)
def test_hessians_that_are_not_regular(case):
    weight, hessian = problem()
    columns = weight.shape[-1]
    if case.endswith(("tokens", "token")):
        x = inputs(2, {"few tokens": 5, "one token": 1, "no token": 0}[case], columns)
        hessian = x.mT @ x
    elif case == "dead columns":
        hessian[:, 5], hessian[:, :, 5] = 0, 0
    elif case == "dead block":
        hessian[:, 16:48], hessian[:, :, 16:48] = 0, 0
    elif case == "equal columns":
        hessian = torch.ones_like(hessian)
    elif case == "zero hessian":
        hessian = torch.zeros_like(hessian)
    q = gptq(weight, factorize(hessian.float(), DAMPENING).upper, ALL, 16)
    assert_sane(q)
    if case in ("no token", "zero hessian"):  # nothing to feed back: plain rounding
        for a, b in zip(q, round_to_nearest(weight, ALL, 16), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    if case == "dead columns":  # a dead input changes no other weight and is itself only rounded
        alive = torch.arange(columns) != 5
        assert objective(weight, dequantize(pick(q, 5)), hessian).max() < 1e-3
        assert (dequantize(pick(q, 5)) - weight)[..., ~alive].abs().max() < q.scales[5].float().max()


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-12, 1e12, 1e30])
def test_size_of_inputs_does_not_matter(size):
    """Activations near float32's limits: only ratios inside a Hessian count."""
    weight, hessian = problem()
    reference = gptq(weight, factorize(hessian.float(), DAMPENING).upper, ALL, 16)
    q = gptq(weight, factorize((hessian * size).float(), DAMPENING).upper, ALL, 16)
    assert_sane(q)
    if size >= 1e-30:  # below, float32 itself keeps only a few bits
        assert (q.codes == reference.codes).float().mean() > 0.99


@pytest.mark.parametrize("round_only", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.37, 1e-9, 65504.0, -7e4, 1e30])
def test_weights_all_alike(value, round_only):
    weight, hessian = problem()
    weight = torch.full_like(weight, value)
    upper = factorize(hessian.float(), DAMPENING).upper
    q = round_to_nearest(weight, ALL, 16) if round_only else gptq(weight, upper, ALL, 16)
    assert_sane(q)
    if abs(value) <= 100 and round_only:
        for i in range(len(ALL)):  # the offset alone says it, in 128ths of a span that reaches to zero and twice as far
            torch.testing.assert_close(dequantize(pick(q, i)), weight, rtol=1e-2, atol=2**-25)


@pytest.mark.parametrize("round_only", [False, True])
def test_one_group_of_zeros(round_only):
    weight, hessian = problem()
    weight[:, 3, 16:32] = 0
    upper = factorize(torch.eye(64).expand(2, -1, -1).clone(), DAMPENING).upper  # no feedback into the zeros
    q = round_to_nearest(weight, ALL, 16) if round_only else gptq(weight, upper, ALL, 16)
    assert_sane(q)
    for i in range(len(ALL)):
        assert (dequantize(pick(q, i))[:, 3, 16:32] == 0).all()
    assert_sane(gptq(weight, factorize(hessian.float(), DAMPENING).upper, ALL, 16))


@pytest.mark.parametrize("size", [1e-30, 1e-9, 3e-7, 1e-4, 1e3, 6e4, 1e6, 1e20, 1e35])
def test_tiny_and_huge_weights(size):
    """Outside what scales can say, weights saturate (or vanish); they never become NaN or infinite."""
    weight, hessian = problem()
    weight = weight * (size / 0.05)
    for q in (gptq(weight, factorize(hessian.float(), DAMPENING).upper, ALL, 16), round_to_nearest(weight, ALL, 16)):
        assert_sane(q)
        if 1e-4 <= size <= 1e3:
            assert (dequantize(pick(q, 5)) - weight).norm() < 0.02 * weight.norm()


def test_one_outlier_keeps_the_rest_finite():
    weight, hessian = problem()
    weight[0, 0, 7] = 1e6
    assert_sane(gptq(weight, factorize(hessian.float(), DAMPENING).upper, ALL, 16))


def test_one_bit_has_two_free_levels():
    """A bimodal row: both levels land on the two means, far from symmetric about zero."""
    generator = torch.Generator().manual_seed(0)
    high = torch.rand(64, generator=generator) < 0.3
    row = torch.where(high, 2.0, 0.5) + 0.05 * torch.randn(64, generator=generator)
    q = round_to_nearest(row.view(1, 1, 64), (Width.ONE_BIT,), 64)
    scale, offset = q.scales.float().item(), q.offsets.float().item()
    assert torch.equal(q.codes.flatten().bool(), high)
    # the best two levels are the means of the two modes; their distance has eight steps an octave
    low, up = row[~high].mean().item(), row[high].mean().item()
    assert offset == pytest.approx(low, abs=(up - low) / 16)
    assert offset + scale == pytest.approx(up, abs=(up - low) / 16)


def test_one_bit_is_a_local_optimum_of_k_means():
    """On any row: levels are the means of their members and members are nearest to their level."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(1, 50, 32, generator=generator)
    q = round_to_nearest(rows, (Width.ONE_BIT,), 32)
    settled = 0
    for row, code, scale, offset in zip(
        rows[0], q.codes[0, 0].bool(), q.scales.flatten(), q.offsets.flatten(), strict=True
    ):
        low, high = offset.float(), offset.float() + scale.float()
        assert torch.equal(code, (row - high).abs() < (row - low).abs())
        fits = abs(row[~code].mean() - low) < 0.08 and abs(row[code].mean() - high) < 0.08
        settled += bool(fits)
    assert settled >= 45  # six rounds leave a few rows one member away


@pytest.mark.parametrize("width", ALL[:-1])
def test_fit_uses_importance(width):
    """Weights that matter more are fitted better than without importance."""
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(1, 3, 40, 32, generator=generator)
    importance = torch.rand(3, 1, 32, generator=generator).pow(4) + 1e-3
    max_code = torch.tensor([float(width.max_code)])

    def weighted_error(scale: Tensor, offset: Tensor) -> Tensor:
        code = ((w - offset[..., None]) / scale[..., None]).round().clamp(0, max_code.item())
        error = w - offset[..., None] - scale[..., None] * code
        return (importance * error.square()).sum()

    assert weighted_error(*fit_grid(w, max_code, importance)) < 0.95 * weighted_error(*fit_grid(w, max_code, None))


@pytest.mark.parametrize("width", ALL)
@pytest.mark.parametrize("kind", ["normal", "uniform", "heavy", "skewed", "two values", "shifted"])
def test_fit_is_never_worse_than_min_max(kind, width):
    """Property over many random groups: alternating projections only go down, then both grids are rounded to bytes.

    That rounding alone decides where the smallest and largest weight fit exactly, or where groups are far from zero.
    """
    generator = torch.Generator().manual_seed(int(10 * width.value))
    w = torch.randn(1, 1, 400, 32, generator=generator, dtype=torch.float32)
    w = {
        "normal": w,
        "uniform": torch.rand(w.shape, generator=generator),
        "heavy": w**3,
        "skewed": w.exp(),
        "two values": w.sign() * 0.3 + 0.1,
        "shifted": w * 0.1 + 1,
    }[kind]
    importance = torch.rand(1, 1, 32, generator=generator) + 0.01
    max_code = torch.tensor([float(width.max_code)])

    def weighted_error(scale: Tensor, offset: Tensor) -> Tensor:
        scale, offset = scale[..., None], offset[..., None]
        step = torch.where(scale > 0, scale, torch.ones_like(scale))
        code = ((w - offset) / step).round().clamp(0, max_code.item())
        return (importance * (w - offset - scale * code).square()).sum(-1) / importance.sum()

    low, high = w.amin(-1), w.amax(-1)
    plain = weighted_error(*nearest((high - low) / max_code.item(), low, max_code.item()))
    fitted = weighted_error(*fit_grid(w, max_code, importance))
    bound = 1.1 if kind in ("two values", "shifted") else 1.0
    assert fitted.mean() <= plain.mean() * bound + 1e-9


def test_a_width_for_each_expert():
    weight, hessian = problem(experts=len(ALL))
    upper = factorize(hessian.float(), DAMPENING).upper
    mixed, all_widths = gptq_mixed(weight, upper, ALL, 32), gptq(weight, upper, ALL, 32)
    for e in range(len(ALL)):
        for a, b in zip(mixed, all_widths, strict=True):
            torch.testing.assert_close(a[e], b[e, e], rtol=0, atol=0)


def test_soft_codes_are_codes_before_rounding():
    weight, hessian = problem()
    upper = factorize(hessian.float(), DAMPENING).upper
    soft_codes = torch.full((len(ALL), *weight.shape), float("nan"))
    q = gptq(weight, upper, ALL, 32, soft_codes)
    for a, b in zip(q, gptq(weight, upper, ALL, 32), strict=True):
        assert torch.equal(a, b)
    for i, width in enumerate(ALL):
        assert torch.equal(soft_codes[i].round().clamp(0, width.max_code), q.codes[i].float())
