"""``gemq eval`` on a GPU: bounds decide where layers are, never what comes out."""

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
HOW = {"texts": builtin_texts()[:2], "window": 256, "max_windows": 4, "device": "cuda"}


def test_a_bound_changes_no_figure(tmp_path: Path):
    model = str(builtin_model())
    recipe = Recipe(effort="low", windows=4, window=64, guard=False, calib=(str(builtin_texts()[0]),))
    gemq.quantize(model, recipe, out=tmp_path / "out", device="cuda")
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="give at least --gpu-memory") as refused:
        evaluate_paths(out, reference=model, gpu_memory=1_000_000, **HOW)
    smallest_limit = parse_size(str(refused.value).split()[-1])
    bound = evaluate_paths(out, reference=model, gpu_memory=smallest_limit, **HOW)
    free = evaluate_paths(out, reference=model, **HOW)
    packed, reference = (open_model(path, "float32", "cuda") for path in (out, model))
    windows = eval_windows(packed.tokenizer, HOW["texts"], 256, 4)
    structure = find_structure(reference.model)
    whole_models = evaluate(packed.model, windows, reference=reference.model, structure=structure)
    for values in (bound, free):
        assert values["mean_kl"] == pytest.approx(whole_models["mean_kl"], rel=1e-4)
        assert values["perplexity"] == pytest.approx(whole_models["perplexity"], rel=1e-4)
        assert values["layers"] == pytest.approx(whole_models["layers"], abs=1e-3)


def test_a_callers_tensors_do_not_count_towards_the_bound(tmp_path: Path):
    """A notebook that holds a model quantizes another one in little memory."""
    tensor = torch.empty(3_000_000_000, dtype=torch.uint8, device="cuda")
    recipe = Recipe(effort="low", windows=4, window=64, guard=False, calib=(str(builtin_texts()[0]),))
    gemq.quantize(str(builtin_model()), recipe, out=tmp_path / "out", device="cuda", gpu_memory=3_000_000_000)
    assert tensor.numel() == 3_000_000_000
