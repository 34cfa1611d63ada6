"""Two GPUs against one of the same host: whole jobs, what they give, and a packed layer cut in two.

    python benchmarks/two_gpus.py jobs [--effort low defaults] [--layers 16] [--windows 128]
    python benchmarks/two_gpus.py quality --model refmoe-olmoe-23m --texts TEXTS [--seeds 3]
    python benchmarks/two_gpus.py tensor-parallel
    python benchmarks/two_gpus.py lost
    python benchmarks/two_gpus.py links
    (--small: shapes and windows to try the script out, two processes on a CPU)

``jobs``: random weights of OLMoE-1B-7B's true shape, made on the machine; one process, then ``torchrun
--nproc-per-node 2``, with the same text. A row a stage, one for the computing stages and one for the whole process from
start to saved checkpoint; then how alike the two results are. ``quality``: defaults on a trained model, KL of both over
seeds. ``tensor-parallel``: the experts of all layers at batch 1 with the residual connection, each rank half of the
intermediate size and one sum over ranks a layer, in a CUDA graph: by NCCL, and by one kernel (``exchange``) that ends a
layer on one GPU as well. ``lost``: the built-in model's job, whose rank 1 is killed; seconds until the other
has stopped, and what it says; then both ways of going on. ``links``: what a rank receives a second of what the other
gives, by NCCL's collectives as NCCL chooses its way (one) and told to go from GPU to GPU (two), and by one process's
copies. Rows go to results/two_gpus.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from gemq.assets import builtin_model
from gemq.checkpoint.packing import PackedMatrix, unpack_codes
from gemq.quant.widths import group_size_for
from record import RESULTS, append, environment
from scale import JOBS, recipe, write_model, write_text
from shapes import SHAPES, Shape, packed_model

FILE = RESULTS / "two_gpus.csv"
OUTSIDE = ("load", "allocate", "save")
"""Stages that compute nothing which two ranks could share."""
ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}  # NVLink multicast stays off


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=("jobs", "quality", "tensor-parallel", "lost", "links", *RANKS))
    parser.add_argument("--effort", nargs="+", default=["low", "defaults"], choices=JOBS)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="directory for models and results; default: a temporary one")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--csv", type=Path, default=FILE)
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    if args.part in RANKS:
        RANKS[args.part](args)
        return
    with tempfile.TemporaryDirectory() as directory:
        parts = {"jobs": jobs, "quality": quality, "tensor-parallel": tensor_parallel, "lost": lost, "links": links}
        kept = args.keep or Path(directory)
        kept.mkdir(parents=True, exist_ok=True)
        parts[args.part](args, kept)


def record(args: argparse.Namespace, what: str, name: str, one: float, two: float, unit: str) -> None:
    ratio = one / two if two else 0.0
    row = {"what": what, "name": name, "one": one, "two": two, "ratio": ratio, "unit": unit, **environment()}
    append(args.csv, row)
    print(f"{what}, {name}: one {one:.4g} {unit}, two {two:.4g} {unit}, ratio {ratio:.3g}", flush=True)


# Whole jobs


def command(ranks: int, *arguments: object) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, *map(str, arguments)]


def quantize(
    ranks: int, model: Path, out: Path, *flags: object, gpu: int | None = None
) -> tuple[dict[str, Any], float]:
    """The figures of a job, and the seconds of the whole process. ``gpu``: the only one that it sees."""
    for path in (out, out.with_name(out.name + ".work")):
        shutil.rmtree(path, ignore_errors=True)
    figures = out.with_suffix(".json")
    begin = time.perf_counter()
    job = command(ranks, "-m", "gemq", "quantize", model, "-o", out, "-q", "--json", figures, *flags)
    subprocess.run(job, check=True, env=seeing(gpu))
    return json.loads(figures.read_text()), time.perf_counter() - begin


def seeing(gpu: int | None) -> dict[str, str]:
    """The environment of a process that sees one GPU alone, or all."""
    return dict(os.environ) if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}


def shape(args: argparse.Namespace) -> Shape:
    if args.small:
        return SHAPES["small-2.0"]
    found = SHAPES["olmoe-1b-7b-2.0"]
    return replace(found, changes={**found.changes, "num_hidden_layers": args.layers})


def jobs(args: argparse.Namespace, directory: Path) -> None:
    name = "small" if args.small else "olmoe"
    model, text = directory / "model", directory / "words.txt"
    windows, window = (8, 64) if args.small else (args.windows, 2048)
    if not model.exists():
        write_model(name, 4 if args.small else args.layers, model)
    write_text(text, windows * window)
    for effort in args.effort:
        file = directory / f"{effort}.yaml"
        keys = recipe(effort, windows, window, text).to_dict()
        file.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))
        flags = ("--recipe", file, "--bits", 2, *(("--device", "cpu") if args.small else ()))
        results = [quantize(ranks, model, directory / f"{effort}-{ranks}", *flags) for ranks in (1, 2)]
        (one, whole_one), (two, whole_two) = results
        stages = [{name: cost["seconds"] for name, cost in figures["stages"].items()} for figures in (one, two)]
        for name in stages[0]:
            record(args, f"job {effort}", name, stages[0][name], stages[1].get(name, 0.0), "s")
        computing = [sum(s for name, s in found.items() if name not in OUTSIDE) for found in stages]
        record(args, f"job {effort}", "computing stages", computing[0], computing[1], "s")
        record(args, f"job {effort}", "whole process", whole_one, whole_two, "s")
        record(args, f"job {effort}", "predicted cost", one["predicted_cost"], two["predicted_cost"], "")
        alike(args, effort, directory, one["allocation"], two["allocation"])


def alike(args: argparse.Namespace, effort: str, directory: Path, one: Any, two: Any) -> None:
    """Share of matrices at the same width, and of equal codes among them."""
    pairs = [
        pair
        for rows in zip(one, two, strict=True)
        for expert in zip(*rows, strict=True)
        for pair in zip(*map(both, expert), strict=True)
    ]
    record(args, f"job {effort}", "matrices at the same width", 1.0, sum(a == b for a, b in pairs) / len(pairs), "")
    from safetensors import safe_open

    from gemq.inspect import inspect_checkpoint

    outs = [directory / f"{effort}-{ranks}" for ranks in (1, 2)]
    paths = [path for path, _, _ in inspect_checkpoint(outs[0]).layers]
    tensors: list[dict[str, Any]] = []
    for out in outs:
        opened = [safe_open(file, "pt") for file in sorted(out.glob("*.safetensors"))]
        tensors.append({name: file for file in opened for name in file.keys()})  # noqa: SIM118
    equal = total = 0
    for path, rows in zip(paths, zip(*([r for r in x if r] for x in (one, two)), strict=True), strict=True):
        for e, expert in enumerate(zip(*rows, strict=True)):
            for name, a, b in zip(("gate_up_proj", "down_proj"), *map(both, expert), strict=True):
                if a != b:
                    continue
                full = f"{path}.{e}.{name}"
                found = [
                    PackedMatrix(*(files[f"{full}.{p}"].get_tensor(f"{full}.{p}") for p in PackedMatrix._fields))
                    for files in tensors
                ]
                columns = found[0].scales.shape[1] * group_size_of(found[0], a)
                device = "cpu" if args.small else "cuda"
                codes = [unpack_codes(m.codes.to(device), a, group_size_for(columns, 128)) for m in found]
                equal += int((codes[0] == codes[1]).sum())
                total += codes[0].numel()
    record(args, f"job {effort}", "equal codes", 1.0, equal / max(total, 1), "")


def both(widths: Any) -> list[float]:
    """An expert's two widths, as they are or from the one that stands for both."""
    return list(widths) if isinstance(widths, list | tuple) else [widths, widths]


