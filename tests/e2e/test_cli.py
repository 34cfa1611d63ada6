"""The commands as a user types them, on the built-in model."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import gemq as library
from gemq.assets import builtin_texts
from gemq.runtime.safetensors_files import read_header
from support.cli import SMALL, Finished, contents, gemq, make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

COMPARED = {
    "mean_kl",
    "mean_kl_stderr",
    "kl_p99",
    "kl_p999",
    "top1_agreement",
    "top1_agreement_stderr",
    "reference_perplexity",
    "routing_agreement",
}
EVAL_KEYS = {
    "model",
    "stored_bytes",
    "expert_bits_nominal",
    "expert_bits_stored",
    "reference",
    "built_in_texts",
    "seq_len",
    "dtype",
    "device",
    "windows",
    "tokens",
    "perplexity",
    "perplexity_stderr",
    "texts",
    "layers",
    "fallbacks",
    *COMPARED,
}
TEXT_KEYS = {"windows", "tokens", "perplexity", "perplexity_stderr", *COMPARED}


def ok(*arguments: object) -> Any:
    ran = gemq(*arguments)
    assert ran.code == 0, ran.err
    return ran


def tensor_bytes(checkpoint: Path) -> int:
    """Bytes of all tensors, by the headers of the files."""
    return sum(spec.bytes for file in checkpoint.glob("*.safetensors") for spec in read_header(file).values())


def files(directory: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every file: what tells a rewritten file from one that was left alone."""
    return {str(f): (f.stat().st_ino, f.stat().st_mtime_ns) for f in directory.rglob("*") if f.is_file()}


def allocation(out: Path) -> list[list[Any]]:
    return ok("inspect", out, "--json", "-").json["allocation"]


# quantize


@pytest.mark.sample
def test_quantize_tells_what_it_did(finished: Finished):
    figures = finished.figures
    assert figures.keys() >= {
        "stages",
        "allocation",
        "stored_bytes",
        "expert_bits_nominal",
        "expert_bits_stored",
        "quantized_share",
        "fallbacks",
    }
    for cost in figures["stages"].values():
        assert cost.keys() == {"seconds", "peak_gpu_bytes", "peak_host_bytes"}
    assert figures["stages"].keys() >= {"load", "calibration windows", "candidates", "scores", "allocate", "save"}
    assert [len(layer) for layer in figures["allocation"]] == [16] * 6
    widths = [
        w
        for layer in figures["allocation"]
        for expert in layer
        for w in (expert if isinstance(expert, list) else [expert])
    ]
    assert set(widths) <= {1, 1.6, 2, 3}
    assert len(widths) > 16 * 6  # some experts' two matrices differ
    assert 1.99 < figures["expert_bits_nominal"] <= 2.0
    assert figures["stored_bytes"] == tensor_bytes(finished.out)
    assert 0.85 < figures["quantized_share"] < 0.95
    assert figures["windows"] == {"self": 8}
    assert figures["stored_bytes"] < 0.25 * figures["original_bytes"]


def test_summary_fits_80_columns_and_names_what_comes_next(finished: Finished, tmp_path, monkeypatch, work):
    monkeypatch.setenv("COLUMNS", "80")
    ran = ok("export", work, "-o", tmp_path / "out", "--bits", "1.75")
    tables = [line for line in ran.out.splitlines() if line.startswith(("│", "┃", "┏", "├", "└"))]
    assert max(map(len, tables)) <= 80
    for words in (
        "1.6 bit",
        "11.30 MB ->",
        "of the parameters quantized",
        "stored",
        "candidates",
        "Try: gemq generate",
    ):
        assert words in ran.out
    assert "candidates" in ran.err or "save" in ran.err  # the bars


def test_the_same_command_gives_the_same_bytes(tiny_model, tmp_path):
    first, out = tmp_path / "first", tmp_path / "elsewhere" / "other-name"
    ok("quantize", tiny_model, "-o", first, "--bits", "2", *SMALL)
    ok("quantize", tiny_model, "-o", out, "--bits", "2", *SMALL, "--work", tmp_path / "w", "--quiet")
    assert contents(out) == contents(first)
    assert not out.with_name("other-name.work").exists()


