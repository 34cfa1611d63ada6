"""Training steps on a GPU: replayed from a CUDA graph and launched one by one.

Run with ``python -m pytest tests/gpu/test_training_steps.py -m gpu``.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemq.assets import builtin_model
from gemq.layers.training import Optimizer
from gemq.pipeline.quantize import quantize
from gemq.quant.gptq import highest_codes
from gemq.quant.grid import Quantized, nearest
from gemq.quant.trainable_gpu import trainable
from gemq.recipe import Recipe
from gemq.runtime.cuda_graph import Replayed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
STEPS = 12


@pytest.fixture(autouse=True)
def nothing_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget failures of earlier tests."""
    monkeypatch.setattr(Replayed, "failed", False)


def trained(from_graph: bool, compute: torch.dtype) -> tuple[Quantized, Tensor, int]:
    """Train matrices and a vector for ``STEPS`` steps. Returns both, and the number of failed captures."""
    torch.manual_seed(0)
    highest = highest_codes((1, 2, 3), torch.device("cuda"))
    scales, offsets = nearest(0.3 + torch.rand(3, 64, 2).cuda(), torch.randn(3, 64, 2).cuda(), highest.view(-1, 1, 1))
    latents = torch.rand(3, 64, 128).cuda() * highest.view(-1, 1, 1)
    q = Quantized(latents.round().to(torch.uint8), scales, offsets)
    matrices = trainable(q, highest, latents, compute)
    vector = torch.ones(128, device="cuda")
    optimizer = Optimizer((([vector], 1e-2),), [1 / (1 + step) for step in range(STEPS)])
    optimizer.take([matrices], 1e-2, 1e-3)
    failures: list[int] = []

    def step(fixed: tuple[Tensor, ...], x: Tensor, target: Tensor) -> None:
        out = (x * fixed[0] * vector) @ matrices.weight().float().mT
        optimizer.step((out - target).square().sum())
        matrices.keep_in_range()

    fixed = (torch.rand(128, device="cuda"),)
    with closing(Replayed(step, torch.device("cuda"), lambda: failures.append(1), usable=from_graph)) as replayed:
        for number in range(STEPS):
            rows = 3 if number == 8 else 5  # another shape cannot be replayed
            replayed(fixed, torch.randn(3, rows, 128).cuda(), torch.randn(3, rows, 64).cuda())
    return matrices.result(), vector.detach(), len(failures)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_graph_takes_the_same_steps(compute: torch.dtype) -> None:
    q, vector, failures = trained(True, compute)
    expected, expected_vector, _ = trained(False, compute)
    assert failures == 0
    assert torch.equal(q.codes, expected.codes)
    torch.testing.assert_close(q.scales, expected.scales)
    torch.testing.assert_close(vector, expected_vector)


def waits_for_the_device(fixed: None, x: Tensor) -> Tensor:
    """Wait for a number of the device, which a graph cannot capture."""
    return x * x.sum().item()


def test_steps_that_cannot_be_captured_run_eagerly() -> None:
    failures: list[int] = []
    for times in (1, 2):  # the second does not try to capture
        replayed = Replayed(waits_for_the_device, torch.device("cuda"), lambda: failures.append(1))
        results = [replayed(None, torch.full((2,), float(n), device="cuda")).tolist() for n in range(6)]
        assert results == [[2.0 * n * n] * 2 for n in range(6)]
        assert failures == [1] * times


def test_memory_is_freed_after_a_failed_capture() -> None:
    """The allocator still frees cached blocks for a new block that does not fit beside them."""
    replayed = Replayed(waits_for_the_device, torch.device("cuda"), lambda: None)
    for _ in range(4):
        replayed(None, torch.ones(2, device="cuda"))
    assert Replayed.failed
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1_500_000_000) / total)
    try:
        cached = torch.empty(1_000_000_000, dtype=torch.uint8, device="cuda")
        del cached
        torch.empty(1_200_000_000, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("bound", [None, 3_000_000_000])
def test_a_job_trains_from_graphs(tmp_path: Path, bound: int | None) -> None:
    recipe = Recipe(windows=32, window=128, total_tokens=64 * 128, batch_tokens=512)
    result = quantize(str(builtin_model()), recipe, out=tmp_path / "out", device="cuda", gpu_memory=bound)
    assert "training_launched_by_steps" not in result.fallbacks
