"""Two GPUs against one of the same host: whole jobs, and what they give. Below a job, see ``two_ranks``.

    python benchmarks/two_gpus.py jobs [--effort low defaults] [--layers 16] [--num-windows 128]
    python benchmarks/two_gpus.py quality --model refmoe-olmoe-23m --texts TEXTS [--seeds 3]
    python benchmarks/two_gpus.py lost
    (--small: shapes and windows to try the script out, two processes on a CPU)

``jobs``: random weights of OLMoE-1B-7B's true shape, made on the machine; one process, then ``torchrun
--nproc-per-node 2``, with the same text, once a model of one layer has had all kernels compiled. A row a stage, one for
the computing stages and one for the whole process from start to saved checkpoint; then how alike the two results are.
``quality``: defaults on a trained model, KL of both over seeds. ``lost``: the built-in model's job, whose rank 1 is
killed; seconds until the other has stopped, and what it says; then both ways of going on. Rows go to
results/two_gpus.csv.
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
from pathlib import Path
from typing import Any

import torch
import yaml

from gemq.assets import builtin_model
from gemq.quant.packing import PackedMatrix, unpack_codes
from gemq.quant.widths import Width
from record import RESULTS, append, environment
from scale import JOBS, recipe, write_model, write_text

FILE = RESULTS / "two_gpus.csv"
OUTSIDE = ("load", "allocate", "save")
"""Stages that compute nothing which two ranks could share."""
ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}  # NVLink multicast stays off


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=("jobs", "quality", "lost"))
    parser.add_argument("--effort", nargs="+", default=["low", "defaults"], choices=JOBS)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--num-windows", type=int, default=128)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="directory for models and results; default: a temporary one")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--csv", type=Path, default=FILE)
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as directory:
        job_directory = args.keep or Path(directory)
        job_directory.mkdir(parents=True, exist_ok=True)
        {"jobs": jobs, "quality": quality, "lost": lost}[args.part](args, job_directory)


def record(args: argparse.Namespace, what: str, name: str, value_1: float, value_2: float, unit: str) -> None:
    """A row of ``args.csv``, which is also printed."""
    ratio = value_1 / value_2 if value_2 else 0.0
    row = {"what": what, "name": name, "one": value_1, "two": value_2, "ratio": ratio, "unit": unit, **environment()}
    append(args.csv, row)
    print(f"{what}, {name}: one {value_1:.4g} {unit}, two {value_2:.4g} {unit}, ratio {ratio:.3g}", flush=True)


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


def jobs(args: argparse.Namespace, directory: Path) -> None:
    name = "small" if args.small else "olmoe"
    model, text = directory / "model", directory / "words.txt"
    windows, seq_len = (8, 64) if args.small else (args.num_windows, 2048)
    if not model.exists():
        write_model(name, 4 if args.small else args.layers, model)
    write_text(text, windows * seq_len)
    device = ("--device", "cpu") if args.small else ()
    if not args.small:  # kernels are compiled before anything counts
        first = directory / "one-layer"
        write_model(name, 1, first)
        for effort in args.effort:
            job = ("--recipe", written(effort, 4, seq_len, text, directory / "few.yaml"), "--bits", 2)
            quantize(1, first, directory / "one-layer-out", *job)
    for effort in args.effort:
        file = written(effort, windows, seq_len, text, directory / f"{effort}.yaml")
        flags = ("--recipe", file, "--bits", 2, *device)
        results = [quantize(ranks, model, directory / f"{effort}-{ranks}", *flags) for ranks in (1, 2)]
        (figures_1, seconds_1), (figures_2, seconds_2) = results
        stages = [
            {name: cost["seconds"] for name, cost in figures["stages"].items()} for figures in (figures_1, figures_2)
        ]
        for name in stages[0]:
            record(args, f"job {effort}", name, stages[0][name], stages[1].get(name, 0.0), "s")
        computing = [sum(s for name, s in stage.items() if name not in OUTSIDE) for stage in stages]
        record(args, f"job {effort}", "computing stages", computing[0], computing[1], "s")
        record(args, f"job {effort}", "whole process", seconds_1, seconds_2, "s")
        record(args, f"job {effort}", "predicted cost", figures_1["predicted_cost"], figures_2["predicted_cost"], "")
        record_equality(args, effort, directory, figures_1["allocation"], figures_2["allocation"])


def written(effort: str, windows: int, seq_len: int, text: Path, file: Path) -> Path:
    """The recipe of a job, in a file."""
    keys = recipe(effort, windows, seq_len, text).to_dict()
    file.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))
    return file


def record_equality(args: argparse.Namespace, effort: str, directory: Path, widths_1: Any, widths_2: Any) -> None:
    """Share of matrices at the same width, and of equal codes among them."""
    pairs = [
        pair
        for rows in zip(widths_1, widths_2, strict=True)
        for expert in zip(*rows, strict=True)
        for pair in zip(*map(width_pair, expert), strict=True)
    ]
    record(args, f"job {effort}", "matrices at the same width", 1.0, sum(a == b for a, b in pairs) / len(pairs), "")
    from safetensors import safe_open

    from gemq.checkpoint.contents import inspect_checkpoint

    outs = [directory / f"{effort}-{ranks}" for ranks in (1, 2)]
    paths = [path for path, _, _ in inspect_checkpoint(outs[0]).layers]
    tensors: list[dict[str, Any]] = []
    for out in outs:
        opened = [safe_open(file, "pt") for file in sorted(out.glob("*.safetensors"))]
        tensors.append({name: file for file in opened for name in file.keys()})  # noqa: SIM118
    equal = total = 0
    for path, rows in zip(paths, zip(*([r for r in x if r] for x in (widths_1, widths_2)), strict=True), strict=True):
        for e, expert in enumerate(zip(*rows, strict=True)):
            for name, a, b in zip(("gate_up_proj", "down_proj"), *map(width_pair, expert), strict=True):
                if a != b:
                    continue
                full = f"{path}.{e}.{name}"
                device = "cpu" if args.small else "cuda"
                codes = []
                for files in tensors:
                    stored = {key: files[key].get_tensor(key) for key in files if key.startswith(f"{full}.")}
                    matrix = PackedMatrix.from_tensors(stored, full, Width(a))
                    codes.append(unpack_codes(matrix.codes.to(device), matrix.width, matrix.group_size))
                equal += int((codes[0] == codes[1]).sum())
                total += codes[0].numel()
    record(args, f"job {effort}", "equal codes", 1.0, equal / max(total, 1), "")


def width_pair(widths: Any) -> list[float]:
    """An expert's two widths, as they are or from the one that stands for both."""
    return list(widths) if isinstance(widths, list | tuple) else [widths, widths]


