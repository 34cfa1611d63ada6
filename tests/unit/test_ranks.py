"""Ranks: division of work, order of sums, and collectives of several real processes through gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gemq.runtime.processes import RankLostError
from gemq.runtime.ranks import Ranks

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 17, 128])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_every_micro_batch_and_expert_has_one_rank(total, count, device):
    ranks = [Ranks(r, count, device) for r in range(count)]
    per_forward = ranks[0].batches_per_forward(total)
    assert per_forward == (1 if device == CPU or total < 128 else 4)
    order = []
    for start in range(0, total, per_forward):
        for rank in ranks:
            order += rank.local_batches(total)[start : start + per_forward]
    assert order == list(range(total))
    assert all(i in ranks[ranks[0].owner(i, total)].local_batches(total) for i in range(total))
    experts = list(range(total))
    assert [e for r in ranks for e in experts[r.local_slice(total)]] == experts


def test_a_single_process_gathers_its_input():
    tensors = [torch.ones(2), None]
    assert Ranks().all_gather_tensors(tensors, [3, -1]) == [(tensors, [3, -1])]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (
            RuntimeError("NCCL error, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
            torch.OutOfMemoryError,
        ),
        (RuntimeError("Connection closed by peer"), RankLostError),
    ],
)
def test_missing_memory_in_a_collective_is_no_lost_rank(error, expected):
    """The two have different remedies: more memory, or just ``--resume``."""

    def collective() -> None:
        raise error

    with pytest.raises(expected):
        Ranks._run(collective)


FORK_RANKS = """
import os, socket, sys, torch, warnings
from pathlib import Path
from gemq.errors import UserError
from gemq.models import expert_parallel, experts, grouped
from gemq.runtime.processes import RankLostError
from gemq.runtime.ranks import leave_ranks, start_ranks
from gemq.pipeline.workdir import WorkDir

# what torchrun would set, in processes that have imported everything
with socket.create_server(("localhost", 0)) as server:
    port = server.getsockname()[1]
count = int(sys.argv[2])
os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}"}
os.environ |= {"WORLD_SIZE": f"{count}", "LOCAL_WORLD_SIZE": f"{count}"}
children = []
for rank in range(count):
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
    children.append(os.fork())
    if children[-1] == 0:
        break
else:
    sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""

