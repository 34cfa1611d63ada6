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
from support.cli import Finished, Scene, contents, few_guard_windows, gemq, least_bytes, make_tiny_model
from support.killer import Killer, KillServer

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


@pytest.fixture(scope="session")
def kill_server() -> Iterator[KillServer]:
    with contextlib.closing(KillServer()) as server:
        yield server


@pytest.fixture(scope="module")
def killer(kill_server: KillServer, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Killer:
    return Killer(kill_server, tiny_model, tmp_path_factory.mktemp("kills"), TINY)


@pytest.fixture
def trainer(kill_server: KillServer, tmp_path: Path, tiny_model: Path) -> Killer:
    return Killer(kill_server, tiny_model, tmp_path, TRAINED)


@pytest.fixture
def bounded(kill_server: KillServer, tmp_path: Path, tiny_model: Path) -> Killer:
    """Every layer is read anew when it is needed, and activations lie in files."""
    recipe = {
        **TINY,
        "calibration": [str(builtin_texts()[0])],
        "guard": False,
        "reconstruction_epochs": 1,
        "distill_epochs": 1,
    }
    return Killer(kill_server, tiny_model, tmp_path, recipe, least_bytes(tiny_model, recipe))


@pytest.mark.parametrize("kind", ["killer", "trainer", "bounded"])
def test_killed_at_random_moments(request: pytest.FixtureRequest, kill_server, kind: str):
    """With training and without. ``many_kills.py`` has a hundred."""
    killer: Killer = request.getfixturevalue(kind)
    seed = time.time_ns()
    draw = random.Random(seed)
    kills = rounds = 0
    while kills == 0:
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


def test_killed_at_every_write(killer: Killer):
    """One job, killed twice at every file that it writes: with the file cut in half, and before the whole file is
    renamed. Flushes change nothing that a killed process could leave; the last one is behind the last rename."""
    writes = [name for name in killer.expected["calls"] if name.startswith(("write_", "save_"))]
    assert len(writes) > 15
    halved: list[str] = []
    while (ended := killer.run("writes", resume=bool(halved), spared=halved))["code"] != 0:
        assert ended["code"] == -signal.SIGKILL, (halved, ended)
        halved.append(ended["path"])
        renamed = killer.run("writes", resume=True, rename=ended["path"])
        assert renamed["code"] == -signal.SIGKILL, (halved, renamed)
    assert len(halved) == len(writes)
    killer.finish("writes", f"killed at {halved}")


def test_killed_right_after_the_output_appeared(killer: Killer):
    """The last write is the flush behind the rename of the output: all is there, and recognised as complete."""
    ended = killer.run("renamed", resume=False, call=len(killer.expected["calls"]))
    assert ended["code"] == -signal.SIGKILL
    assert contents(killer.base / "renamed") == killer.bytes
    assert killer.finish("renamed", "renamed")["complete_before"]


# One process


@pytest.fixture(scope="module")
def ended_job(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    def make(path: Path) -> None:
        shutil.copytree(tiny_model, path / "model")
        shutil.copy(builtin_texts()[0], path / "calib.txt")
        with pytest.MonkeyPatch.context() as patch:
            few_guard_windows(patch)
            assert gemq(*arguments_in(path)).code == 0

    return Scene(tmp_path_factory.mktemp("ended"), make)


def arguments_in(path: Path) -> tuple[object, ...]:
    return ("quantize", path / "model", "-o", path / "out", *FLAGS, "--calibration", path / "calib.txt")


@pytest.fixture
def base(ended_job: Scene) -> Path:
    """A directory with a job that has ended well: model, calib.txt, out, out.work."""
    return ended_job.restored()


@pytest.fixture
def job(base: Path) -> tuple[object, ...]:
    """The arguments of that job."""
    return arguments_in(base)


def test_resume_of_a_finished_job(job, base):
    mtimes = {f: f.stat().st_mtime_ns for f in (base / "out").iterdir()}
    ran = gemq(*job, "--resume", "--json", base / "figures.json")
    assert ran.code == 0
    loud = gemq(*(a for a in job if a != "--quiet"), "--resume")
    assert loud.code == 0
    assert "was complete already" in loud.out
    assert "Saved" not in loud.out
    assert {f: f.stat().st_mtime_ns for f in (base / "out").iterdir()} == mtimes
    assert json.loads((base / "figures.json").read_text())["complete_before"] is True


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


def test_a_changed_model_is_refused(job, base):
    make_tiny_model(base / "model", seed=1)
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


def test_another_model_is_refused(job, base):
    other_model = make_tiny_model(base / "other", seed=1)
    refused((job[0], other_model, *job[2:]), "another model")


def test_a_changed_calibration_text_is_refused(job, base):
    with open(base / "calib.txt", "a") as file:
        file.write("One more line.\n")
    refused(job, "another calibration text", "has changed")


def test_a_changed_stage_is_named(job, base):
    """Should a stage's inputs differ although the job's do not, such as after an upgrade of gemq."""
    stage = base / "out.work" / "candidates" / "stage.json"
    stage.write_text(json.dumps({**json.loads(stage.read_text()), "dampening": 0.5}))
    refused(job, "dampening", "0.5", "now 0.01")


def test_another_output_from_the_same_work_directory(job, base):
    """Deleted outputs are written again, elsewhere too, and nothing is computed for it."""
    expected = contents(base / "out")
    shutil.rmtree(base / "out")
    assert gemq(*job, "--resume").code == 0
    assert contents(base / "out") == expected
    elsewhere = ["quantize", job[1], "-o", base / "new", *job[4:], "--work", base / "out.work", "--resume"]
    ran = gemq(*elsewhere, "--json", "-")
    assert contents(base / "new") == expected
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
