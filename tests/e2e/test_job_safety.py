"""Work directories from elsewhere, outputs that were damaged, texts and models that moved, two jobs with one output."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gemq as library
from gemq.assets import builtin_texts
from gemq.checkpoint.outputs import lock_output
from gemq.layers.training import Optimizer
from gemq.pipeline.job_record import read_job
from gemq.pipeline.quantize import export, quantize
from gemq.recipe import Recipe
from support.cli import Ran, Scene, contents, few_guard_windows, gemq, make_tiny_model

LOW = ("--effort", "low", "--num-windows", "4", "--seq-len", "32", "--device", "cpu")


def line(ran: Ran, *words: str) -> None:
    """A refusal: one line with ``words`` in it."""
    assert ran.code == 2, (ran.out, ran.err)
    assert ran.err.startswith("gemq: "), ran.err
    assert ran.err.count("\n") == 1, ran.err
    for word in words:
        assert word in ran.err, ran.err


@pytest.fixture(scope="module")
def finished_job(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    def make(path: Path) -> None:
        shutil.copytree(tiny_model, path / "m1")
        (path / "a").mkdir()
        (path / "b").mkdir()
        shutil.copy(builtin_texts()[0], path / "a" / "my.txt")
        with pytest.MonkeyPatch.context() as patch:
            few_guard_windows(patch)
            patch.chdir(path / "a")
            ran = gemq("quantize", "../m1", "-o", "out", *LOW, "--calibration", "my.txt", "-q")
        assert ran.code == 0, ran.err

    return Scene(tmp_path_factory.mktemp("finished"), make)


@pytest.fixture
def base(finished_job: Scene) -> Path:
    """Directory with a model in m1/, an empty b/, and a/ with a finished job: my.txt, out, out.work."""
    return finished_job.restored()


@pytest.fixture
def job(base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory a/, which is the current one."""
    monkeypatch.chdir(base / "a")
    return base / "a"


# A work directory from somebody else

CONFIG = {
    "model_type": "foreign",
    "architectures": ["ForeignForCausalLM"],
    "auto_map": {"AutoConfig": "foreign.ForeignConfig", "AutoModelForCausalLM": "foreign.ForeignForCausalLM"},
}
CODE = """
from pathlib import Path
Path(__file__).with_name("executed").touch()
Path({place!r}).touch()
from transformers import PretrainedConfig
class ForeignConfig(PretrainedConfig): model_type = "foreign"
class ForeignForCausalLM: pass
"""


@pytest.mark.parametrize("claims_trust", [True, False])
@pytest.mark.parametrize("flags", [("-o", "x", "--bits", "2"), ("--curve",)])
def test_no_file_of_a_work_directory_lets_code_run(job, base, tmp_path, flags, claims_trust):
    executed = base / "executed"
    model = job / "out.work" / tmp_path.name  # Python imports a file once
    model.mkdir()
    shutil.copy(base / "m1" / "model.safetensors", model)
    (model / "config.json").write_text(json.dumps(CONFIG))
    (model / "foreign.py").write_text(CODE.format(place=str(executed)))
    record = read_job(job / "out.work")
    assert record is not None
    files = {**record.files, "config.json": [0, 0, _sha256(model / "config.json")]}
    replace(record, model=str(model), files=files).write(job / "out.work")
    path = job / "out.work" / "job.json"
    if claims_trust:
        path.write_text(json.dumps({**json.loads(path.read_text()), "trust_remote_code": True}))
    line(gemq("export", "out.work", *flags), "other keys" if claims_trust else "--trust-remote-code")
    assert not executed.exists()
    if not claims_trust:
        with contextlib.suppress(Exception):  # it is no model
            gemq("export", "out.work", *flags, "--trust-remote-code")
        assert executed.exists()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_link_in_a_work_directory_is_refused_by_every_command(job, base):
    (base / "thesis.txt").write_text("mine")
    (job / "out.work" / ".lock").unlink()
    (job / "out.work" / ".lock").symlink_to(base / "thesis.txt")
    for arguments in (("-o", "x", "--bits", "2"), ("--curve",)):
        line(gemq("export", "out.work", *arguments), ".lock", "link")
    line(gemq("quantize", "../m1", "-o", "out", *LOW, "--calibration", "my.txt", "--resume"), ".lock", "link")
    assert (base / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("job.json", ""),
        ("job.json", "{}"),
        ("job.json", "[" * 100_000),
        ("job.json", "null"),
        ("candidates/stage.json", "{"),
        ("windows/notes.json", "{}"),
        ("results.json", "[]"),
        ("gemq-work.json", "x"),
    ],
)
def test_damaged_json_of_a_work_directory(job, name, text):
    (job / "out.work" / name).write_text(text)
    resumed = gemq("quantize", "../m1", "-o", "out", *LOW, "--calibration", "my.txt", "--resume", "-q")
    line(resumed, name if name != "results.json" else "results.json", "damaged")


