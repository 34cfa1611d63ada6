"""Files of a work directory that were damaged, swapped or edited are refused with their name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemq.errors import UserError
from gemq.pipeline.workdir import MARKER, WorkDir

INPUTS = {"a": 1, "b": [0.5, "x"]}
TENSORS = {"codes": torch.arange(64, dtype=torch.uint8).view(8, 8), "notes": torch.tensor([1.5, 2.5])}


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A stage with two sets of tensors and a JSON result. A second stage has a set of the same name."""
    with WorkDir(tmp_path / "work", resume=False) as work:
        saved = work.stage("one", INPUTS)
        saved.save_tensors("layer-000.safetensors", TENSORS, {"names": ["n"]})
        saved.save_tensors("layer-001.safetensors", {"codes": TENSORS["codes"].T, "empty": torch.zeros(0)})
        saved.save_json("notes.json", {"count": 3})
        work.stage("two", {"a": 2}).save_tensors("layer-000.safetensors", TENSORS)
    return tmp_path / "work" / "one"


def resume(stage: Path) -> None:
    with WorkDir(stage.parent, resume=True) as work:
        work.stage(stage.name, INPUTS)


def test_what_was_saved_comes_back(stage):
    with WorkDir(stage.parent, resume=True) as work:
        saved = work.stage("one", INPUTS)
        assert saved.about("layer-000.safetensors")["names"] == ["n"]
        tensors = saved.load_tensors("layer-000.safetensors")
        assert {name: t.tolist() for name, t in tensors.items()} == {n: t.tolist() for n, t in TENSORS.items()}
        assert saved.load_json("notes.json") == {"count": 3}


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 8
    path.write_bytes(data)


def swap(stage: Path) -> None:
    layer_0, layer_1 = stage / "layer-000.safetensors", stage / "layer-001.safetensors"
    shutil.move(layer_0, stage / "x")
    shutil.move(layer_1, layer_0)
    shutil.move(stage / "x", layer_1)


def edit(path: Path) -> None:
    """As somebody would who opens the file and saves it again."""
    tensors = load_file(path)
    tensors["notes"] = -tensors["notes"]
    os.remove(path)  # whose contents are mapped
    save_file(tensors, path)


def change_json(path: Path) -> None:
    path.write_text(path.read_text().replace("3", "4"))


FIRST = "layer-000.safetensors"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda d: os.truncate(d / FIRST, 100), FIRST),
        (lambda d: os.truncate(d / FIRST, (d / FIRST).stat().st_size - 1), FIRST),
        (lambda d: os.truncate(d / FIRST, 0), FIRST),
        (lambda d: flip(d / FIRST, -1), FIRST),
        (lambda d: flip(d / FIRST, -70), FIRST),
        (lambda d: swap(d), FIRST),
        (lambda d: edit(d / FIRST), FIRST),
        (lambda d: shutil.copy(d.parent / "two" / FIRST, d / FIRST), FIRST),
        (lambda d: os.truncate(d / "notes.json", 10), "notes.json"),
        (lambda d: os.truncate(d / "notes.json", 0), "notes.json"),
        (lambda d: change_json(d / "notes.json"), "notes.json"),
        (lambda d: (d / "notes.json").write_text("[" * 100_000), "notes.json"),
        (lambda d: (d / "notes.json").write_text('{"value": ' + "1" * 5000 + "}"), "notes.json"),
        (lambda d: (d / "notes.json").write_bytes(b"\xff\xfe"), "notes.json"),
        (lambda d: os.truncate(d / "stage.json", 5), "stage.json"),
        (lambda d: (d / "stage.json").write_text("[1]"), "stage.json"),
    ],
)
def test_damage_is_refused_with_the_name_of_the_file(stage, damage: Callable[[Path], None], named):
    damage(stage)
    with pytest.raises(UserError, match=f"{named} is damaged") as caught:
        resume(stage)
    assert "--resume" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("offset", range(0, 480, 7))
def test_no_flipped_bit_of_a_file_goes_unnoticed(stage, offset):
    size = (stage / FIRST).stat().st_size
    flip(stage / FIRST, offset % size)
    with pytest.raises(UserError, match="is damaged"):
        resume(stage)


def test_results_do_not_belong_to_inputs_that_were_deleted(stage):
    """A stage without its inputs begins anew, but not with results that were made from others."""
    (stage / "stage.json").unlink()
    with (
        WorkDir(stage.parent, resume=True) as work,
        pytest.raises(UserError, match="another result, or one of another"),
    ):
        work.stage("one", {**INPUTS, "a": 7})


def test_a_link_among_the_results_is_refused(stage, tmp_path):
    shutil.move(stage / FIRST, tmp_path / "elsewhere")
    (stage / FIRST).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link or no regular file"):
        resume(stage)


@pytest.mark.parametrize("text", ['{"format_version": 99}', '{"format_version": 1}', "{}"])
def test_another_format_of_work_directories_is_refused(stage, text):
    (stage.parent / MARKER).write_text(text)
    with pytest.raises(UserError, match=r"format version .*start again"):
        resume(stage)


@pytest.mark.parametrize("text", ["", "[]", '{"format_version"'])
def test_a_damaged_marker_is_refused(stage, text):
    (stage.parent / MARKER).write_text(text)
    with pytest.raises(UserError, match=r"gemq-work\.json is damaged"):
        resume(stage)


def test_files_are_as_readable_as_others(stage):
    """safetensors makes files that only their owner can read, which keeps out a colleague of the same group."""
    modes = {path.name: path.stat().st_mode for path in stage.iterdir()}
    assert len(set(modes.values())) == 1, modes
    assert json.loads((stage / "stage.json").read_text()) == INPUTS