def group_size_of(matrix: PackedMatrix, width: float) -> int:
    from gemq.quant.widths import bytes_per_group

    each = matrix.codes.shape[1] // matrix.scales.shape[1]
    return next(g for g in (128, 64, 32, 16) if bytes_per_group(width, g) == each)


# A rank that is lost


def lost(args: argparse.Namespace, directory: Path) -> None:
    """Kills rank 1 once a layer's ladder is there, then resumes with two ranks and, from a copy, with one."""
    device = ("--device", "cpu") if args.small else ()
    keys = ("--effort", "low", "--windows", 64, "--window", 256, "--bits", 2, "-q", *device)
    out = directory / "lost"
    for path in directory.glob("lost*"):
        shutil.rmtree(path)
    job = command(2, "-m", "gemq", "quantize", builtin_model(), "-o", out, *keys)
    process = subprocess.Popen(job, stderr=subprocess.PIPE, text=True)
    work = directory / "lost.work"
    while not (work / "ladder" / "layer-000.safetensors").exists() and process.poll() is None:
        time.sleep(0.005)
    os.kill(rank_process(process.pid, 1), signal.SIGKILL)
    begin = time.perf_counter()
    told = process.communicate()[1]
    seconds = time.perf_counter() - begin
    ours = [line for line in told.splitlines() if line.startswith("gemq: ")]
    print("\n".join(ours), flush=True)
    record(args, "lost rank", "until the other has stopped", seconds, seconds, "s")
    record(args, "lost rank", "lines of ours", 1, len(ours), "")
    shutil.copytree(work, directory / "lost-alone.work")
    for ranks, name in ((2, "lost"), (1, "lost-alone")):
        goes_on = command(ranks, "-m", "gemq", "quantize", builtin_model(), "-o", directory / name, *keys, "--resume")
        begin = time.perf_counter()
        subprocess.run(goes_on, check=True)
        seconds = time.perf_counter() - begin
        record(args, "lost rank", f"resumed with {ranks}", seconds, seconds, "s")


