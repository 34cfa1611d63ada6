"""Jobs whose experts get trellis codes, on a tiny model and with 256 states, through the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gemq.pipeline import candidates_stage, codes_stage, reconstruction_stage, stage_settings
from gemq.pipeline.job_record import _checksum
from gemq.quant import trellis
from support.cli import Finished, Ran, contents, few_guard_windows, gemq, make_tiny_model

RECIPE = """
effort: low
codes: trellis
widths: [1, 2, 3]
num_windows: 6
seq_len: 16
micro_batch_tokens: 32
candidate_epochs: 1
reconstruction_epochs: 1
distill_epochs: 1
"""
UNTRAINED = """
effort: low
num_windows: 4
seq_len: 8
guard: false
reconstruct: false
"""


@pytest.fixture(scope="module", autouse=True)
def quick_jobs() -> Iterator[None]:
    """A CPU searches through 256 states in a sixteenth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trellis, "STATE_BITS", 8)
        few_guard_windows(patch)
        yield


@pytest.fixture(scope="module")
def trellis_job(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, quick_jobs: None) -> Finished:
    base = tmp_path_factory.mktemp("trellis")
    (base / "r.yaml").write_text(RECIPE)
    figures = base / "figures.json"
    ok("quantize", tiny_model, "-o", base / "out", "--recipe", base / "r.yaml", "--bits", 2, "--json", figures)
    return Finished(tiny_model, base / "out", base / "out.work", json.loads(figures.read_text()))


@pytest.fixture
def work(trellis_job: Finished, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trellis_job.work, tmp_path / "work"))


def ok(*arguments: object) -> Ran:
    ran = gemq(*arguments)
    assert ran.code == 0, ran.err
    return ran


def refused(*arguments: object) -> str:
    ran = gemq(*arguments)
    assert ran.code == 2, ran
    assert ran.err.count("\n") == 1, ran.err
    return ran.err


def widths_of(ran: Ran) -> set[float]:
    """All widths of a result."""
    experts = [expert for layer in ran.json["allocation"] for expert in layer]
    return {width for expert in experts for width in (expert if isinstance(expert, list) else [expert])}


def tensor_bytes(checkpoint: Path) -> int:
    return ok("inspect", checkpoint, "--json", "-").json["stored_bytes"]


def test_commands_on_a_checkpoint(trellis_job: Finished, tmp_path):
    config = json.loads((trellis_job.out / "config.json").read_text())["quantization_config"]
    widths = [width for by_name in config["experts"].values() for row in by_name.values() for width in row]
    assert all(isinstance(width, int) == (width % 1 == 0) and width % 0.125 == 0 for width in widths)
    assert any(width % 1 for width in widths)
    assert config["state_bits"] == 8
    assert trellis_job.figures["fallbacks"]["matrices_in_smaller_groups"] == 8  # the dense linears
    assert trellis_job.figures["fallbacks"]["matrices_in_smaller_rotations"] == 16
    assert 1.99 < trellis_job.figures["expert_bits_nominal"] <= 2
    loud = ok(
        "quantize",
        trellis_job.model,
        "-o",
        trellis_job.out,
        "--recipe",
        trellis_job.out.parent / "r.yaml",
        "--bits",
        2,
        "--resume",
    ).out
    assert "Experts have trellis codes" in loud
    assert "16 matrices are rotated in smaller blocks" in loud
    shown = ok("inspect", trellis_job.out, "--verify").out
    assert "trellis codes with states of 8 bits" in shown
    assert "as gemq wrote them" in shown
    assert tensor_bytes(trellis_job.out) == trellis_job.figures["stored_bytes"]
    assert "| codes of the experts | trellis |" in (trellis_job.out / "README.md").read_text()
    assert "<td>codes of the experts</td><td>trellis</td>" in (trellis_job.out / "report.html").read_text()
    ok("export", trellis_job.out, "--dense", tmp_path / "dense")
    evaluation = ("--reference", trellis_job.model, "--seq-len", 64, "--max-windows", 1, "--json", "-")
    packed, dense = (ok("eval", path, *evaluation).json for path in (trellis_job.out, tmp_path / "dense"))
    assert 0 < packed["mean_kl"] < 1e-3
    assert dense["perplexity"] == pytest.approx(packed["perplexity"], rel=5e-3)
    assert ok("generate", trellis_job.out, "-p", "Once", "--max-new-tokens", 2).out
    assert ok("bench", trellis_job.out, "--new-tokens", 2, "--json", "-").json["stored_bytes"] == tensor_bytes(
        trellis_job.out
    )


