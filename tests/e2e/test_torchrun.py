"""Several processes under torchrun: the bytes of one, a killed rank, one line for a mistake."""

from __future__ import annotations

import json
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


def launched(*arguments: object) -> subprocess.Popen[str]:
    """``torchrun --nproc-per-node 2 -m gemq ARGUMENTS`` on the CPU."""
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
        "-m",
        "gemq",
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
import json, os, signal, socket, sys
import transformers.models.olmoe.modeling_olmoe
import gemq.pipeline.quantize
from gemq.__main__ import main
from gemq.runtime import ranks

ranks.Ranks.max_batches_per_forward = property(lambda self: 3)
ranks.Ranks.shards_windows = property(lambda self: self.count > 1)
ranks.MIN_FORWARDS = 1

def run(count, arguments):  # what torchrun would set, in processes that have imported everything
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}"}
    os.environ |= {"WORLD_SIZE": f"{count}", "LOCAL_WORLD_SIZE": f"{count}"}
    running, codes = set(), []
    for rank in range(count):
        os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
        running.add(os.fork())
        if 0 in running:
            sys.argv = ["gemq", *arguments]
            main()
    while running:
        child, status = os.wait()
        running.remove(child)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1]:
            for child in running:
                os.kill(child, signal.SIGTERM)
    return codes

print(json.dumps([run(count, arguments) for count, arguments in json.loads(sys.argv[1])]))
"""


def test_two_ranks_that_divide_the_work_as_on_gpus(tiny_model, tmp_path):
    """The bytes of one up to distillation, where each trains on windows of its own. A mistake is told once."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    keys = ["--bits", "2", "--recipe", tmp_path / "r.yaml", "--device", "cpu", "-q"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    names = {"out1": 1, "out2": 2, "mine": 2}
    jobs = [[count, ["quantize", tiny_model, "-o", tmp_path / name, *keys]] for name, count in names.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", AS_ON_A_GPU, json.dumps(jobs, default=str)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert ran.returncode == 0, ran.stderr
    single, pair, refused = json.loads(ran.stdout)
    assert single == [0], ran.stderr
    assert pair == [0, 0], ran.stderr
    assert all(refused)
    assert len(ours(ran.stderr)) == 1, ran.stderr
    assert "exists" in ours(ran.stderr)[0]

    works, distilled = [], []
    for name in ("out1", "out2"):
        (last,) = (tmp_path / f"{name}.work").glob("distilled-*/distilled.safetensors")
        distilled.append(load_file(last))
        last.rename(tmp_path / f"distilled-{name}.safetensors")
        works.append(contents(tmp_path / f"{name}.work"))
    assert works[0] == works[1]
    tensors_1, tensors_2 = distilled
    assert all(result["notes"][1] < result["notes"][0] for result in distilled)
    for name, tensor in tensors_1.items():  # moved by 5e-3
        if name != "notes":
            torch.testing.assert_close(tensors_2[name], tensor, rtol=0, atol=1e-5)
