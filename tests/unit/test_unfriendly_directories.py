"""Directories and links that are not ours: nothing in them is read as ours, changed or deleted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from gemq.checkpoint.outputs import check_output, default_work_directory, lock_output
from gemq.errors import UserError
from gemq.pipeline.workdir import LOCK, MARKER, WorkDir
from gemq.runtime.files import replacing, write_json, write_text
from gemq.runtime.memory import ByteLimit, MemoryBudget


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


@pytest.mark.parametrize(
    "names",
    [
        (".bashrc", ".config/nvim/.luarc", ".ssh/id_rsa"),
        (".lock", ".git/config"),
        (".spilled-1-1",),
        (".tmpabcdef",),
        (".layer-000.safetensors.tmp",),
        ("candidates/layer-000.safetensors",),
    ],
)
def test_a_directory_without_our_marker_is_never_touched(tmp_path, names):
    for name in names:
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text("mine")
    contents_before = contents(tmp_path)
    for resume in (True, False):
        with pytest.raises(UserError, match="is not a work directory of gemq"):
            WorkDir(tmp_path / "mine", resume=resume)
    with pytest.raises(UserError, match="is not a work directory of gemq"):
        WorkDir.existing(tmp_path / "mine")
    assert contents(tmp_path) == contents_before


def test_of_our_own_directory_only_our_temporary_files_are_removed(tmp_path):
    with WorkDir(tmp_path / "work", resume=False) as work:
        work.stage("candidates", {})
    temporary = (
        ".spilled-1-1",
        "candidates/.layer-000.safetensors.tmp",
        "candidates/.tmp36rpNw",
        ".job.json.0a1b2c3d.tmp",
    )
    others = (".gitignore", "candidates/.DS_Store", ".config/settings.tmp", "notes.txt", ".hidden/.deep/.x.tmp")
    for name in (*temporary, *others):
        (tmp_path / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / name).write_text("x")
    with WorkDir(tmp_path / "work", resume=True):
        assert not [name for name in temporary if (tmp_path / "work" / name).exists()]
        assert all((tmp_path / "work" / name).exists() for name in others)


def test_a_directory_that_fails_at_once_is_removed_unless_others_put_something_there(tmp_path):
    def fail(name: str) -> None:
        with WorkDir(tmp_path / name, resume=False) as work:
            work.stage("candidates", {})
            if name == "shared":
                (tmp_path / name / "notes.txt").write_text("mine")
            raise UserError("no")

    for name in ("alone", "shared"):
        with pytest.raises(UserError):
            fail(name)
    assert (tmp_path / "shared" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "alone").exists()


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "directory"])
def test_a_lock_that_is_no_file_is_refused(tmp_path, kind):
    with WorkDir(tmp_path / "work", resume=False):
        pass
    victim = tmp_path / "thesis.txt"
    victim.write_text("mine")
    lock = tmp_path / "work" / LOCK
    lock.unlink()
    if kind == "link":
        lock.symlink_to(victim)
    elif kind == "dangling link":
        lock.symlink_to(tmp_path / "new")
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    with pytest.raises(UserError, match=r"\.lock"):
        WorkDir(tmp_path / "work", resume=True)
    assert victim.read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_opening_a_lock_leaves_its_contents(tmp_path):
    """A hard link to another file cannot be told from a file."""
    with WorkDir(tmp_path / "work", resume=False):
        pass
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "work" / LOCK).unlink()
    os.link(tmp_path / "thesis.txt", tmp_path / "work" / LOCK)
    with WorkDir(tmp_path / "work", resume=True):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["candidates", "candidates/layer-000.safetensors", "job.json", "scores-1/stage.json", "x"]
)
def test_links_inside_a_work_directory_are_refused(tmp_path, name):
    with WorkDir(tmp_path / "work", resume=False):
        pass
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "work" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "work" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name} is a link or no regular file"):
        WorkDir(tmp_path / "work", resume=True)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_work_directory_may_be_a_link_itself(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "work").symlink_to(tmp_path / "disk")
    with WorkDir(tmp_path / "work", resume=False) as work:
        work.stage("one", {}).save_tensors("x.safetensors", {"x": torch.ones(1)})
    assert (tmp_path / "disk" / "one" / "x.safetensors").is_file()
    with WorkDir(tmp_path / "work", resume=True) as work:
        assert work.stage("one", {}).has("x.safetensors")


# Temporary files


def test_a_temporary_file_is_not_written_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("mine")
    for name, target in (("a.json", "new"), ("b.json", "victim")):
        (tmp_path / f".{name}.tmp").symlink_to(tmp_path / target)
        write_json(tmp_path / name, {"x": 1})
        assert (tmp_path / f".{name}.tmp").is_symlink()
        assert not (tmp_path / name).is_symlink()
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_file_with_a_temporary_name_is_left_alone(tmp_path):
    (tmp_path / ".a.txt.tmp").write_text("mine")
    write_text(tmp_path / "a.txt", "ours")
    with pytest.raises(ValueError), replacing(tmp_path / "a.txt"):
        raise ValueError
    assert contents(tmp_path) == {".a.txt.tmp": b"mine", "a.txt": b"ours"}


def test_a_link_in_the_place_of_a_result_is_replaced_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "a.json").symlink_to(tmp_path / "victim")
    write_json(tmp_path / "a.json", 1)
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "a.json").is_symlink()


def test_files_for_activations_are_new_ones(tmp_path):
    memory = MemoryBudget(torch.device("cpu"), ByteLimit(0), ByteLimit(0), tmp_path)
    paths = [memory.empty_mapped((4,), torch.float32)[1] for _ in range(3)]
    assert len(set(paths)) == 3
    assert all(path.name.startswith(".spilled-") and path.is_file() for path in paths)


# Outputs


def test_one_of_two_jobs_with_one_output_is_refused_at_once(tmp_path):
    with lock_output(tmp_path / "out"):
        with pytest.raises(UserError, match="another gemq process writes"), lock_output(tmp_path / "out"):
            pass
        with lock_output(tmp_path / "other"):
            pass
    with lock_output(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_link_to_an_output_is_that_output(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with (
        lock_output(tmp_path / "link"),
        pytest.raises(UserError, match="another gemq process"),
        lock_output(tmp_path / "out"),
    ):
        pass


def test_a_claim_makes_directories_above_the_output_and_takes_them_back(tmp_path):
    with lock_output(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())
    with lock_output(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "b" / "out").mkdir()
    assert (tmp_path / "a" / "b" / "out").is_dir()


def test_an_output_that_cannot_be_replaced_is_refused_at_once(tmp_path, monkeypatch):
    """Such as the mount point of a container's volume."""
    (tmp_path / "out").mkdir()

    def busy(self: Path, target: Path) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    with (
        pytest.raises(UserError, match=r"mount point.*name a directory in it, such as .*out/model"),
        lock_output(tmp_path / "out"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", [".out.partial", ".out.gemq-lock"])
def test_what_is_in_the_way_of_an_output_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="is in the way"), lock_output(tmp_path / "out"):
        pass
    assert contents(tmp_path) == {name: b"mine"}
    (tmp_path / name).unlink()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / name).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError), lock_output(tmp_path / "out"):
        pass
    assert (tmp_path / "mine" / "file").read_text() == "mine"


