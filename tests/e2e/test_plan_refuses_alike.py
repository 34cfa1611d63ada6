"""What ``quantize`` refuses before it computes, ``plan`` refuses as well; and it says what a budget buys."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from gemq.assets import builtin_model
from support.cli import gemq


@pytest.mark.parametrize(
    "flags",
    [
        ("--size", "1MB"),
        ("--size", "1e400"),
        ("--stored-bits", "9"),
        ("--stored-bits", "1.1"),
        ("--bits", "0"),
        ("--bits", "9"),
        ("--calibration", "nowhere.txt"),
        ("--calibration", "a" * 5000),
        ("--seq-len", "5000"),
        ("--allocation", "nowhere.json"),
        ("--allocate", "best"),
        ("--progressive", "2.0,2.5"),
        ("--seed", str(2**64)),
        ("--seed", "-1"),
        ("--host-memory", "4MB"),
        ("--host-memory", "1e400"),
        ("--gpu-memory", "1GB"),
        ("--group-size", "100"),
        ("--dtype", "float16"),
        ("--device", "mps"),
        ("--recipe", "missing.yaml"),
        ("--num-windows", "100000000000"),
    ],
)
def test_the_same_refusals(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    common = ("--device", "cpu") if "--device" not in flags else ()
    planned = gemq("plan", builtin_model(), *common, *flags)
    quantized = gemq("quantize", builtin_model(), "-o", "x", *common, *flags)
    assert planned.code == quantized.code == 2
    assert planned.err == quantized.err
    assert planned.err.count("\n") == 1
    assert len(planned.err) < 600
    assert not list(tmp_path.iterdir())


def test_calibration_files_of_a_plan(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("far too short")
    assert "fewer than a window" in gemq("plan", builtin_model(), "--calibration", text).err


@pytest.mark.parametrize(
    "flags", [("--progressive", "3.0,2.5,2.0"), ("--host-memory", "2GB"), ("--seed", str(2**53 + 1))]
)
def test_flags_of_quantize_that_plan_takes(flags):
    ran = gemq("plan", builtin_model(), "--device", "cpu", *flags, "--json", "-")
    assert ran.code == 0, ran.err
    assert ran.json["bits"] == 2


def test_a_plan_needs_no_weights_but_checks_those_that_are_there(tmp_path):
    model = Path(shutil.copytree(builtin_model(), tmp_path / "model"))
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-1000])
    ran = gemq("plan", model)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "model.safetensors" in ran.err
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "x.safetensors"}}')
    assert gemq("plan", model).code == 0


def test_a_size_buys_bits(tmp_path):
    """Those at which the plan's own table has that size."""
    plans = {
        bits: gemq("plan", builtin_model(), "--bits", bits, "--json", "-").json for bits in ("1.6", "2", "2.25", "3")
    }
    for bits, planned in plans.items():
        size = planned["sizes"][bits]
        bought = gemq("plan", builtin_model(), "--size", f"{size}B", "--json", "-").json
        assert bought["bits"] == pytest.approx(float(bits), abs=1e-3)
        assert bought["sizes"][f"{bought['bits']:.4g}"] == pytest.approx(size, rel=1e-3)
    table = gemq("plan", builtin_model(), "--size", "3MB").out
    assert "budget 0.003 GB (2.787 bits per expert weight)" in table
    stored = gemq("plan", builtin_model(), "--stored-bits", "2.125", "--json", "-").json
    assert stored["bits"] == pytest.approx(2, abs=0.01)
    assert gemq("plan", builtin_model(), "--size", "900GB", "--json", "-").json["bits"] == 4


def test_a_plan_tells_when_this_machine_is_too_small(monkeypatch):
    """It is no refusal: a plan may be for another machine."""
    monkeypatch.setattr("gemq.runtime.memory.free_host_bytes", lambda: 10_000_000)
    ran = gemq("plan", builtin_model(), "--device", "cpu")
    assert ran.code == 0, ran.err
    assert "quantize would refuse here" in ran.out


@pytest.mark.parametrize("name", ["file", "."])
def test_demo_into_something_that_exists(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    ran = gemq("demo", "-o", name)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert Path("file").read_text() == "mine"


def test_figures_do_not_replace_what_is_no_file(tmp_path, monkeypatch):
    """A rename would put a file in the place of a pipe, or of a device such as /dev/null."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    ran = gemq("plan", builtin_model(), "--json", "pipe")
    assert ran.code == 2
    assert "--json pipe is not a regular file" in ran.err
    assert Path("pipe").is_fifo()
