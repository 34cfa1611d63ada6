"""What two ranks of one host do below a job: a packed layer cut in two, and what they give each other a second.

    python benchmarks/two_ranks.py tensor-parallel [--layers 16]
    python benchmarks/two_ranks.py links
    (--small: shapes to try the script out, two processes on a CPU)

``tensor-parallel``: the experts of all layers of OLMoE-1B-7B's shape at batch 1 with the residual connection, each rank
half of the intermediate size and one sum over ranks a layer, in a CUDA graph, against one GPU: by NCCL, and by one
kernel (``exchange``) that ends a layer on one GPU as well. ``links``: what a rank receives a second of what the other
gives, by NCCL's collectives as NCCL chooses its way (one) and told to go from GPU to GPU (two), and by one process's
copies. Rows go to results/two_gpus.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shapes import SHAPES, Shape, packed_model
from two_gpus import ENVIRONMENT, FILE, command, record


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=("tensor-parallel", "links", *RANKS))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--csv", type=Path, default=FILE)
    parser.add_argument("--figures", type=Path, help="where a rank writes its figures")
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    if args.part in RANKS:
        RANKS[args.part](args)
        return
    with tempfile.TemporaryDirectory() as directory:
        {"tensor-parallel": tensor_parallel, "links": links}[args.part](args, Path(directory))


def run_ranks(
    args: argparse.Namespace, ranks: int, task: str, figures: Path, ways: dict[str, str] | None = None
) -> dict[str, float]:
    """The figures that ranks of this script give. ``ways``: of their environment."""
    flags = ["--small"] if args.small else []
    job = command(ranks, __file__, task, "--figures", figures, "--layers", args.layers, *flags)
    subprocess.run(job, check=True, env={**os.environ, **(ways or {})})
    return json.loads(figures.read_text())


def joined(args: argparse.Namespace) -> tuple[int, int, torch.device]:
    """This rank, how many there are, and where it computes; it has joined the others."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu" if args.small else f"cuda:{rank}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("gloo" if args.small else "nccl", device_id=None if args.small else device)
    return rank, ranks, device


def shape(args: argparse.Namespace) -> Shape:
    if args.small:
        return SHAPES["small-2.0"]
    full_shape = SHAPES["olmoe-1b-7b-2.0"]
    return replace(full_shape, changes={**full_shape.changes, "num_hidden_layers": args.layers})


def tensor_parallel(args: argparse.Namespace, directory: Path) -> None:
    times = []
    for ranks in (1, 2):
        times.append(run_ranks(args, ranks, "experts-of-a-rank", directory / "times.json"))
    for what in times[0]:
        times_1, times_2 = (t[what] for t in times)
        record(args, "tensor parallel", f"experts of a layer, {what}", times_1, times_2, "us")


