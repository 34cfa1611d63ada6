"""If a kernel fails to compile, the reference computes the result, with a warning."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from gemq.kernels import dispatch, reference
from gemq.quant.widths import Width
from support.packed_cases import Experts, random_linear, random_routing


class BrokenKernel(SimpleNamespace):
    """A kernel module that Triton fails to compile."""

    def __init__(self, error: Exception) -> None:
        super().__init__(__name__="gemq.kernels.dispatch.broken", calls=0, error=error)

    def experts_forward(self, *_: object) -> torch.Tensor:
        self.calls += 1
        raise self.error

    linear_forward = experts_forward


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> BrokenKernel:
    kernel = BrokenKernel(RuntimeError("PassManager::run failed\nmore lines"))
    monkeypatch.setattr(dispatch, "_choose", lambda *_: kernel)
    monkeypatch.setattr(dispatch, "_failed", {})
    monkeypatch.setattr(dispatch, "fallbacks", type(dispatch.fallbacks)())
    return kernel


def test_experts_fall_back_to_the_reference_and_are_counted(broken: BrokenKernel) -> None:
    generator = torch.Generator().manual_seed(0)
    module = Experts(64, 64, (Width.TWO_BIT, Width.THREE_BIT, Width.ONE_BIT), generator)
    hidden = torch.randn(4, 64, generator=generator)
    index, weights = random_routing(4, 2, 3, generator, torch.float32, "cpu")
    with torch.no_grad():
        expected = reference.experts_forward(module, hidden, index, weights)
        with pytest.warns(UserWarning, match="PassManager::run failed.*slow reference"):
            result = dispatch.experts_forward(module, hidden, index, weights)
        assert torch.equal(result, expected)
        assert torch.equal(dispatch.experts_forward(module, hidden, index, weights), expected)
    assert broken.calls == 1  # not retried: compiling takes seconds
    assert list(dispatch.fallbacks.values()) == [2]


def test_gradients_pass_through_the_fallback(broken: BrokenKernel) -> None:
    linear = random_linear(32, 64, Width.FOUR_BIT, 32, torch.Generator().manual_seed(0))
    x = torch.randn(3, 64, requires_grad=True)
    with pytest.warns(UserWarning, match="slow reference"):
        dispatch.linear_forward(linear, x).sum().backward()
    expected = torch.autograd.grad(reference.linear_forward(linear, x).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_errors_of_the_device_are_raised(broken: BrokenKernel) -> None:
    broken.error = torch.OutOfMemoryError("out of memory")
    linear = random_linear(32, 64, Width.FOUR_BIT, 32, torch.Generator().manual_seed(0))
    with pytest.raises(torch.OutOfMemoryError):
        dispatch.linear_forward(linear, torch.randn(3, 64))
    assert not dispatch.fallbacks


def test_errors_are_raised_if_kernels_are_forced(broken: BrokenKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "mode", "triton")
    linear = random_linear(32, 64, Width.FOUR_BIT, 32, torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="PassManager"):
        dispatch.linear_forward(linear, torch.randn(3, 64))


def test_merging_linears_of_an_unpacked_model() -> None:
    """The operator is not registered in a process without packed modules. Looking it up would fail the compilation."""
    code = """
import torch
from gemq.kernels.decode.linear_fusion import merge_linears
assert merge_linears(torch.fx.symbolic_trace(torch.nn.Linear(2, 2))) == 0
assert not hasattr(torch.ops.gemq, "decode_linears")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