@pytest.mark.parametrize("out", [".", "", "/", "..", "x" * 300, "file/x", "circle"])
def test_odd_outputs_get_one_line(tmp_path, monkeypatch, out):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "file").write_text("x") if out == "file/x" else None
    if out == "circle":
        Path("circle").symlink_to("circle")
    with pytest.raises(UserError) as caught:  # noqa: PT012 - whichever refuses
        check_output(Path(out), resume=False)
        with lock_output(Path(out)):
            pass
    assert "\n" not in str(caught.value)
    default_work_directory(Path(out))


def test_default_work_directory():
    assert default_work_directory(Path("a/out")) == Path("a/out.work")
    assert default_work_directory(Path("out.v2")) == Path("out.v2.work")


def test_marker_is_what_makes_a_directory_ours(tmp_path):
    with WorkDir(tmp_path / "work", resume=False):
        assert (tmp_path / "work" / MARKER).is_file()


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """A power cut leaves the old file or the new one. The folder is flushed as well, since it holds the name."""
    path = tmp_path / "record.json"
    acts = []
    real_replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: acts.append(os.path.realpath(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(os, "replace", lambda *paths: acts.append("replace") or real_replace(*paths))
    write_text(path, "new")
    assert acts == [str(tmp_path / ".record.json.tmp"), "replace", str(tmp_path)]