def test_a_changed_number_of_the_recorded_recipe_is_noticed(job):
    """Such as smoothing, which decides the allocation and which no stage's inputs name."""
    path = job / "out.work" / "job.json"
    path.write_text(path.read_text().replace('"smoothing": 2.0', '"smoothing": 3.0'))
    line(gemq("export", "out.work", "-o", "x", "--bits", "1.5"), "job.json is damaged")


# A finished output


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda out: (out / "model.safetensors").unlink(), ("no safetensors",)),
        (lambda out: os.truncate(out / "model.safetensors", 1000), ("model.safetensors",)),
        (lambda out: shutil.copy(out.parent.parent / "m1" / "model.safetensors", out), ("do not match config.json",)),
        (lambda out: (out / "tokenizer.json").unlink(), ("tokenizer.json is not the model's",)),
        (lambda out: (out / "tokenizer.json").write_text("{}"), ("tokenizer.json is not the model's",)),
    ],
)
def test_a_damaged_output_is_not_complete(job, damage: Callable[[Path], object], words):
    damage(job / "out")
    contents_before = contents(job / "out")
    resumed = gemq("quantize", "../m1", "-o", "out", *LOW, "--calibration", "my.txt", "--resume")
    line(resumed, "out is no longer complete", *words, "delete it")
    assert contents(job / "out") == contents_before
    shutil.rmtree(job / "out")
    assert gemq("quantize", "../m1", "-o", "out", *LOW, "--calibration", "my.txt", "--resume", "-q").code == 0


def test_another_output_is_refused_at_once(job):
    """With a new work directory there is nothing to go on with, so the output cannot be this job's."""
    line(
        gemq("quantize", "../m1", "-o", "out", *LOW, "--bits", "1.5", "--work", "new", "--resume"), "out exists and is"
    )
    assert not (job / "new").exists()
    assert gemq("export", "out.work", "-o", "other", "--bits", "1.5", "-q").code == 0
    computed = gemq(
        "quantize", "../m1", "-o", "other", *LOW, "--calibration", "my.txt", "--work", "out.work", "--resume"
    )
    line(computed, "other exists and is not what the job in out.work writes")


def test_two_jobs_with_one_output(job):
    (job / "mine").mkdir()
    contents_before = contents(job)
    with lock_output(Path("mine")):
        words = ("another gemq process writes mine", "name another output")
        line(gemq("export", "out.work", "-o", "mine", "--bits", "1.5"), *words)
        line(gemq("export", "out", "--dense", "mine"), *words)
        line(gemq("quantize", "../m1", "-o", "mine", *LOW, "--work", "w"), *words)
        assert not (job / "w").exists()
    assert contents(job) == contents_before
    assert gemq("export", "out.work", "-o", "mine", "--bits", "1.5", "-q").code == 0


# Texts and models that are no longer where they were


def test_export_needs_no_calibration_text(job, base, monkeypatch):
    def exported(name: str, *flags: object) -> None:
        ran = gemq("export", job / "out.work", "-o", base / name, "--bits", "1.5", "-q", *flags)
        assert ran.code == 0, ran.err

    exported("here")
    monkeypatch.chdir(base / "b")
    exported("elsewhere")
    (base / "b" / "my.txt").write_text("other words " * 500)
    exported("beside another my.txt", "--reconstruct")
    (job / "my.txt").unlink()
    exported("gone", "--reconstruct")
    assert contents(base / "here") == contents(base / "elsewhere")
    assert contents(base / "beside another my.txt") == contents(base / "gone")


def test_a_text_that_is_still_needed_is_the_recorded_one(job, base, monkeypatch):
    shutil.rmtree(job / "out.work" / "guard-windows")
    expected = contents(job / "out")
    monkeypatch.chdir(base / "b")
    (base / "b" / "my.txt").write_text("other words " * 500)
    ran = gemq("export", job / "out.work", "-o", "x", "--bits", "2", "--reconstruct", "-q")
    assert ran.code == 0, ran.err
    assert contents(base / "b" / "x") == expected
    shutil.rmtree(job / "out.work" / "guard-windows")
    (job / "my.txt").write_text("other words " * 500)
    line(
        gemq("export", job / "out.work", "-o", "y", "--bits", "2", "--reconstruct"),
        "my.txt",
        "has changed",
        "put it back",
    )
    assert gemq("export", job / "out.work", "-o", "y", "--bits", "2", "-q").code == 0


def test_the_same_text_by_another_path(job, base):
    resumed = gemq("quantize", "../m1", "-o", "out", *LOW, "--calibration", job / "my.txt", "--resume", "-q")
    assert resumed.code == 0, resumed.err


def test_a_model_that_was_moved(job, base):
    shutil.move(base / "m1", base / "m2")
    line(gemq("export", "out.work", "-o", "x", "--bits", "1.5"), "is gone", "--model")
    line(gemq("export", "out.work", "--curve"), "is gone", "--model")
    assert gemq("export", "out.work", "-o", "x", "--bits", "1.5", "--model", "../m2", "-q").code == 0
    assert gemq("export", "out.work", "--curve", "--model", "../m2", "-q").code == 0
    different_model = make_tiny_model(base / "m3", seed=1, num_hidden_layers=3)
    line(gemq("export", "out.work", "--curve", "--model", different_model), "is not the model")
    line(gemq("export", "out.work", "-o", "y", "--model", make_tiny_model(base / "m4", seed=1)), "is not the model")
    assert gemq("quantize", "../m2", "-o", "out", *LOW, "--calibration", "my.txt", "--resume", "-q").code == 0
    assert gemq("export", "out.work", "-o", "z", "--bits", "1.5", "-q").code == 0  # which knows its new place
    assert contents(job / "x") == contents(job / "z")