def test_python_api(tiny_model, tmp_path):
    recipe = library.Recipe(bits=2.0, effort="low", num_windows=4, seq_len=32)
    result = library.quantize(str(tiny_model), recipe, out=tmp_path / "out")
    assert result.stored_bytes == tensor_bytes(tmp_path / "out")
    model = library.load(tmp_path / "out")
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_recipe_file_and_flags_give_one_job(tiny_model, tmp_path):
    small = ("--effort", "low", "--num-windows", "4", "--seq-len", "32", "-q")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("bits: 1.5\ndense_bits: 8\nwidths: [1, 2]\nnum_windows: 99\n")
    ok("quantize", tiny_model, "-o", tmp_path / "a", "--recipe", recipe, *small)
    ok("quantize", tiny_model, "-o", tmp_path / "b", "--bits", 1.5, "--dense-bits", 8, "--widths", "1,2", *small)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    # a flag's budget goes before the file's, whatever its kind
    ok("quantize", tiny_model, "-o", tmp_path / "c", "--recipe", recipe, "--stored-bits", 1.9, *small)
    assert gemq("inspect", tmp_path / "c", "--json", "-").json["expert_bits_nominal"] < 1.5


@pytest.mark.parametrize("source", ["text", "jsonl", "mixed"])
def test_calibration_sources(tiny_model, tmp_path, source):
    lines = tmp_path / "lines.jsonl"
    text = builtin_texts()[0].read_text()
    lines.write_text("".join(json.dumps({"text": text[i : i + 500]}) + "\n" for i in range(0, 3000, 500)))
    flags = {"text": [builtin_texts()[0]], "jsonl": [lines], "mixed": ["self", lines, builtin_texts()[1]]}[source]
    arguments = [x for f in flags for x in ("--calibration", f)]
    small = ("--effort", "low", "--num-windows", "7", "--seq-len", "32")
    ran = ok("quantize", tiny_model, "-o", tmp_path / "out", *arguments, *small, "--json", "-")
    names = [f if f == "self" else f.stem for f in flags]
    shares = {1: [7], 3: [3, 2, 2]}[len(names)]
    assert ran.json["windows"] == dict(zip(names, shares, strict=True))


# eval, generate, inspect


@pytest.mark.sample
def test_eval_against_the_reference(finished: Finished, tmp_path):
    ran = ok("eval", finished.out, "--reference", finished.model, "--max-windows", 1, "--json", "-")
    values = ran.json
    assert values.keys() == EVAL_KEYS
    assert set(values["texts"]) == {p.stem for p in builtin_texts()}
    assert all(row.keys() == TEXT_KEYS for row in values["texts"].values())
    assert values["tokens"] == 5 * 511 == sum(row["tokens"] for row in values["texts"].values())
    assert values["stored_bytes"] == tensor_bytes(finished.out)
    assert values["expert_bits_stored"] == pytest.approx(finished.figures["expert_bits_stored"])
    assert 0.1 < values["mean_kl"] < 2
    assert values["mean_kl"] < values["kl_p99"] < values["kl_p999"] < 20
    assert values["fallbacks"] == []
    assert 0.3 < values["top1_agreement"] < 1
    assert len(values["layers"]) == 6
    assert all(0.5 < share <= 1 for share in values["layers"])
    assert values["routing_agreement"] == pytest.approx(sum(values["layers"]) / 6)
    weighted = sum(row["mean_kl"] * row["tokens"] for row in values["texts"].values()) / values["tokens"]
    assert values["mean_kl"] == pytest.approx(weighted)


def test_eval_of_the_reference_itself(finished: Finished, tmp_path):
    text = builtin_texts()[0]
    figures = tmp_path / "figures.json"
    arguments = ("--text", text, "--seq-len", 128, "--max-windows", 2)
    ran = ok("eval", finished.model, "--reference", finished.model, *arguments, "--json", figures)
    values = json.loads(figures.read_text())
    assert "perplexity" in ran.out  # a file leaves the table on the terminal
    assert values["mean_kl"] == values["kl_p999"] == 0
    assert values["top1_agreement"] == values["routing_agreement"] == 1
    assert values["reference_perplexity"] == values["perplexity"]
    assert values["expert_bits_stored"] is None
    assert list(values["texts"]) == [text.stem]
    alone = ok("eval", finished.model, *arguments, "--json", "-").json
    assert alone.keys() == EVAL_KEYS - COMPARED
    assert alone["perplexity"] == values["perplexity"]
    assert alone["layers"] == []


