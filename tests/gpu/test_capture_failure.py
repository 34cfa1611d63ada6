"""A failed capture of a CUDA graph leaves the process in working order.

Run with ``python -m pytest tests/gpu/test_capture_failure.py -m gpu``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gemq
from gemq.assets import builtin_model
from gemq.decoding.decoder import Decoder
from gemq.recipe import Recipe
from gemq.runtime.cuda_graph import CudaGraphReplay
from gemq.runtime.graph_capture import capture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_capture_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget failures of earlier tests."""
    monkeypatch.setattr(CudaGraphReplay, "failed", False)


def draw_then_wait() -> float:
    """Wait for the device, which a graph cannot capture. The draw registers the random generator with the graph."""
    return torch.rand(4, device=DEVICE).sum().item()


def fail_a_capture() -> None:
    """Try to capture a function that no graph supports."""
    with pytest.raises(Exception):  # noqa: B017 - the type differs between versions of torch
        capture(draw_then_wait, DEVICE)


def test_random_numbers_continue() -> None:
    torch.manual_seed(0)
    expected = [torch.rand(3, device=DEVICE) for _ in range(2)]
    torch.manual_seed(0)
    draw = torch.rand(3, device=DEVICE)
    fail_a_capture()
    assert torch.equal(draw, expected[0])
    assert torch.equal(torch.rand(3, device=DEVICE), expected[1])
    assert torch.randperm(8, device=DEVICE).sort()[0].tolist() == list(range(8))


def test_the_stream_and_the_memory_pool_are_restored() -> None:
    stream = torch.cuda.current_stream()
    fail_a_capture()
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    reserved_bytes = torch.cuda.memory_reserved()
    large = torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE)
    del large
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved_bytes


def test_the_next_graph_draws_new_numbers_at_every_replay() -> None:
    fail_a_capture()
    torch.cuda.synchronize()
    graph, numbers = capture(lambda: torch.rand(4, device=DEVICE), DEVICE)
    draws = []
    for _ in range(2):
        graph.replay()
        draws.append(numbers.tolist())
    assert draws[0] != draws[1]


def test_the_error_of_the_captured_code_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        capture(lambda: 1 / 0, DEVICE)
    torch.rand(2, device=DEVICE)


def test_a_user_generates_and_quantizes_again(tmp_path: Path) -> None:
    recipe = Recipe(effort="low", num_windows=8, seq_len=64)
    result_before = gemq.quantize(str(builtin_model()), recipe, out=tmp_path / "before", device="cuda")
    model = gemq.load(result_before.out, device="cuda", dtype=torch.float32)
    ids = torch.arange(40, 64, device=DEVICE)[None]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
    fail_a_capture()
    decoder = Decoder(model, 1, 64)
    prefill_tokens = decoder.prefill(ids).tolist()
    decoder.prepare(compile_layers=False)
    assert decoder.execution == "fused layers in a CUDA graph"
    assert [row[0] for row in (prefill_tokens, *decoder.decode(11))] == expected
    torch.manual_seed(0)
    assert model.generate(ids, max_new_tokens=4, do_sample=True, pad_token_id=0).shape == (1, 28)
    result_after = gemq.quantize(str(builtin_model()), recipe, out=tmp_path / "after", device="cuda")
    assert result_after.allocation == result_before.allocation
    assert result_after.fallbacks == result_before.fallbacks