# A rank that is lost


def lost(args: argparse.Namespace, directory: Path) -> None:
    """Kills rank 1 once the candidates of a layer exist, then resumes with two ranks and, from a copy, with one."""
    device = ("--device", "cpu") if args.small else ()
    keys = ("--effort", "low", "--num-windows", 64, "--seq-len", 256, "--bits", 2, "-q", *device)
    out = directory / "lost"
    for path in directory.glob("lost*"):
        shutil.rmtree(path)
    job = command(2, "-m", "gemq", "quantize", builtin_model(), "-o", out, *keys)
    process = subprocess.Popen(job, stderr=subprocess.PIPE, text=True)
    work = directory / "lost.work"
    while not (work / "candidates" / "layer-000.safetensors").exists() and process.poll() is None:
        time.sleep(0.005)
    os.kill(rank_process(process.pid, 1), signal.SIGKILL)
    begin = time.perf_counter()
    stderr = process.communicate()[1]
    seconds = time.perf_counter() - begin
    ours = [line for line in stderr.splitlines() if line.startswith("gemq: ")]
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
    """KL of one process and of two on a trained model, seed by seed. On GPUs all jobs run at once.

    Windows of 512 tokens, and as many again that the model writes.
    """
    calibration = [flag for file in sorted(args.texts.glob("calib_*.txt")) for flag in ("--calibration", file)]
    texts = [flag for file in sorted(args.texts.glob("val_*.txt")) for flag in ("--text", file)]
    gpus = torch.cuda.device_count()
    tokens = directory / "tokens.yaml"
    tokens.write_text(
        yaml.safe_dump({"seq_len": 512, "num_windows": args.num_windows, "total_tokens": 1024 * args.num_windows})
    )

    def kl(seed: int, ranks: int) -> float:
        out = directory / f"seed{seed}-{ranks}"
        gpu = seed % gpus if gpus else None
        keys = ("--bits", 2, "--recipe", tokens, "--seed", seed, *calibration)
        quantize(ranks, args.model, out, *keys, gpu=gpu if ranks == 1 else None)
        figures = out.with_suffix(".eval.json")
        limits = ("--max-windows", 120, "-q", "--json", figures)
        job = command(1, "-m", "gemq", "eval", out, "--reference", args.model, *texts, *limits)
        subprocess.run(job, check=True, env=seeing(gpu))
        nats: float = json.loads(figures.read_text())["mean_kl"]
        print(f"seed {seed}, {ranks} ranks: KL {nats:.5f}", flush=True)
        return nats

    with ThreadPoolExecutor(2 * args.seeds if gpus else 1) as pool:
        futures = {(seed, ranks): pool.submit(kl, seed, ranks) for seed in range(args.seeds) for ranks in (1, 2)}
        for seed in range(args.seeds):
            kl_1, kl_2 = (futures[seed, ranks].result() for ranks in (1, 2))
            record(args, "quality", f"KL, seed {seed}", kl_1, kl_2, "nats")


if __name__ == "__main__":
    main()