def test_eval_compares_what_the_models_write(finished: Finished, tmp_path):
    figures = tmp_path / "figures.json"
    arguments = ("--text", builtin_texts()[0], "--max-windows", 1, "--generate", "--max-new-tokens", 40)
    ran = ok("eval", finished.out, "--reference", finished.model, *arguments, "--json", figures)
    generation = json.loads(figures.read_text())["generation"]
    assert len(generation["texts"]) == generation["prompts"] == 8  # a window of 512 tokens
    for mode in ("greedy", "sampled"):
        written = [row["model"][mode]["text"] for row in generation["texts"]]
        assert written != [row["reference"][mode]["text"] for row in generation["texts"]]
        assert all(written)
        assert 0.1 < generation["model"][mode]["mean_kl"] < 3
    for role in ("model", "reference"):  # a small model repeats itself unless tokens are sampled
        assert generation[role]["greedy"]["repetition_rate"] > 0.3 > generation[role]["sampled"]["repetition_rate"]
        assert generation[role]["greedy"]["loops"] > 0
    for words in ("8 prompts, up to 40 tokens", "repeated 4-grams", "run into a loop", "end early", "KL on its own"):
        assert words in ran.out
    ran = gemq("eval", finished.out, "--max-new-tokens", 40)
    assert ran.code == 2
    assert ran.err.endswith("add --generate\n")


