"""``report.html`` and the model card of a job, and what ``gemq report`` adds to them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import gemq as library
from gemq.assets import builtin_texts
from gemq.errors import UserError
from gemq.reporting.record import read_record
from support.cli import Finished, contents, gemq

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def out(finished: Finished, tmp_path: Path) -> Path:
    shutil.copytree(finished.out, tmp_path / "out")
    return tmp_path / "out"


def test_a_job_reports_what_its_results_say(finished: Finished):
    record = read_record(finished.out)
    assert record is not None
    job, figures = record["job"], finished.figures
    for key in ("guard", "gains", "windows", "original_bytes", "stored_bytes", "predicted_cost", "fallbacks"):
        assert job[key] == figures[key]
    widths = []
    for layer in record["checkpoint"]["layers"]:
        pairs = zip(layer["gate_up"], layer["down"], strict=True)
        widths.append([up if up == down else [up, down] for up, down in pairs])
    assert widths == figures["allocation"]
    assert job["stages"].keys() == figures["stages"].keys() - {"save"}
    curve = job["curve"]
    [point] = [point for point in curve["points"] if point["bits"] == 2]
    assert point["predicted_cost"] == pytest.approx(figures["predicted_cost"])
    assert curve["random_cost"] > point["predicted_cost"]
    assert curve["random_bytes"] <= figures["stored_bytes"]
    assert (finished.out / "report.html").stat().st_size < 100_000
    assert not [text for text in contents(finished.out).values() if str(finished.out.parent).encode() in text]
    assert str(finished.out.parent) not in (finished.out / "report.html").read_text()


def test_config_says_what_is_quantized(finished: Finished):
    values = json.loads((finished.out / "config.json").read_text())["quantization_config"]
    assert values["bits"] == round(finished.figures["expert_bits_nominal"], 3)
    assert values["producer"]["name"] == "gemq"
    assert "model.layers.*.mlp.gate" in values["modules_to_not_convert"]
    loaded = library.load(finished.out).config.quantization_config.to_dict()  # what save_pretrained writes
    assert loaded == values


def test_report_fills_page_and_card(finished: Finished, out: Path):
    text, job = builtin_texts()[0], read_record(out)
    flags = ("--text", text, "--seq-len", 64, "--max-windows", 2, "--bench", "--device", "cpu")
    ran = gemq("report", out, "--reference", finished.model, *flags)
    assert ran.code == 0, ran.err
    assert "Written" in ran.out
    record = read_record(out)
    assert record is not None
    assert job is not None
    assert record["job"] == job["job"]
    evaluation = record["evaluation"]
    assert list(evaluation["texts"]) == [text.stem]
    assert (evaluation["reference"], evaluation["seq_len"]) == (finished.model.name, 64)
    speed = record["speed"]["decode"][0]["tokens_per_second"]["p50"]
    assert f"| decode, batch 1 | {speed:,.1f} |" in (out / "README.md").read_text()
    assert record["checkpoint"]["memory"] == job["checkpoint"]["memory"]
    assert f"| {evaluation['mean_kl']:.4f} | {evaluation['kl_p99']:.3f} |" in (out / "README.md").read_text()
    assert f"{evaluation['mean_kl']:.4f}" in (out / "report.html").read_text()
    page = (out / "report.html").read_bytes()
    assert gemq("report", out, "-q").code == 0  # nothing new
    assert (out / "report.html").read_bytes() == page


def test_an_evaluation_outlives_a_bench_that_fails(out: Path, monkeypatch):
    """The bench gets the flags that it shares with the evaluation."""
    received: dict[str, object] = {}

    def fail(path: str, **options: object) -> None:
        received.update(options)
        raise UserError("no room")

    monkeypatch.setattr("gemq.evaluation.bench.bench_path", fail)
    flags = ("--text", builtin_texts()[0], "--seq-len", 64, "--max-windows", 2, "--device", "cpu")
    ran = gemq("report", out, *flags, "--bench", "--dtype", "bfloat16")
    assert (ran.code, received["dtype"]) == (2, "bfloat16"), ran.err
    assert "no room" in ran.err
    record = read_record(out)
    assert record is not None
    assert record["evaluation"]["dtype"] == "bfloat16"
    gemq("report", out, "--bench", "--gpu-memory", "8GB")
    assert (received["dtype"], received["gpu_memory"]) == ("auto", 8_000_000_000)
    ran = gemq("report", out, "--bench", "--host-memory", "8GB")
    assert (ran.code, "--host-memory bounds an evaluation: leave it out" in ran.err) == (2, True)


def test_a_checkpoint_without_page_and_new_keys_gets_a_page(out: Path):
    """As those of earlier versions."""
    for name in ("report.html", "README.md", "allocation.json", "allocation.svg", "recipe.yaml"):
        (out / name).unlink()
    config = json.loads((out / "config.json").read_text())
    del config["gemq_checksums"]["config"]
    for key in ("bits", "producer", "modules_to_not_convert"):
        del config["quantization_config"][key]
    (out / "config.json").write_text(json.dumps(config))
    assert gemq("report", out).code == 0
    record = read_record(out)
    assert record is not None
    assert record["job"] is None
    assert record["checkpoint"]["layers"]


@pytest.mark.parametrize(
    ("results", "words"),
    [
        (None, "check --results"),
        ("no json", "--json wrote"),
        ({"perplexity": 1}, "--json wrote"),
        ({"stored_bytes": 1, "decode": [], "prefill": [], "device": "", "dtype": "", "fallbacks": []}, "another"),
        ({"stored_bytes": 0, "decode": 3, "prefill": [], "device": "", "dtype": "", "fallbacks": []}, "damaged"),
    ],
)
def test_results_that_are_none_are_refused_in_one_line(finished: Finished, out: Path, results, words):
    contents_before, page = contents(out), (out / "report.html").read_bytes()
    file = out.with_name("results.json")
    if isinstance(results, str):
        file.write_text(results)
    elif results is not None:
        stored_bytes = results.get("stored_bytes") or finished.figures["stored_bytes"]
        file.write_text(json.dumps({"model": "m", **results, "stored_bytes": stored_bytes}))
    ran = gemq("report", out, "--results", file)
    assert ran.code == 2
    assert words in ran.err
    assert ran.err.count("\n") == 1
    assert (contents(out), (out / "report.html").read_bytes()) == (contents_before, page)


def test_a_model_is_no_checkpoint_to_report(finished: Finished):
    ran = gemq("report", finished.model)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "is not a gemq checkpoint" in ran.err