COLLECTIVES = """
ranks = start_ranks("cpu")
assert ranks.count == 3
warnings.simplefilter("error", FutureWarning)  # every rank would print it
local = [torch.full((2,), float(i)) for i in ranks.local_batches(7)]
assert [t[0].item() for t in ranks.gather_micro_batches(local, 7)] == list(range(7))
numbers = torch.arange(5.0)
shards = [numbers[ranks.local_slice(5)].half(), numbers[ranks.local_slice(2)]]
joined, counts = ranks.all_gather_cat(shards), [ranks.all_reduce_int(ranks.rank), ranks.all_reduce_int(1)]
assert torch.equal(joined[0], numbers.half()) and torch.equal(joined[1], numbers[:2]) and counts == [3, 3]
for rank, ((x, none, last), notes) in enumerate(ranks.all_gather_tensors(
    [torch.full((ranks.rank + 1, 2), float(ranks.rank)).half(), None,
     torch.tensor([ranks.rank]) if ranks.rank == 2 else None],
    [ranks.rank, -1],
)):
    assert x.dtype == torch.float16 and x.shape == (rank + 1, 2) and (x == rank).all()
    assert none is None and (last is None or last.tolist() == [2]) and (last is not None) == (rank == 2)
    assert notes == [rank, -1]
assert [notes for _, notes in ranks.all_gather_tensors([], [ranks.rank])] == [[0], [1], [2]]
assert ranks.all_gather(torch.tensor([ranks.rank, 7])).tolist() == [0, 7, 1, 7, 2, 7]
assert ranks.reduce_scatter(torch.arange(6)).tolist() == [6 * ranks.rank, 6 * ranks.rank + 3]
sums = ranks.all_reduce_coalesced([torch.ones(2), torch.ones(1).half(), torch.full((1, 3), float(ranks.rank))])
assert [t.tolist() for t in sums] == [[3, 3], [3], [[3, 3, 3]]]
total = torch.tensor([1 << 40, ranks.rank])
ranks.all_reduce(total)
assert total.tolist() == [3 << 40, 3]
filled = torch.zeros(5, 3, dtype=torch.bfloat16)
rows = [slice(0, 2), slice(2, 2), slice(2, 5)]
filled[rows[ranks.rank]] = ranks.rank + 1
ranks.broadcast_slices(filled, rows)
assert filled[:, 0].tolist() == [1, 1, 3, 3, 3]
copies = [ranks.broadcast(torch.full((2, source), 7).half() if ranks.rank == source else None, source)
          for source in range(3)]
assert [t.tolist() for t in copies] == [[[7] * source] * 2 for source in range(3)]
assert all(t.dtype == torch.float16 for t in copies)
assert ranks.run_on_first(lambda: (ranks.rank + 10, "x")) == (10, "x")
def refuse():
    raise UserError("no")
for run in (lambda: ranks.run_on_first(refuse), lambda: ranks.run_on_all(refuse if ranks.rank == 1 else list)):
    try:
        run()
    except UserError as error:
        assert str(error) == "no"
    else:
        raise AssertionError
with WorkDir(Path(sys.argv[1]) / "work", resume=False, ranks=ranks) as work:
    stage = work.stage("s", {"a": 1})
    assert not stage.has("x.safetensors")
    stage.save_tensors("x.safetensors", {"x": torch.ones(2) * (ranks.rank + 1)})
    assert stage.load_tensors("x.safetensors")["x"].tolist() == [1, 1]

# experts split over the ranks, by the plain loop and by grouped products (Triton's interpreter)
class Module(torch.nn.Module):
    has_gate, has_bias, is_transposed = True, False, False
    def _apply_gate(self, x):
        a, b = x.chunk(2, -1)
        return torch.nn.functional.silu(a) * b

torch.manual_seed(0)
weights = {"gate_up_proj": torch.randn(8, 64, 32).bfloat16(), "down_proj": torch.randn(8, 32, 32).bfloat16()}
hidden, routing = torch.randn(21, 32).bfloat16(), torch.rand(21, 2).bfloat16()
busy = torch.stack([torch.randperm(8)[:2] for _ in range(21)])
idle = torch.stack([torch.randperm(2) for _ in range(21)])  # no pair for two of the ranks

def run(index, expert_slice, sharding, tokens=slice(None)):
    module = Module()
    for name, weight in weights.items():
        setattr(module, name, torch.nn.Parameter(weight[expert_slice].clone()))
    if sharding is not None:
        setattr(module, expert_parallel._SHARDING, sharding)
    x, w = hidden[tokens].clone().requires_grad_(), routing[tokens].clone().requires_grad_()
    out = experts.experts_forward(module, x, index[tokens], w)
    out.float().square().sum().backward()
    return [out, x.grad, w.grad], [module.gate_up_proj.grad, module.down_proj.grad]

local = ranks.local_slice(8)
grouped.gate = lambda module, x: module._apply_gate(x)
for in_groups in (False, True):
    grouped.usable = lambda *_: in_groups
    for index in (busy, idle):
        expected, expected_grads = run(index, slice(None), None)
        results, grads = run(index, local, expert_parallel.ExpertSharding(ranks, 8))
        pairs = [*zip(expected, results), *zip((g[local] for g in expected_grads), grads)]
        if in_groups:  # sums over ranks are rounded by torch, those of one rank by the interpreter, which truncates
            assert all((a - b).float().norm() <= 2**-7 * a.float().norm() for a, b in pairs)
        else:
            assert all(torch.equal(a, b) for a, b in pairs)
        if in_groups:  # a rank has a third of the tokens, so that rounding errors of its rows average out less
            tokens = ranks.local_slice(21)
            results, grads = run(index, local, expert_parallel.ExpertSharding(ranks, 8, sharded=True), tokens)
            pairs = [*zip((t[tokens] for t in expected), results), *zip((g[local] for g in expected_grads), grads)]
            assert all((a - b).float().norm() <= 2**-6 * a.float().norm() for a, b in pairs)
leave_ranks()
"""


LOST_RANK = """
ranks = start_ranks("cpu")
if ranks.rank == 1:
    os._exit(0)
try:
    ranks.all_gather_tensors([torch.ones(2)])
except RankLostError as error:
    assert str(error)
else:
    raise AssertionError
"""


@pytest.mark.parametrize(("script", "count"), [(COLLECTIVES, 3), (LOST_RANK, 2)])
def test_several_processes(script: str, count: int, tmp_path: Path):
    """Collectives, and a rank that is lost: the others get an error that they can handle."""
    file = tmp_path / "script.py"
    file.write_text(FORK_RANKS + script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, file, tmp_path, str(count)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
