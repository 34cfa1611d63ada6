"""The work directory holds whole files and nothing else."""

from __future__ import annotations

import torch

from gemq.workdir import WorkDir


def test_what_a_killed_job_left_half_written_is_gone(tmp_path):
    """A kill inside safetensors' own writing leaves a file under a random name, which nothing would overwrite."""
    with WorkDir(tmp_path / "work", resume=False) as work:
        work.stage("ladder", {"a": 1}).save_tensors("layer-000.safetensors", {"x": torch.ones(2)})
    for name in (".tmp36rpNw", ".layer-001.safetensors.tmp"):
        (tmp_path / "work" / "ladder" / name).write_bytes(b"half")
    with WorkDir(tmp_path / "work", resume=True) as work:
        assert sorted(f.name for f in (tmp_path / "work" / "ladder").iterdir()) == [
            "layer-000.safetensors",
            "stage.json",
        ]
        assert work.stage("ladder", {"a": 1}).has("layer-000.safetensors")
