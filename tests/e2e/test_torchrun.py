"""Several processes under torchrun: the bytes of one, a killed rank, one line for a mistake."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.cli import contents, gemq

RECIPE = """
effort: low
total_tokens: 700
num_windows: 12
seq_len: 32
micro_batch_tokens: 64
candidate_epochs: 1
reconstruction_epochs: 1
distill_epochs: 1
"""


def launched(*arguments: object, ranks: int = 2, program: tuple[object, ...] = ("-m", "gemq")) -> subprocess.Popen[str]:
    """``torchrun --nproc-per-node 2 -m gemq ARGUMENTS`` on the CPU."""
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        ranks,
        *program,
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(list(map(str, run)), stderr=subprocess.PIPE, text=True, env=environment)


def ours(stderr: str) -> list[str]:
    """What gemq wrote among torchrun's own lines."""
    return [line for line in stderr.splitlines() if line.startswith("gemq: ")]


def ranks_of(launcher: int) -> dict[int, int]:
    """Process ids of the ranks that a launcher has started."""
    pids = {}
    for directory in Path("/proc").iterdir():
        try:
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher:
                environment = dict(e.partition("=")[::2] for e in (directory / "environ").read_text().split("\0"))
                pids[int(environment["RANK"])] = int(directory.name)
        except (KeyError, OSError, ValueError, IndexError):
            continue
    return pids


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_two_ranks_give_the_bytes_of_one_even_if_one_is_killed(tiny_model, tmp_path, monkeypatch):
    monkeypatch.undo()  # the guard takes as many windows here as in the other processes
    (tmp_path / "r.yaml").write_text(RECIPE)
    job = ("quantize", tiny_model, "--bits", 2, "--recipe", tmp_path / "r.yaml", "--device", "cpu", "-q")
    out_1, out_2 = tmp_path / "one", tmp_path / "two"
    ran = gemq(*job, "-o", out_1)
    assert ran.code == 0, ran.err

    process = launched(*job, "-o", out_2)
    first = tmp_path / "two.work" / "candidates" / "layer-000.safetensors"
    deadline = time.monotonic() + 120
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    begin = time.monotonic()
    stderr = process.communicate(timeout=60)[1]
    assert time.monotonic() - begin < 30
    assert process.returncode != 0
    assert len(ours(stderr)) == 1, stderr
    assert "process" in ours(stderr)[0]
    assert "--resume" in ours(stderr)[0]
    assert not out_2.exists()

    process = launched(*job, "-o", out_2, "--resume")
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 0, stderr
    assert contents(out_2) == contents(out_1)
    works = [contents(out.with_name(out.name + ".work")) for out in (out_1, out_2)]
    assert works[0] == works[1]

    # what two began, one can end
    shutil.rmtree(out_2)
    for directory in (tmp_path / "two.work").glob("reconstructed-*"):
        (directory / "layer-001.safetensors").unlink()
    ran = gemq(*job, "-o", out_2, "--resume")
    assert ran.code == 0, ran.err
    assert contents(out_2) == contents(out_1)


AS_ON_A_GPU = """
from gemq.__main__ import main
from gemq.runtime import ranks
ranks.Ranks.max_batches_per_forward = property(lambda self: 3)
ranks.Ranks.shards_windows = property(lambda self: self.count > 1)
ranks.MIN_FORWARDS = 1
main()
"""


def test_two_ranks_that_divide_the_work_as_on_gpus(tiny_model, tmp_path):
    """The bytes of one up to distillation, where each trains on windows of its own."""
    script = tmp_path / "as_on_a_gpu.py"
    script.write_text(AS_ON_A_GPU)
    (tmp_path / "r.yaml").write_text(RECIPE)
    keys = ("--bits", 2, "--recipe", tmp_path / "r.yaml", "--device", "cpu", "-q")
    works, distilled = [], []
    for ranks in (1, 2):
        out = tmp_path / f"out{ranks}"
        process = launched("quantize", tiny_model, "-o", out, *keys, ranks=ranks, program=(script,))
        stderr = process.communicate(timeout=120)[1]
        assert process.returncode == 0, stderr
        (last,) = out.with_name(f"{out.name}.work").glob("distilled-*/distilled.safetensors")
        distilled.append(load_file(last))
        last.rename(tmp_path / f"distilled{ranks}.safetensors")
        works.append(contents(out.with_name(f"{out.name}.work")))
    assert works[0] == works[1]
    tensors_1, tensors_2 = distilled
    assert all(result["notes"][1] < result["notes"][0] for result in distilled)
    for name, tensor in tensors_1.items():  # moved by 5e-3
        if name != "notes":
            torch.testing.assert_close(tensors_2[name], tensor, rtol=0, atol=1e-5)


def test_a_mistake_is_told_once(tiny_model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    process = launched("quantize", tiny_model, "-o", tmp_path / "out", "--device", "cpu")
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert len(ours(stderr)) == 1, stderr
    assert "exists" in ours(stderr)[0]