def test_a_checkpoint_is_made_again_from_its_recipe(job):
    """Of an export without training, whose recipe says so. Only the card tells why no guard ran.

    The original has a card that is no valid YAML, of which the job says so.
    """
    (job.parent / "m1" / "README.md").write_text("---\nlicense: [mit\n---\n")
    exported = gemq("export", "out.work", "-o", "plain", "--stored-bits", "1.8")
    assert exported.code == 0
    assert "1 model card of the original cannot be read" in exported.out
    ran = gemq("quantize", "../m1", "-o", "again", "--recipe", "plain/recipe.yaml", "-q")
    assert ran.code == 0, ran.err
    expected = contents(job / "plain")
    expected.pop("README.md")
    assert expected.items() <= contents(job / "again").items()


# Python


def test_paths_in_python(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(effort="low", num_windows=4, seq_len=16, calibration=(builtin_texts()[0],), guard=False)  # type: ignore[arg-type]
    result = quantize(tiny_model, recipe, out=Path("out"), device="cpu")
    assert result.out == Path("out")
    export(Path("out.work"), out="other", changes={"bits": 1.5}, model=tiny_model, device="cpu")
    assert library.load(Path("out"), device=torch.device("cpu"))
    with pytest.raises(library.UserError, match="dtype cannot be 'fp32': give auto, float32"):
        library.load("out", dtype="fp32")
    with pytest.raises(library.UserError, match="there is no device 'gpu'"):
        library.load("out", device="gpu")


@pytest.mark.parametrize("device", ["mps", "xpu", "hip", "meta", "nonsense", "cuda:-1", ""])
def test_devices_that_are_not_supported(tiny_model, tmp_path, monkeypatch, device):
    monkeypatch.chdir(tmp_path)
    for command in (("quantize", "-o", "x"), ("plan",), ("eval",), ("bench", "-q")):
        line(gemq(*command, tiny_model, "--device", device), f"'{device}'", "cpu or cuda")
    assert not list(tmp_path.iterdir())


# Training that goes wrong


def spoiled(real: Callable[[Optimizer], None], everything: bool) -> Callable[[Optimizer], None]:
    """An optimizer's step after which its parameters are NaN: all, or one number of the last that it has."""

    def update(self: Optimizer) -> None:
        real(self)
        with torch.no_grad():
            parameters = [p for group in self.inner.param_groups for p in group["params"]] if self.inner else []
            for parameter in parameters if everything else parameters[-1:]:
                parameter.view(-1)[None if everything else -1] = float("nan")

    return update


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("stage", ["reconstruction_epochs", "distill_epochs"])
def test_training_that_ends_in_nan_is_not_kept(tiny_model, tmp_path, monkeypatch, stage, everything):
    monkeypatch.setattr(Optimizer, "update", spoiled(Optimizer.update, everything))
    epochs = {"reconstruction_epochs": 0, "distill_epochs": 0, stage: 1}
    text = str(builtin_texts()[0])
    recipe = Recipe(
        effort="low", num_windows=4, seq_len=16, micro_batch_tokens=16, calibration=(text,), guard=False, **epochs
    )
    result = quantize(str(tiny_model), recipe, out=tmp_path / "out", device="cpu")
    counted = {
        "reconstruction_epochs": ("layers_not_improved_by_training", 2),
        "distill_epochs": ("distillation_dropped", 1),
    }
    name, count = counted[stage]
    assert result.fallbacks[name] == count
    assert not any(math.isnan(gain) for gain in result.gains.values())
    model = library.load(tmp_path / "out")
    assert model(torch.arange(3, 30)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    "keys",
    [
        {"candidate_epochs": 1, "lr_candidates": 0, "lr_codes": 0, "lr_grids": 0},
        {"reconstruction_epochs": 1, "lr_codes": 0, "lr_grids": 0, "lr_tuned": 0},
        {"distill_epochs": 1, "lr_tuned": 0},
        {"distill_epochs": 1, "lr_grids": 0, "lr_tuned": 0},
        {"distill_epochs": 1, "lr_grids": 0, "distill_parameters": ("grids",)},
    ],
)
def test_a_learning_rate_of_0_leaves_things_as_they_are(tiny_model, tmp_path, keys):
    text = str(builtin_texts()[0])
    recipe = Recipe(
        effort="low", num_windows=4, seq_len=16, micro_batch_tokens=16, calibration=(text,), guard=False, **keys
    )
    assert quantize(str(tiny_model), recipe, out=tmp_path / "out", device="cpu").expert_bits_nominal <= 2
