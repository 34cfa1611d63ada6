"""Steps of training on a GPU: from a CUDA graph as launched one by one.

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
from gemq.quant.gptq import max_codes
from gemq.quant.grid import Quantized, nearest
from gemq.quant.trainable_gpu import trainable
from gemq.quant.widths import Width
from gemq.recipe import Recipe
from gemq.runtime.cuda_graph import CudaGraphReplay

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
STEPS = 12


@pytest.fixture(autouse=True)
def nothing_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaGraphReplay, "failed", False)


def trained(from_graph: bool, compute: torch.dtype) -> tuple[Quantized, Tensor, int]:
    """Matrices and a vector beside them after ``STEPS`` steps, and how often no graph was to be had."""
    torch.manual_seed(0)
    max_code = max_codes((Width.ONE_BIT, Width.TWO_BIT, Width.THREE_BIT), torch.device("cuda"))
    scales, offsets = nearest(0.3 + torch.rand(3, 64, 2).cuda(), torch.randn(3, 64, 2).cuda(), max_code.view(-1, 1, 1))
    soft_codes = torch.rand(3, 64, 128).cuda() * max_code.view(-1, 1, 1)
    q = Quantized(soft_codes.round().to(torch.uint8), scales, offsets)
    matrices = trainable(q, max_code, soft_codes, compute)
    vector = torch.ones(128, device="cuda")
    optimizer = Optimizer((([vector], 1e-2),), [1 / (1 + step) for step in range(STEPS)])
    optimizer.add_fused([matrices], 1e-2, 1e-3)
    capture_failures: list[int] = []

    def step(fixed: tuple[Tensor, ...], x: Tensor, target: Tensor) -> None:
        out = (x * fixed[0] * vector) @ matrices.weight().float().mT
        optimizer.step((out - target).square().sum())
        matrices.keep_in_range()

    fixed = (torch.rand(128, device="cuda"),)
    with closing(
        CudaGraphReplay(step, torch.device("cuda"), lambda: capture_failures.append(1), usable=from_graph)
    ) as replayed:
        for number in range(STEPS):
            rows = 3 if number == 8 else 5  # one that the graph does not take
            replayed(fixed, torch.randn(3, rows, 128).cuda(), torch.randn(3, rows, 64).cuda())
    return matrices.result(), vector.detach(), len(capture_failures)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_graph_takes_the_same_steps(compute: torch.dtype) -> None:
    q, vector, capture_failures = trained(True, compute)
    expected, other_vector, _ = trained(False, compute)
    assert capture_failures == 0
    assert torch.equal(q.codes, expected.codes)
    torch.testing.assert_close(q.scales, expected.scales)
    torch.testing.assert_close(vector, other_vector)


def waits_for_the_device(fixed: None, x: Tensor) -> Tensor:
    return x * x.sum().item()


def test_what_a_graph_does_not_take_runs_as_it_is() -> None:
    capture_failures: list[int] = []
    for times in (1, 2):  # the second is not captured any more
        replayed = CudaGraphReplay(waits_for_the_device, torch.device("cuda"), lambda: capture_failures.append(1))
        results = [replayed(None, torch.full((2,), float(n), device="cuda")).tolist() for n in range(6)]
        assert results == [[2.0 * n * n] * 2 for n in range(6)]
        assert capture_failures == [1] * times


def test_memory_is_given_back_after_a_failed_capture() -> None:
    """What is cached makes room for what does not fit beside it, as ever."""
    replayed = CudaGraphReplay(waits_for_the_device, torch.device("cuda"), lambda: None)
    for _ in range(4):
        replayed(None, torch.ones(2, device="cuda"))
    assert CudaGraphReplay.failed
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
    recipe = Recipe(num_windows=32, seq_len=128, total_tokens=64 * 128, micro_batch_tokens=512)
    result = quantize(str(builtin_model()), recipe, out=tmp_path / "out", device="cuda", gpu_memory=bound)
    assert "training_launched_by_steps" not in result.fallbacks