def time_experts(args: argparse.Namespace) -> None:
    """One rank of ``tensor_parallel``: microseconds of a layer's experts and the sum over ranks."""
    rank, ranks, device = joined(args)
    full_shape = shape(args)
    half = {"intermediate_size": full_shape.changes["intermediate_size"] // ranks}
    model = packed_model(replace(full_shape, changes={**full_shape.changes, **half}), device)
    config = model.config
    layers = [layer.mlp.experts for layer in model.model.layers]
    draw = torch.Generator(device).manual_seed(1)  # the same on all ranks
    x = torch.randn(1, config.hidden_size, device=device, dtype=torch.bfloat16, generator=draw)
    chosen = [
        torch.randperm(config.num_experts, device=device, generator=draw)[None, : config.num_experts_per_tok]
        for _ in layers
    ]
    weights = torch.full((1, config.num_experts_per_tok), 0.125, device=device, dtype=torch.bfloat16)

    def plainly(h: torch.Tensor, experts: Any, index: torch.Tensor) -> torch.Tensor:
        out = experts(h, index, weights)
        if ranks > 1:
            dist.all_reduce(out)
        return h + out

    ways: dict[str, Any] = {"NCCL": plainly}
    if device.type == "cuda":
        from exchange import End
        from gemq.kernels.decode.operators import expert_shares

        end = End(config.hidden_size, device)

        def in_one(h: torch.Tensor, experts: Any, index: torch.Tensor) -> torch.Tensor:
            shares = expert_shares(experts, h, index, weights)
            assert shares is not None
            return end(h, shares)

        ways["one kernel"] = in_one
    found_times, results = {}, []
    for name, layer in ways.items():

        @torch.no_grad()
        def step(layer: Any = layer) -> torch.Tensor:
            h = x
            for experts, index in zip(layers, chosen, strict=True):
                h = layer(h, experts, index)
            return h

        times, result = _times(step, device, 3 if args.small else 50)
        results.append(result)
        spread = (times / len(layers) * 1e6).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        found_times.update({f"{name}, {p}": value for p, value in zip(("p20", "p50", "p80"), spread, strict=True)})
    difference = max(float((r - results[0]).norm() / results[0].norm()) for r in results)
    assert difference < 0.01, f"the ways differ by {difference:.2g}"
    if rank == 0:
        args.figures.write_text(json.dumps(found_times))
    if ranks > 1:
        dist.destroy_process_group()


def _mean_seconds(step: Any, device: torch.device, repeats: int) -> torch.Tensor:
    """Seconds of a step, ``repeats`` times the mean of ten."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(repeats):
        wait()
        begin = time.perf_counter()
        for _ in range(10):
            step()
        wait()
        times.append((time.perf_counter() - begin) / 10)
    return torch.tensor(times)


def _times(step: Any, device: torch.device, repeats: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``_mean_seconds``, in a CUDA graph on a GPU; and what a step gives."""
    replay, graph, out = step, None, torch.empty(0)
    if device.type == "cuda":
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Threads of NCCL ask for events while this one captures.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = step()
        replay = graph.replay
    else:
        out = step()
    times = _mean_seconds(replay, device, repeats)
    result = out.float().clone()
    if graph is not None:
        graph.reset()  # NCCL waits for graphs that hold its calls before it ends
    return times, result


# What lies between the ranks

SIZES = (1 << 12, 1 << 20, 1 << 24, 1 << 26)  # bytes


def links(args: argparse.Namespace, directory: Path) -> None:
    results = []
    for ways in ({}, {"NCCL_P2P_LEVEL": "SYS"}):
        results.append(run_ranks(args, 2, "links-of-a-rank", directory / "links.json", ways))
    for name in results[0]:
        record(args, "links", name, results[0][name], results[1][name], "GB/s")


def time_links(args: argparse.Namespace) -> None:
    """One rank of ``links``: gigabytes a second that it receives, by collective and size."""
    rank, _, device = joined(args)
    rates = {}
    for size in SIZES:
        buffer = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
        gathered = [torch.empty_like(buffer) for _ in range(2)]
        calls: dict[str, Any] = {
            "all_reduce": lambda buffer=buffer: dist.all_reduce(buffer),
            "all_gather": lambda buffer=buffer, gathered=gathered: dist.all_gather(gathered, buffer),
            "broadcast": lambda buffer=buffer: dist.broadcast(buffer, 0),
        }
        if device.type == "cuda":
            peer_buffer = torch.empty_like(buffer, device=f"cuda:{1 - rank}")
            calls["copy from the other"] = lambda buffer=buffer, peer_buffer=peer_buffer: buffer.copy_(peer_buffer)
        for name, call in calls.items():
            call()
            seconds = _mean_seconds(call, device, 3).min().item()
            rates[f"{name}, {size >> 10} kB"] = size / seconds / 1e9
    if rank == 0:
        args.figures.write_text(json.dumps(rates))
    dist.destroy_process_group()


RANKS = {"experts-of-a-rank": time_experts, "links-of-a-rank": time_links}
"""What a part starts in each rank."""


if __name__ == "__main__":
    main()
