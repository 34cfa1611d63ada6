"""A job killed at any moment and resumed gives the bytes of one that was left alone."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemq.assets import builtin_texts
from gemq.models import file_hashes
from gemq.models.source import Source
from gemq.pipeline.workdir import WorkDir
from support.cli import Finished, contents, gemq, least_bytes, make_tiny_model
from support.killer import Killer

TINY = {"effort": "low", "num_windows": 4, "seq_len": 8, "micro_batch_tokens": 16}
TRAINED = {
    **TINY,
    "progressive": [2.5, 2.0],
    "candidate_epochs": 1,
    "reconstruction_epochs": 1,
    "distill_epochs": 1,
    "total_tokens": 64,
}
FLAGS = ("--effort", "low", "--num-windows", "4", "--seq-len", "8", "--quiet")


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Killer]:
    with contextlib.closing(Killer(tiny_model, tmp_path_factory.mktemp("kills"), TINY)) as killer:
        yield killer


@pytest.fixture
def trainer(tmp_path: Path, tiny_model: Path) -> Iterator[Killer]:
    with contextlib.closing(Killer(tiny_model, tmp_path, TRAINED)) as killer:
        yield killer


@pytest.fixture
def bounded(tmp_path: Path, tiny_model: Path) -> Iterator[Killer]:
    """Every layer is read anew when it is needed, and activations lie in files."""
    recipe = {
        **TINY,
        "calibration": [str(builtin_texts()[0])],
        "guard": False,
        "reconstruction_epochs": 1,
        "distill_epochs": 1,
    }
    with contextlib.closing(Killer(tiny_model, tmp_path, recipe, least_bytes(tiny_model, recipe))) as killer:
        yield killer


@pytest.mark.parametrize(
    ("kind", "times"),
    [pytest.param("killer", 3, marks=pytest.mark.xdist_group("killer")), ("trainer", 4), ("bounded", 2)],
)
def test_killed_at_random_moments(request: pytest.FixtureRequest, kind: str, times: int):
    """Some kills on the way to each result; with training and without."""
    killer: Killer = request.getfixturevalue(kind)
    seed = time.time_ns()
    draw = random.Random(seed)
    kills = rounds = 0
    while kills < times:
        name, attempts = f"random-{rounds}", 0
        while True:
            delay = draw.uniform(0.0, 1.1) * killer.seconds
            ended = killer.run(name, resume=attempts > 0, delay=delay)
            assert ended["code"] in (0, -signal.SIGKILL), (seed, ended)
            kills, attempts = kills + (ended["code"] != 0), attempts + 1
            if ended["code"] == 0 or attempts == 4:
                break
        killer.finish(name, f"seed {seed}, round {rounds}")
        rounds += 1


@pytest.mark.parametrize("offset", range(4))
def test_killed_at_every_write(killer: Killer, offset: int):
    """With every file that a job writes cut in half; when it goes on, before that file's rename, when it is whole
    under its passing name. Flushes change nothing that a killed process could leave; the last one is behind the last
    rename."""
    names = killer.expected["calls"]
    calls = [n for n, name in enumerate(names, start=1) if name.startswith(("write_", "save_"))]
    assert len(calls) > 15
    for call in calls[offset::4]:
        name = f"call-{call}"
        halved = killer.run(name, resume=False, call=call, half=True)
        assert halved["code"] == -signal.SIGKILL, (call, halved)
        renamed = killer.run(name, resume=True, rename=halved["path"])
        assert renamed["code"] == -signal.SIGKILL, (call, renamed)
        killer.finish(name, f"call {call} of {len(names)}: {names[call - 1]} {halved['path']}")


def test_killed_right_after_the_output_appeared(killer: Killer):
    """The last write is the flush behind the rename of the output: all is there, and recognised as complete."""
    ended = killer.run("renamed", resume=False, call=len(killer.expected["calls"]))
    assert ended["code"] == -signal.SIGKILL
    assert contents(killer.base / "renamed") == killer.bytes
    assert killer.finish("renamed", "renamed")["complete_before"]


# One process


@pytest.fixture
def job(tiny_model: Path, tmp_path: Path) -> tuple[object, ...]:
    """The arguments of a job that has ended well, in ``tmp_path``."""
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copy(builtin_texts()[0], tmp_path / "calib.txt")
    arguments = (
        "quantize",
        tmp_path / "model",
        "-o",
        tmp_path / "out",
        *FLAGS,
        "--calibration",
        tmp_path / "calib.txt",
    )
    assert gemq(*arguments).code == 0
    return arguments


def test_resume_of_a_finished_job(job, tmp_path):
    mtimes = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()}
    ran = gemq(*job, "--resume", "--json", tmp_path / "figures.json")
    assert ran.code == 0
    loud = gemq(*(a for a in job if a != "--quiet"), "--resume")
    assert loud.code == 0
    assert "was complete already" in loud.out
    assert "Saved" not in loud.out
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()} == mtimes
    assert json.loads((tmp_path / "figures.json").read_text())["complete_before"] is True


def refused(job: tuple[object, ...], *words: str) -> None:
    ran = gemq(*job, "--resume")
    assert ran.code == 2, ran
    assert ran.err.count("\n") == 1, ran.err
    for word in (*words, "--work"):
        assert word in ran.err, ran.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--num-windows", 5), ("windows 4", "now has 5")),
        (("--bits", 1.5), ("bits unset", "now has 1.5")),
        (("--widths", "2,3"), ("widths unset", "now has 2,3")),
        (("--dense-bits", 8), ("dense_bits 4", "now has 8")),
        (("--seed", 1), ("seed 0", "now has 1")),
        (("--calibration", "self"), ("calibration", "now has")),
    ],
)
def test_another_recipe_is_refused(job, flags, words):
    contents_before = contents(Path(str(job[3])))
    refused((*job, *flags), *words)
    assert contents(Path(str(job[3]))) == contents_before
    assert gemq(*job, "--resume").code == 0  # and did no harm


def test_a_changed_model_is_refused(job, tmp_path):
    make_tiny_model(tmp_path / "model", seed=1)
    refused(job, "another model", "has changed")


def test_files_that_have_not_changed_are_not_read_again(tiny_model, tmp_path, monkeypatch):
    """A fingerprint is one of every byte; what was read before is known by its size and time."""
    shutil.copytree(tiny_model, tmp_path / "model")
    model = Source(tmp_path / "model")
    first, files = model.fingerprint()
    read: list[str] = []
    digest = file_hashes._FileHasher._read

    def noted(self: Any, path: Path) -> str:
        read.append(path.name)
        return digest(self, path)

    monkeypatch.setattr(file_hashes._FileHasher, "_read", noted)
    assert model.fingerprint(files) == (first, files)
    assert read == []
    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(0, files[weights.name][1] + 1))
    assert model.fingerprint(files)[0] != first
    assert read == [weights.name]
    os.utime(tmp_path / "model" / "config.json")  # touched, not changed
    assert model.fingerprint(files)[0] == model.fingerprint()[0]


def test_another_model_is_refused(job, tmp_path):
    other_model = make_tiny_model(tmp_path / "other", seed=1)
    refused((job[0], other_model, *job[2:]), "another model")


def test_a_changed_calibration_text_is_refused(job, tmp_path):
    with open(tmp_path / "calib.txt", "a") as file:
        file.write("One more line.\n")
    refused(job, "another calibration text", "has changed")


def test_a_changed_stage_is_named(job, tmp_path):
    """Should a stage's inputs differ although the job's do not, such as after an upgrade of gemq."""
    stage = tmp_path / "out.work" / "candidates" / "stage.json"
    stage.write_text(json.dumps({**json.loads(stage.read_text()), "dampening": 0.5}))
    refused(job, "dampening", "0.5", "now 0.01")


def test_another_output_from_the_same_work_directory(job, tmp_path):
    """Deleted outputs are written again, elsewhere too, and nothing is computed for it."""
    expected = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert gemq(*job, "--resume").code == 0
    assert contents(tmp_path / "out") == expected
    elsewhere = ["quantize", job[1], "-o", tmp_path / "new", *job[4:], "--work", tmp_path / "out.work", "--resume"]
    ran = gemq(*elsewhere, "--json", "-")
    assert contents(tmp_path / "new") == expected
    assert not {"candidates", "scores", "reconstruct", "calibration windows"} & ran.json["stages"].keys()


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", ".gemq-work.json.tmp"]])
def test_resume_with_nothing_usable_starts_anew(tiny_model, tmp_path, killer, left):
    work = tmp_path / "w"
    work.mkdir()
    for name in left:
        (work / name).write_text("")
    arguments = ("quantize", tiny_model, "-o", tmp_path / "out", *FLAGS, "--work", work)
    if left:
        assert gemq(*arguments).code == 2
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"micro_batch_tokens: {TINY['micro_batch_tokens']}\n")
    ran = gemq(*arguments, "--resume", "--recipe", recipe)
    assert ran.code == 0, ran.err
    assert contents(tmp_path / "out") == killer.bytes


@pytest.mark.sample
def test_resume_without_a_work_directory_starts_anew(tiny_model, tmp_path):
    assert gemq("quantize", tiny_model, "-o", tmp_path / "out", *FLAGS, "--resume").code == 0


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    work = tmp_path / "w"
    code = (
        "import os, pathlib, time\nfrom gemq.pipeline.workdir import WorkDir\n"
        f"w = WorkDir(pathlib.Path({str(work)!r}), resume=False)\n"
        "print('locked', flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match="in use by another"):
        WorkDir(work, resume=True)
    process.kill()
    process.wait()
    with WorkDir(work, resume=True):
        pass


def test_export_of_an_unfinished_job(finished: Finished, work: Path, tmp_path: Path):
    """It computes what is missing rather than fail or guess."""
    (work / "candidates" / "layer-005.safetensors").unlink()
    shutil.rmtree(next(work.glob("scores-*")))
    ran = gemq("export", work, "-o", tmp_path / "out", "--bits", 2, "--reconstruct", "--json", "-")
    assert ran.code == 0, ran.err
    assert ran.json["stages"].keys() >= {"candidates", "scores"}
    assert contents(tmp_path / "out") == contents(finished.out)