def rank_process(launcher: int, rank: int) -> int:
    """The process id of a rank that ``launcher`` has started."""
    for directory in Path("/proc").iterdir():
        try:
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"\0RANK={rank}\0" in (directory / "environ").read_text():
                return int(directory.name)
        except (OSError, ValueError, IndexError):
            continue
    raise SystemExit(f"rank {rank} is not there any more")


# What the results are worth


def quality(args: argparse.Namespace, directory: Path) -> None:
    """KL of one process and of two on a trained model, seed by seed. On GPUs all jobs run at once."""
    calibration = [flag for file in sorted(args.texts.glob("calib_*.txt")) for flag in ("--calib", file)]
    texts = [flag for file in sorted(args.texts.glob("val_*.txt")) for flag in ("--text", file)]
    gpus = torch.cuda.device_count()

    def kl(seed: int, ranks: int) -> float:
        out = directory / f"seed{seed}-{ranks}"
        gpu = seed % gpus if gpus else None
        keys = ("--bits", 2, "--window", 512, "--windows", 130, "--seed", seed, *calibration)
        quantize(ranks, args.model, out, *keys, gpu=gpu if ranks == 1 else None)
        told = out.with_suffix(".eval.json")
        limits = ("--max-windows", 120, "-q", "--json", told)
        job = command(1, "-m", "gemq", "eval", out, "--reference", args.model, *texts, *limits)
        subprocess.run(job, check=True, env=seeing(gpu))
        print(f"seed {seed}, {ranks} ranks: KL {(found := json.loads(told.read_text())['mean_kl']):.5f}", flush=True)
        return found

    with ThreadPoolExecutor(2 * args.seeds if gpus else 1) as pool:
        found = {(seed, ranks): pool.submit(kl, seed, ranks) for seed in range(args.seeds) for ranks in (1, 2)}
        for seed in range(args.seeds):
            one, two = (found[seed, ranks].result() for ranks in (1, 2))
            record(args, "quality", f"KL, seed {seed}", one, two, "nats")


# Tensor parallel


def tensor_parallel(args: argparse.Namespace, directory: Path) -> None:
    times = []
    for ranks in (1, 2):
        told = directory / "times.json"
        flags = ["--small"] if args.small else []
        subprocess.run(
            command(ranks, __file__, "experts-of-a-rank", "--keep", told, "--layers", args.layers, *flags), check=True
        )
        times.append(json.loads(told.read_text()))
    for what in times[0]:
        one, two = (t[what] for t in times)
        record(args, "tensor parallel", f"experts of a layer, {what}", one, two, "us")


def time_experts(args: argparse.Namespace) -> None:
    """One rank of ``tensor_parallel``: microseconds of a layer's experts and the sum over ranks."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu" if args.small else f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("gloo" if args.small else "nccl", device_id=None if args.small else device)
    found = shape(args)
    half = {"intermediate_size": found.changes["intermediate_size"] // ranks}
    model = packed_model(replace(found, changes={**found.changes, **half}), device)
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
        from gemq.kernels.decode import expert_shares

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
        args.keep.write_text(json.dumps(found_times))
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
    found = []
    for ways in ({}, {"NCCL_P2P_LEVEL": "SYS"}):
        told = directory / "links.json"
        job = command(2, __file__, "links-of-a-rank", "--keep", told, *(["--small"] if args.small else []))
        subprocess.run(job, check=True, env={**os.environ, **ways})
        found.append(json.loads(told.read_text()))
    for name in found[0]:
        record(args, "links", name, found[0][name], found[1][name], "GB/s")


def time_links(args: argparse.Namespace) -> None:
    """One rank of ``links``: gigabytes a second that it receives, by collective and size."""
    rank = int(os.environ["RANK"])
    device = torch.device("cpu" if args.small else f"cuda:{rank}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if args.small else "nccl", device_id=None if args.small else device)
    found = {}
    for size in SIZES:
        own = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
        both = [torch.empty_like(own) for _ in range(2)]
        calls: dict[str, Any] = {
            "all_reduce": lambda own=own: dist.all_reduce(own),
            "all_gather": lambda own=own, both=both: dist.all_gather(both, own),
            "broadcast": lambda own=own: dist.broadcast(own, 0),
        }
        if device.type == "cuda":
            other = torch.empty_like(own, device=f"cuda:{1 - rank}")
            calls["copy from the other"] = lambda own=own, other=other: own.copy_(other)
        for name, call in calls.items():
            call()
            seconds = _mean_seconds(call, device, 3).min().item()
            found[f"{name}, {size >> 10} kB"] = size / seconds / 1e9
    if rank == 0:
        args.keep.write_text(json.dumps(found))
    dist.destroy_process_group()


RANKS = {"experts-of-a-rank": time_experts, "links-of-a-rank": time_links}
"""What a part starts in each rank."""


if __name__ == "__main__":
    main()
