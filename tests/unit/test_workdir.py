"""The work directory holds whole files and nothing else."""

from __future__ import annotations

import pytest
import torch

from gemq.errors import UserError
from gemq.pipeline.workdir import Stage, WorkDir


def test_what_a_killed_job_left_half_written_is_gone(tmp_path):
    """A kill inside safetensors' own writing leaves a file under a random name, which nothing would overwrite."""
    with WorkDir(tmp_path / "work", resume=False) as work:
        work.stage("candidates", {"a": 1}).save_tensors("layer-000.safetensors", {"x": torch.ones(2)})
    for name in (".tmp36rpNw", ".layer-001.safetensors.tmp"):
        (tmp_path / "work" / "candidates" / name).write_bytes(b"half")
    with WorkDir(tmp_path / "work", resume=True) as work:
        assert sorted(f.name for f in (tmp_path / "work" / "candidates").iterdir()) == [
            "layer-000.safetensors",
            "stage.json",
        ]
        assert work.stage("candidates", {"a": 1}).has("layer-000.safetensors")


def test_background_writes_are_complete_in_the_end_and_a_full_disk_is_reported(tmp_path, monkeypatch):
    stage = Stage(tmp_path)
    with stage.background_writer() as save:
        for number in range(3):
            save(f"{number}.safetensors", {"x": torch.full((2,), number)})
    assert [int(stage.load_tensor(f"{n}.safetensors", "x")[0]) for n in range(3)] == [0, 1, 2]

    def full(*_):
        raise UserError("the disk is full")

    monkeypatch.setattr("gemq.pipeline.workdir.write_tensors", full)
    with pytest.raises(UserError, match="full"), stage.background_writer() as save:
        save("3.safetensors", {"x": torch.zeros(1)})


def test_rows_of_a_set_are_those_of_its_tensors(tmp_path):
    with WorkDir(tmp_path / "work", resume=False) as work:
        stage = work.stage("s", {})
        tensors = {"a": torch.arange(12).view(4, 3), "b": torch.arange(4, dtype=torch.uint8)}
        stage.save_tensors("x.safetensors", tensors)
        loaded = stage.load_tensors("x.safetensors", rows=slice(1, 3))
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensor[1:3]) for name, tensor in tensors.items())
        (no_rows,) = stage.load_tensors("x.safetensors", is_wanted=lambda key: key == "b", rows=slice(0, 0)).values()
        assert not len(no_rows)
