"""Progressive: scores computed again around what an earlier, larger budget made of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import gemq
from gemq.assets import builtin_texts
from gemq.pipeline.quantize import Result, export, quantize
from gemq.recipe import Recipe
from support.cli import write_first_layers

torch.set_num_threads(1)
KEYS = {"effort": "low", "num_windows": 6, "seq_len": 32, "guard": False}


def job(folder: Path, **keys: object) -> Result:
    recipe = Recipe.from_dict({**KEYS, "calibration": [str(builtin_texts()[0])], **keys})
    return quantize(str(folder / "model"), recipe, out=folder / "out", work=folder / "work")


@pytest.fixture(scope="module")
def progressive_job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("progressive")
    write_first_layers(folder / "model", 2)
    return folder, job(folder, progressive=[2.5, 2.0], distill_epochs=1)


def test_every_step_has_its_scores_and_its_finished_model(progressive_job):
    folder, result = progressive_job
    work = folder / "work"
    assert result.expert_bits_nominal == pytest.approx(2.0, abs=0.02)
    around = [json.loads((s / "stage.json").read_text())["around"] for s in work.glob("scores-*")]
    assert sorted(map(bool, around)) == [False, True]  # full precision, then the model of 2.5 bits
    assert len(list(work.glob("reconstructed-*"))) == len(list(work.glob("distilled-*"))) == 2
    logits = gemq.load(folder / "out")(input_ids=torch.arange(32).unsqueeze(0)).logits
    assert logits.isfinite().all()


def test_scores_around_a_quantized_model_differ_and_costs_stay_those_of_the_full_weights(progressive_job):
    """The gradients and inputs are others; a width that loses nothing against full precision would still cost 0."""
    from safetensors.torch import load_file

    work = progressive_job[0] / "work"
    by_kind = {}
    for stage in work.glob("scores-*"):
        kind = bool(json.loads((stage / "stage.json").read_text())["around"])
        by_kind[kind] = load_file(next(iter(sorted(stage.glob("*.safetensors")))))
    full, around = (by_kind[kind]["costs"].sum((0, 1, 2)) for kind in (False, True))
    assert not torch.equal(full, around)
    assert (around[:-1] > around[1:]).all()  # more bits, less cost
    # measured on the built-in model: within a few percent; errors against the quantized weights would be far off
    torch.testing.assert_close(around, full, rtol=0.35, atol=0)


def test_a_second_run_computes_nothing(progressive_job):
    folder, result = progressive_job
    recipe = Recipe.from_dict(
        {**KEYS, "calibration": [str(builtin_texts()[0])], "progressive": [2.5, 2.0], "distill_epochs": 1}
    )
    again = quantize(str(folder / "model"), recipe, out=folder / "out", work=folder / "work", resume=True)
    assert again.complete_before
    assert again.allocation == result.allocation
    assert again.stages.keys() == {"load", "allocate"}


def test_a_plain_export_takes_no_steps(progressive_job, tmp_path):
    exported = export(progressive_job[0] / "work", out=tmp_path / "out", changes={"bits": 1.5})
    assert exported.stages.keys() == {"load", "allocate", "save"}