def test_a_stopped_job_by_recipe_yaml_gives_the_same_bytes(trellis_job: Finished, tmp_path, monkeypatch):
    command = ("quantize", trellis_job.model, "-o", tmp_path / "out", "--recipe", trellis_job.out / "recipe.yaml", "-q")
    resume: tuple[str, ...] = ()
    for stage, name in ((candidates_stage, "build_candidates"), (reconstruction_stage, "reconstruct_layer")):
        compute = getattr(stage, name)

        def stop(replay: Any, index: int, *arguments: Any, compute: Any = compute) -> Any:
            if index == 1:
                raise KeyboardInterrupt
            return compute(replay, index, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(stage, name, stop)
            assert gemq(*command, *resume).code == 1
        resume = ("--resume",)
    assert not (tmp_path / "out").exists()
    ok(*command, *resume)
    assert contents(tmp_path / "out") == contents(trellis_job.out)


def test_exports(trellis_job: Finished, work, tmp_path):
    plain = ok("export", work, "-o", tmp_path / "plain", "--bits", 1.5, "--json", "-")
    assert widths_of(plain) <= {1, 2, 3}
    assert plain.json["stages"].keys() == {"load", "allocate", "save"}
    limited = ok("export", work, "-o", tmp_path / "stored", "--stored-bits", 1.9, "--json", "-").json
    assert 1.7 < limited["expert_bits_stored"] <= 1.9
    limited = ok("export", work, "-o", tmp_path / "size", "--size", "78kB", "--json", "-").json
    assert 77_000 < limited["stored_bytes"] == tensor_bytes(tmp_path / "size") <= 78_000
    curve = ok("export", work, "--curve", "--json", "-").json["points"]
    assert plain.json["stored_bytes"] in [point["stored_bytes"] for point in curve]
    planned = ok("plan", trellis_job.model, "--codes", "trellis", "--widths", "1,2,3", "--json", "-").json["sizes"]
    for bits in (2, 3):
        ok("export", work, "-o", tmp_path / f"u{bits}", "--bits", bits, "--allocate", "uniform", "-q")
        assert planned[str(bits)] == tensor_bytes(tmp_path / f"u{bits}")


def test_missing_gradients_are_computed_again(trellis_job: Finished, work, tmp_path):
    for pattern in (
        "scores-*/gradients-000.safetensors",
        "reconstructed-*/layer-000.safetensors",
        "distilled-*/*.safetensors",
    ):
        for file in work.glob(pattern):
            file.unlink()
    ok("export", work, "-o", tmp_path / "out", "--reconstruct", "-q")
    tensors = "model.safetensors"
    assert (tmp_path / "out" / tensors).read_bytes() == (trellis_job.out / tensors).read_bytes()
    assert len(list(work.glob("scores-*/gradients-000.safetensors"))) == 1


def test_an_allocation_file_has_fine_widths_if_the_model_is_reconstructed(work, tmp_path):
    allocation = [[[2.125, 1], 2, 2, 1.875], [1, 1, 2, [3, 2.5]]]
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"widths": allocation}))
    message = refused("export", work, "-o", tmp_path / "no", "--allocation", file)
    assert "widths between the candidates 1, 2, 3" in message
    assert "--reconstruct" in message
    ran = ok("export", work, "-o", tmp_path / "out", "--allocation", file, "--reconstruct", "--json", "-")
    assert ran.json["allocation"] == allocation
    assert ok("inspect", tmp_path / "out", "--json", "-").json["allocation"] == allocation
    file.write_text(json.dumps({"widths": [[2.1, 1, 2, 2], [1, 1, 2, 2]]}))
    assert "cannot have width 2.1: choose from 1, 1.125," in refused(
        "export", work, "-o", tmp_path / "no", "--allocation", file, "--reconstruct"
    )


def test_a_job_that_chose_trellis_codes_on_a_gpu_is_exported_on_a_cpu(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "r.yaml").write_text(UNTRAINED)
    with monkeypatch.context() as gpu:
        gpu.setattr(codes_stage, "_choose", lambda trellis_job, replay: codes_stage.CodesChoice("trellis"))
        gpu.setattr(stage_settings, "pick_dtype", lambda name, device: torch.bfloat16)
        ok("quantize", tiny_model, "-o", tmp_path / "out", "--bits", 2, "--recipe", tmp_path / "r.yaml", "-q")
    ran = ok("export", tmp_path / "out.work", "-o", tmp_path / "other", "--bits", 2.5, "--json", "-")
    assert ran.json["codes"]["codes"] == "trellis"
    assert widths_of(ran) <= {1, 1.5, 2, 2.5, 3}
    assert ran.json["stages"].keys() == {"load", "allocate", "save"}
    points = ok("export", tmp_path / "out.work", "--curve", "--json", "-").json["points"]
    assert ran.json["stored_bytes"] in [point["stored_bytes"] for point in points]
    recipe = (tmp_path / "other" / "recipe.yaml").read_text()
    assert "codes: trellis" in recipe
    assert "dtype: bfloat16" in recipe


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--codes", "foo"), "choose from auto, affine, trellis"),
        (("--codes", "trellis", "--widths", "1.55"), "choose a multiple of 0.125 from 1 to 4"),
        (("--codes", "trellis", "--recipe", "paper"), "trellis codes have no rtn"),
    ],
)
def test_codes_that_do_not_exist(tiny_model, tmp_path, flags, words):
    assert words in refused("quantize", tiny_model, "-o", tmp_path / "out", *flags)
    assert words in refused("plan", tiny_model, *flags)
    assert list(tmp_path.iterdir()) == []


def test_sides_that_16_does_not_divide(tmp_path):
    model = make_tiny_model(tmp_path / "model", intermediate_size=24)
    message = refused("quantize", model, "-o", tmp_path / "out", "--codes", "trellis")
    assert "its 24 inputs are not a multiple of 16" in message
    assert not (tmp_path / "out.work").exists()


def test_a_directory_of_other_codes_is_not_resumed(trellis_job: Finished, work, tmp_path):
    command = ("quantize", trellis_job.model, "-o", tmp_path / "out", "--work", work, "--resume", "--bits", 2)
    recipe = trellis_job.out.parent / "r.yaml"
    assert "made with codes trellis and the recipe now has affine" in refused(
        *command, "--recipe", recipe, "--codes", "affine"
    )
    # as a version without trellis codes wrote it
    record = json.loads((work / "job.json").read_text())
    del record["recipe"]["codes"], record["checksum"]
    (work / "job.json").write_text(json.dumps({**record, "checksum": _checksum(record)}))
    assert "made with codes affine and the recipe now has trellis" in refused(*command, "--recipe", recipe)
