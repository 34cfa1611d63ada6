"""``gemq eval`` on a GPU: memory bounds do not change the results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gemq
from gemq.assets import builtin_model, builtin_texts
from gemq.calibration.windows import eval_windows
from gemq.errors import UserError
from gemq.evaluation.evaluate import evaluate, evaluate_paths, open_model
from gemq.models.structure import find_structure
from gemq.recipe import Recipe, parse_size

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
OPTIONS = {"texts": builtin_texts()[:2], "seq_len": 256, "max_windows": 4, "device": "cuda"}


def test_memory_bounds_do_not_change_the_results(tmp_path: Path):
    model = str(builtin_model())
    recipe = Recipe(effort="low", num_windows=4, seq_len=64, guard=False, calibration=(str(builtin_texts()[0]),))
    gemq.quantize(model, recipe, out=tmp_path / "out", device="cuda")
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="give at least --gpu-memory") as refused:
        evaluate_paths(out, reference=model, gpu_memory=1_000_000, **OPTIONS)
    min_bytes = parse_size(str(refused.value).split()[-1])
    bounded = evaluate_paths(out, reference=model, gpu_memory=min_bytes, **OPTIONS)
    unbounded = evaluate_paths(out, reference=model, **OPTIONS)
    packed, reference = (open_model(path, "float32", "cuda") for path in (out, model))
    windows = eval_windows(packed.tokenizer, OPTIONS["texts"], 256, 4)
    structure = find_structure(reference.model)
    expected = evaluate(packed.model, windows, reference=reference.model, structure=structure)
    for result in (bounded, unbounded):
        assert result["mean_kl"] == pytest.approx(expected["mean_kl"], rel=1e-4)
        assert result["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
        assert result["layers"] == pytest.approx(expected["layers"], abs=1e-3)


def test_texts_are_written_by_captured_steps(tmp_path: Path):
    model = str(builtin_model())
    recipe = Recipe(effort="low", num_windows=4, seq_len=64, guard=False, calibration=(str(builtin_texts()[0]),))
    gemq.quantize(model, recipe, out=tmp_path / "out", device="cuda")
    texts = {"generate": True, "max_new_tokens": 32, **OPTIONS}
    values = evaluate_paths(tmp_path / "out", reference=model, **texts)
    assert values["fallbacks"] == []  # both models write with CUDA graphs
    on_cpu = evaluate_paths(tmp_path / "out", reference=model, **{**texts, "device": "cpu"})
    for role in ("model", "reference"):
        rows, cpu_rows = values["generation"]["texts"], on_cpu["generation"]["texts"]
        same = sum(a[role]["greedy"] == b[role]["greedy"] for a, b in zip(rows, cpu_rows, strict=True))
        assert same > len(rows) / 2  # a rounding changes a few texts
    for mode in ("greedy", "sampled"):
        kl, cpu_kl = (v["generation"]["model"][mode]["mean_kl"] for v in (values, on_cpu))
        assert kl == pytest.approx(cpu_kl, rel=0.3)


def test_a_callers_tensors_do_not_count_towards_the_bound(tmp_path: Path):
    """A notebook that holds a model quantizes another one in little memory."""
    tensor = torch.empty(3_000_000_000, dtype=torch.uint8, device="cuda")
    recipe = Recipe(effort="low", num_windows=4, seq_len=64, guard=False, calibration=(str(builtin_texts()[0]),))
    gemq.quantize(str(builtin_model()), recipe, out=tmp_path / "out", device="cuda", gpu_memory=3_000_000_000)
    assert tensor.numel() == 3_000_000_000