def test_generate(finished: Finished):
    def write(*arguments: object) -> str:
        return ok("generate", finished.out, "-p", "Once upon", "--max-new-tokens", 12, *arguments).out

    assert write() == write() != ""
    sampled = [write("--temperature", 1, "--seed", seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_inspect(finished: Finished):
    values = ok("inspect", finished.out, "--json", "-").json
    assert values["allocation"] == finished.figures["allocation"]
    assert values["stored_bytes"] == tensor_bytes(finished.out)
    total = values["expert_bytes"] + values["linear_bytes"] + values["other_bytes"]
    assert total == values["stored_bytes"]
    assert values["expert_bits_nominal"] == pytest.approx(finished.figures["expert_bits_nominal"])
    assert values["expert_bits_stored"] == pytest.approx(finished.figures["expert_bits_stored"])
    assert values["linears"] == {"4": 24}
    table = ok("inspect", finished.out).out
    assert "1.6 bit" in table
    assert "olmoe, groups of 128" in table


def test_json_on_stdout_is_alone_there(work, tmp_path, monkeypatch, capfd):
    """HiGHS, the solver, prints stray lines past Python, which a script would take for our JSON."""
    from gemq.allocation import knapsack

    libc, real, calls = ctypes.CDLL(None), knapsack.milp, []

    def milp(*arguments: Any, **options: Any) -> Any:
        calls.append(libc.puts(b"stray"))
        return real(*arguments, **options)

    monkeypatch.setattr(knapsack, "milp", milp)
    for bits in (1.55, 1.65, 1.75):
        ok("export", work, "-o", tmp_path / str(bits), "--bits", bits, "--json", "-")
    libc.fflush(None)
    assert calls
    assert capfd.readouterr().out == ""


# export


def test_export_quantizes_nothing_again(finished: Finished, work, tmp_path):
    stages = [s for name in ("windows", "candidates", "scores-*") for s in work.glob(name)]
    contents_before = {stage: files(stage) for stage in stages}
    assert len(stages) == 3
    assert all(contents_before.values())
    ran = ok("export", work, "-o", tmp_path / "out", "--bits", 1.5, "--json", "-")
    assert {stage: files(stage) for stage in stages} == contents_before
    assert ran.json["stages"].keys() == {"load", "allocate", "save"}
    assert 1.49 < ran.json["expert_bits_nominal"] <= 1.5
    assert ran.json["stored_bytes"] == tensor_bytes(tmp_path / "out") < tensor_bytes(finished.out)


def test_curve_predicts_what_export_gives(work, tmp_path):
    contents_before = {stage: files(stage) for stage in work.iterdir() if stage.is_dir()}
    curve = ok("export", work, "--curve", "--json", "-").json
    assert {stage: files(stage) for stage in work.iterdir() if stage.is_dir()} == contents_before
    points = {p["bits"]: p for p in curve["points"]}
    assert [min(points), max(points), len(points)] == [1, 3, 17]
    for key, rising in (("stored_bytes", True), ("predicted_cost", False)):
        values = [p[key] for p in curve["points"]]
        assert values == sorted(values, reverse=not rising)
    assert all(p["predicted_cost"] <= p["uniform_cost"] for p in curve["points"])
    exported = ok("export", work, "-o", tmp_path / "out", "--bits", 1.5, "--json", "-").json
    assert points[1.5]["stored_bytes"] == exported["stored_bytes"] == tensor_bytes(tmp_path / "out")
    assert points[1.5]["predicted_cost"] == pytest.approx(exported["predicted_cost"])
    rows = (work / "curve.csv").read_text().splitlines()
    assert rows[0].split(",")[0] == "bits"
    assert len(rows) == 18
    assert "checkpoint" in ok("export", work, "--curve", "--allocate", "layerwise").out


@pytest.mark.parametrize("method", ["uniform", "random", "layerwise", "frequency"])
def test_export_of_baselines(work, tmp_path, method):
    ran = ok("export", work, "-o", tmp_path / "out", "--allocate", method, "--bits", 2, "--json", "-")
    widths = ran.json["allocation"]
    assert 1.98 < ran.json["expert_bits_nominal"] <= 2.0
    assert ({w for layer in widths for w in layer} == {2}) == (method == "uniform")
    assert allocation(tmp_path / "out") == widths
    assert "candidates" not in ran.json["stages"]


def test_export_finish_equals_quantize(finished: Finished, work, tmp_path):
    """From the same candidates, ``export --reconstruct`` at quantize's budget gives quantize's checkpoint, and another
    checkpoint than the plain export, which it follows by a reconstruct of its own."""
    shutil.rmtree(next(work.glob("reconstructed*")))
    ok("export", work, "-o", tmp_path / "plain", "--bits", 2, "-q")
    ok("export", work, "-o", tmp_path / "finished", "--bits", 2, "--reconstruct", "-q")
    assert contents(tmp_path / "finished") == contents(finished.out)
    weights = [contents(tmp_path / name)["model.safetensors"] for name in ("plain", "finished")]
    assert weights[0] != weights[1]


def test_an_allocation_edited_by_hand(work, tmp_path):
    file = work / "allocation.json"
    ok("export", work, "-o", tmp_path / "before", "--bits", 2, "-q")
    edited = json.loads(file.read_text())
    assert edited["widths"] == allocation(tmp_path / "before")
    edited["widths"][3][5] = [1, 3] if edited["widths"][3][5] == 1 else 1
    edited_file = tmp_path / "mine.json"
    edited_file.write_text(json.dumps(edited))
    ok("export", work, "-o", tmp_path / "after", "--allocation", edited_file, "-q")
    assert allocation(tmp_path / "after") == edited["widths"]

    from safetensors.torch import load_file

    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    changed = {name for name in a if a[name].shape != b[name].shape or not a[name].equal(b[name])}
    assert changed
    assert all(name.startswith("model.layers.3.mlp.experts.5.") for name in changed)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--size", "2.5MB"), ("--size", "2250kB"), ("--stored-bits", 1.9), ("--stored-bits", 2.25), ("--bits", 1.7)],
)
@pytest.mark.parametrize("method", ["global", "uniform", "random"])
def test_budgets_are_never_exceeded(work, tmp_path, flag, value, method):
    ran = ok("export", work, "-o", tmp_path / "out", flag, value, "--allocate", method, "--json", "-")
    total = tensor_bytes(tmp_path / "out")
    if flag == "--size":
        limit = {"2.5MB": 2_500_000, "2250kB": 2_250_000}[str(value)]
        assert (0.9 if method == "uniform" else 0.99) * limit < total <= limit
    else:
        key = "expert_bits_stored" if flag == "--stored-bits" else "expert_bits_nominal"
        bits = ok("inspect", tmp_path / "out", "--json", "-").json[key]
        assert 0.9 * float(value) < bits <= float(value)
        assert bits == pytest.approx(ran.json[key])


def test_dense_twin(finished: Finished, tmp_path):
    """The plain twin needs no gemq and scores as the packed checkpoint does, but for bfloat16 rounding."""
    twin = tmp_path / "twin"
    ok("export", finished.out, "--dense", twin)
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(twin)!r}, dtype="auto")
AutoTokenizer.from_pretrained({str(twin)!r})
assert model.dtype == torch.bfloat16
assert not hasattr(model.config, "quantization_config")
assert not any(m == "gemq" or m.startswith("gemq.") for m in sys.modules)
"""
    without_gemq = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # torch would import it
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=without_gemq)
    arguments = ("--seq-len", 128, "--max-windows", 2, "--reference", finished.model, "--json", "-")
    packed, dense = (ok("eval", path, *arguments).json for path in (finished.out, twin))
    assert dense["perplexity"] == pytest.approx(packed["perplexity"], rel=5e-3)
    assert dense["mean_kl"] == pytest.approx(packed["mean_kl"], rel=2e-2)


# plan


def test_plan_needs_no_weights_and_is_exact(finished: Finished, work, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(finished.model, model, ignore=shutil.ignore_patterns("*.safetensors"))
    planned = ok("plan", model, "--json", "-").json
    for bits in ("2", "3"):
        ok("export", work, "-o", tmp_path / bits, "--bits", bits, "--allocate", "uniform", "-q")
        assert planned["sizes"][bits] == tensor_bytes(tmp_path / bits)
    assert planned["sizes"]["2"] == pytest.approx(tensor_bytes(finished.out), rel=0.01)
    for key in ("original_bytes", "parameters", "quantized_share"):
        assert planned[key] == finished.figures[key]
    table = ok("plan", model, "--bits", "2.25").out
    for words in (
        "2.25",
        "MB",
        "96 experts in 6 of 6 layers",
        "of memory",
        "% quantized",
        "candidates",
        "Expected time",
    ):
        assert words in table


# help, demo


@pytest.mark.sample
def test_version():
    assert ok("--version").out.startswith(f"gemq {metadata.version('gemq')}, torch {metadata.version('torch')}, ")


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], [], ["quantize", "x"], ["bogus"]])
def test_help_imports_no_torch(arguments):
    code = (
        "import sys\nfrom gemq.cli import run\n"
        f"code = run({arguments!r})\n"
        "assert not {'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    wrong = arguments and "--help" not in arguments
    assert ran.returncode == (2 if wrong else 0), ran.stderr
    assert "Usage: gemq" in ran.stdout or wrong
    assert ran.stderr.count("\n") == (1 if wrong else 0)


def test_output_into_a_pipe_that_closes(finished: Finished):
    command = f"{sys.executable} -m gemq inspect {finished.out} | head -n 1; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0
    assert ran.stderr == ""
    assert "Experts at each width" in ran.stdout


def test_demo(tmp_path, monkeypatch):
    """On a tiny random model; ``make demo`` runs it on the built-in one."""
    from gemq import recipe
    from gemq.cli import run_demo
    from gemq.evaluation import evaluate

    model = make_tiny_model(tmp_path / "model", max_position_embeddings=512)
    monkeypatch.setattr(run_demo, "builtin_model", lambda: model)
    monkeypatch.setattr(run_demo, "WINDOWS", 8)
    monkeypatch.setattr(run_demo, "WINDOW", 64)
    monkeypatch.setattr(run_demo, "TOKENS", 512)
    for effort in recipe.EFFORTS:
        monkeypatch.setitem(recipe.EFFORTS, effort, recipe.EFFORTS["low"])
    monkeypatch.setattr(evaluate, "builtin_texts", lambda: builtin_texts()[:1])
    figures = tmp_path / "figures.json"
    ran = ok("demo", "-o", tmp_path / "demo", "--json", figures)
    rows = json.loads(figures.read_text())["variants"]
    variants = ["random 2.0 *", "uniform 2 bit *", "gemq 2.0 *", "gemq 2.0", "gemq 1.5"]
    assert list(rows) == ["full precision", *variants]
    for name, row in rows.items():
        assert name in ran.out
        assert f"{row['perplexity']:.2f}" in ran.out
        assert row["text"].startswith(run_demo.PROMPT)
    assert rows["full precision"]["mean_kl"] == 0
    assert rows["gemq 1.5"]["bytes"] < rows["gemq 2.0"]["bytes"] < rows["full precision"]["bytes"]
    assert rows["gemq 1.5"]["mean_kl"] > rows["gemq 2.0"]["mean_kl"] > 0
    again = gemq("demo", "-o", tmp_path / "demo")
    assert again.code == 2
