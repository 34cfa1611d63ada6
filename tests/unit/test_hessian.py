"""HessianAccumulator, what becomes of experts that saw few tokens, and the factor that GPTQ takes."""

from __future__ import annotations

import pytest
import torch

from gemq.quant.hessian import HessianAccumulator, factorize

torch.set_num_threads(1)


def rows(*counts: int, columns: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(sum(counts), columns, generator=torch.Generator().manual_seed(seed))


def filled(counts: list[int], shuffle: bool = False) -> tuple[HessianAccumulator, list[torch.Tensor]]:
    moments = HessianAccumulator(len(counts), 16, torch.device("cpu"))
    x = rows(*counts)
    moments.add(x, torch.tensor(counts).cumsum(0))
    return moments, list(x.double().split(counts))


def test_sums_and_counts():
    moments, inputs = filled([3, 0, 7])
    extra_rows = rows(1, 2, 0, seed=1)
    moments.add(extra_rows.bfloat16(), torch.tensor([1, 3, 3], dtype=torch.int32))
    extra = extra_rows.bfloat16().double().split([1, 2, 0])
    assert moments.counts.tolist() == [4, 2, 7]
    for e in range(3):
        expected = inputs[e].T @ inputs[e] + extra[e].T @ extra[e]
        torch.testing.assert_close(moments.sums[e].double(), expected, rtol=1e-5, atol=1e-5)


def test_nothing_to_add():
    moments, _ = filled([0, 0])
    assert moments.counts.tolist() == [0, 0]
    assert not moments.sums.any()


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 1.0, 25.0])
def test_shrink_formula(shrinkage):
    """(sum of x x^T + k n' M) / (n + k n'), with M the layer's mean over all its tokens and n' the mean count."""
    counts = [5, 40, 0, 1]
    moments, inputs = filled(counts)
    all_inputs = torch.cat(inputs)
    mean = all_inputs.T @ all_inputs / len(all_inputs)
    extra = shrinkage * len(all_inputs) / len(counts)
    hessians = moments.hessians(shrinkage).double()
    for e, n in enumerate(counts):
        expected = (inputs[e].T @ inputs[e] + extra * mean) / (n + extra) if n else mean
        torch.testing.assert_close(hessians[e], expected, rtol=1e-5, atol=1e-6)


def test_shrink_zero_is_the_mean_moment():
    moments, inputs = filled([8, 2])
    torch.testing.assert_close(moments.hessians(0.0)[1].double(), inputs[1].T @ inputs[1] / 2, rtol=1e-5, atol=1e-6)


def test_much_shrink_is_the_layers_mean():
    moments, inputs = filled([8, 2])
    all_inputs = torch.cat(inputs)
    for h in moments.hessians(1e6):
        torch.testing.assert_close(h.double(), all_inputs.T @ all_inputs / 10, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shrinkage", [0.0, 0.1])
def test_layer_without_tokens(shrinkage):
    moments, _ = filled([0, 0, 0])
    hessians = moments.hessians(shrinkage)
    assert torch.equal(hessians, torch.eye(16).expand(3, -1, -1))
    hessians[0] += 1  # its own memory, not a view that experts share
    assert torch.equal(hessians[1], torch.eye(16))


def test_hessians_leave_sums_alone():
    moments, _ = filled([3, 4])
    original = moments.sums.clone()
    moments.hessians(0.3)
    assert torch.equal(moments.sums, original)


def test_factor_is_that_of_the_damped_inverse():
    """U^T U = (H + dampening mean(diag H) I)^-1, so (H + ...) U^T U = I: float32, condition number below 1e3."""
    moments, _ = filled([60, 90])
    hessians = moments.hessians(0.0)
    original = hessians.clone()
    for dampening in (0.01, 0.3):
        factor = factorize(hessians, dampening)
        assert factor.retries == 0
        assert torch.equal(factor.upper, factor.upper.triu())
        assert (factor.upper.diagonal(dim1=-2, dim2=-1) > 0).all()
        mean = hessians.double().diagonal(dim1=-2, dim2=-1).mean(-1).view(-1, 1, 1)
        damped = hessians.double() + dampening * mean * torch.eye(16, dtype=torch.float64)
        product = damped @ factor.upper.double().mT @ factor.upper.double()
        torch.testing.assert_close(product, torch.eye(16, dtype=torch.float64).expand(2, -1, -1), rtol=0, atol=1e-4)
    assert torch.equal(hessians, original)


def test_dead_inputs_get_a_diagonal_of_one():
    hessian = torch.diag(torch.tensor([4.0, 0, 4, 0])).unsqueeze(0)
    upper = factorize(hessian, 0.01).upper[0]
    damped = torch.tensor([4.0, 1, 4, 1]) + 0.01 * 2  # the mean of the diagonal as it came
    torch.testing.assert_close(upper, torch.diag(damped.rsqrt()))


def test_only_singular_hessians_are_retried():
    """Rank one at dampening 1e-6: float32 cannot factor it. The healthy one beside it keeps what was asked for."""
    v = torch.randn(64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 64)
    x = rows(500, columns=64)
    healthy = x.T @ x / 500
    negative = torch.outer(v, v) - 1e-3 * torch.eye(64) * v.square().mean()  # not positive: needs dampening above 1e-3
    factor = factorize(torch.stack([healthy, negative, healthy]), 1e-6)
    assert factor.retries == 1
    assert torch.isfinite(factor.upper).all()
    alone = factorize(healthy.unsqueeze(0), 1e-6)
    assert alone.retries == 0
    assert torch.equal(factor.upper[0], alone.upper[0])
    assert torch.equal(factor.upper[2], alone.upper[0])
    # the first power of ten that is enough
    torch.testing.assert_close(factor.upper[1], factorize(negative.unsqueeze(0), 1e-2).upper[0], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_refused(value):
    hessians = torch.eye(8).repeat(2, 1, 1)
    hessians[1, 3, 3] = value
    with pytest.raises(ArithmeticError, match="not finite"):
        factorize(hessians, 0.01)


@pytest.mark.parametrize("size", [1e-12, 1e-30, 1e12, 1e30])
def test_scale_of_inputs_does_not_matter(size):
    """Codes depend on ratios of pivots only; the factor itself goes with one over the root of the size."""
    moments, _ = filled([200])
    hessians = moments.hessians(0.0)
    factor = factorize(hessians * size, 0.01)
    assert factor.retries == 0
    torch.testing.assert_close(factor.upper * size**0.5, factorize(hessians, 0.01).upper, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [[3, 0, 70], [0, 0]])
def test_moments_that_wait_elsewhere_give_the_same_hessians(counts):
    moments, _ = filled(counts)
    offloaded, _ = filled(counts)
    offloaded.offload(list)
    for selection in (slice(None), slice(1, 2)):
        assert torch.equal(moments.hessians(0.1, selection), offloaded.hessians(0.1, selection))
    assert not offloaded.sums.numel()
