"""How fast do whole models run? Random packed models of true shapes on a GPU; appends to results/generation.csv.

    python benchmarks/generation.py                                     everything below, under four minutes on an H100
    python benchmarks/generation.py --parts olmoe-1b-7b-2.0 [...]       some of it; a part is a shape, a shape with
                                                                        -bf16 behind it (unquantized), or start:SHAPE
    python benchmarks/generation.py --parts olmoe-1b-7b-1 olmoe-1b-7b-4 --batches 1 --no-prefill    for the plot
    python benchmarks/generation.py --profile olmoe-1b-7b-2.0           where a decode step's time goes, printed

Each part runs in a process of its own with empty kernel caches, so that seconds of compiling are those of a first use.
``decode`` rows are end to end at batch 1, 4 and 16 (tokens of all sequences a second; prompt 128, 128 new tokens),
``prefill`` rows at 128, 512 and 2048 tokens, both warm, over five runs; ``bytes`` are the weights that a step reads
(``gemq.evaluation.weight_traffic``). ``start`` rows are seconds from packed files to the first token in a fresh
process, imports apart; the files were just written, so the operating system has them in memory. bf16 rows take the
faster of Transformers' grouped_mm and batched_mm experts in the same loop.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import RESULTS, append, environment

FILE = RESULTS / "generation.csv"
CASES = ("olmoe-1b-7b-bf16", "olmoe-1b-7b-2.0", "start:olmoe-1b-7b-2.0", "mixtral-8x7b-2.5")
BATCHES, PREFILLS, NEW_TOKENS = (1, 4, 16), (128, 512, 2048), 128
SMALL = {"batches": [1, 4], "prefills": [32], "new_tokens": 8}
"""On a CPU, to try the script out."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=CASES)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--no-prefill", action="store_true")
    parser.add_argument("--no-compile", action="store_true", help="leave decoder layers uncompiled")
    parser.add_argument("--starts", type=int, default=3, help="fresh processes of a start: part")
    parser.add_argument("--layers", type=int, help="fewer than the model has: what a CPU's memory and patience allow")
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--profile", metavar="SHAPE", help="print a decode step's kernels instead")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("\n" + json.dumps(run_part(args.child, args)))
    elif args.profile:
        profile(args.profile, args.batches[0], not args.no_compile)
    else:
        for case in args.parts:
            began = time.perf_counter()
            for row in in_fresh_process(case, sys.argv[1:]):
                append(args.out, with_ratio({**row, **environment()}, args.out))
                shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if v != ""}
                print(", ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
            print(f"-- {case}: {time.perf_counter() - began:.0f} s in all", flush=True)


def in_fresh_process(case: str, arguments: list[str]) -> list[dict[str, Any]]:
    """The rows of a part. A part that fails says why and leaves the others alone."""
    with tempfile.TemporaryDirectory() as caches:
        variables = {"TRITON_CACHE_DIR": f"{caches}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor"}
        command = [sys.executable, __file__, *arguments, "--child", case]
        ran = subprocess.run(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True)
    if ran.returncode:
        print(f"-- {case} failed with exit code {ran.returncode}", flush=True)
        return []
    return json.loads(ran.stdout.splitlines()[-1])


def run_part(case: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    if case.startswith("first-token:"):
        return [first_token(Path(case.removeprefix("first-token:")))]
    if case.startswith("start:"):
        return start(case.removeprefix("start:"), args.starts)
    return speed(case, args)


# Decode and prefill


def speed(case: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    from gemq.evaluation.bench import BenchConfig, bench
    from shapes import SHAPES, Shape, dense_model, mean_bits, packed_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    prefills = [] if args.no_prefill else PREFILLS
    full = {"batches": args.batches, "prefills": prefills, "new_tokens": NEW_TOKENS}
    sizes: dict[str, Any] = full if cuda else SMALL
    compiled = cuda and not args.no_compile
    named = f"{args.layers}-layers-{case}" if args.layers else case

    def cut(shape: Shape) -> Shape:
        return replace(shape, changes={**shape.changes, "num_hidden_layers": args.layers}) if args.layers else shape

    if not case.endswith("-bf16"):
        shape = cut(SHAPES[case])
        values = bench(packed_model(shape, device), BenchConfig(**sizes, compiled=compiled))
        rows = to_rows(named, mean_bits(shape), "packed", values)
        if compiled:  # what `gemq generate` does unless told to compile
            plain = bench(packed_model(shape, device), BenchConfig([1], [], NEW_TOKENS, compiled=False))
            rows += to_rows(named, mean_bits(shape), "packed", plain)
        return rows
    shape = cut(next(s for s in SHAPES.values() if s.name.startswith(case.removesuffix("bf16"))))
    model = dense_model(shape, device)
    rows = []
    for experts in ("batched_mm", "grouped_mm") if cuda else ("eager",):  # both loop on a CPU, and take minutes
        model.set_experts_implementation(experts)
        # Gathering the chosen experts' weights pays for few tokens only, and does not fit for a long prompt.
        few = {"batches": sizes["batches"][:1], "prefills": []} if experts == "batched_mm" else {}
        rows += to_rows(named, 16.0, experts, bench(model, BenchConfig(**{**sizes, **few}, compiled=compiled)))
    return rows


def to_rows(case: str, bits: float, experts: str, values: dict[str, Any]) -> list[dict[str, Any]]:
    for line in values["fallbacks"]:
        print(f"!! {case}: {line}", file=sys.stderr)
    rows = []
    for kind, measured in (("decode", values["decode"]), ("prefill", values["prefill"])):
        for row in measured:
            speeds = row["tokens_per_second"]
            rows.append(
                {
                    "shape": case,
                    "bits": bits,
                    "what": kind,
                    "batch": row.get("batch", 1),
                    "tokens": row.get("tokens", values["new_tokens"]),
                    "unit": "tokens/s",
                    "p20": speeds["p20"],
                    "p50": speeds["p50"],
                    "p80": speeds["p80"],
                    "ratio_to_bf16": "",
                    "bytes": row.get("bytes_per_step", ""),
                    "gb_per_s": row["bytes_per_second"] / 1e9 if "bytes_per_second" in row else "",
                    "copy_gb_per_s": values["copy_bytes_per_second"] / 1e9,
                    "share_of_copy": row.get("share_of_copy", ""),
                    "execution": f"{row.get('execution', 'eager')}, {experts} experts",
                    "warm_up_s": row.get("seconds", {}).get("warm_up", ""),
                    "compile_s": row.get("seconds", {}).get("compile", ""),
                    "capture_s": row.get("seconds", {}).get("capture", ""),
                    "peak_gpu_gb": values["peak_gpu_bytes"] / 1e9,
                }
            )
    return rows


def with_ratio(row: dict[str, Any], file: Path) -> dict[str, Any]:
    """Adds how many times the speed of the last bf16 rows of the same shape, GPU and sizes it is; the best counts."""
    if row["unit"] != "tokens/s" or row["shape"].endswith("-bf16") or not file.exists():
        return row
    base = row["shape"].rpartition("-")[0] + "-bf16"
    key_columns = ("what", "batch", "tokens", "device", "torch", "transformers")
    same = {"shape": base, **{key: str(row[key]) for key in key_columns}}
    with file.open(encoding="utf-8") as stream:
        rows = [r for r in csv.DictReader(stream) if all(r[key] == value for key, value in same.items())]
    newest = [float(r["p50"]) for r in rows if r["commit"] == rows[-1]["commit"]]
    return {**row, "ratio_to_bf16": row["p50"] / max(newest)} if newest else row


# From packed files to the first token


def start(name: str, runs: int) -> list[dict[str, Any]]:
    """Writes a packed checkpoint and loads it in fresh processes, each with empty caches."""
    import statistics

    import torch

    from shapes import SHAPES, mean_bits, write

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packed"
        write(SHAPES[name], path, "cuda" if torch.cuda.is_available() else "cpu")
        torch.cuda.empty_cache()
        measurements = [row for _ in range(runs) for row in in_fresh_process(f"first-token:{path}", [])]
    rows = []
    for what in measurements[0] if measurements else ():
        seconds = sorted(row[what] for row in measurements)
        row = {"shape": name, "bits": mean_bits(SHAPES[name]), "what": f"start: {what}", "batch": 1, "unit": "seconds"}
        middle = {"p20": seconds[0], "p50": statistics.median(seconds), "p80": seconds[-1]}
        rows.append({**dict.fromkeys(COLUMNS, ""), **row, "tokens": 128, **middle})
    return rows


COLUMNS = (
    *("shape", "bits", "what", "batch", "tokens", "unit", "p20", "p50", "p80", "ratio_to_bf16", "bytes", "gb_per_s"),
    *("copy_gb_per_s", "share_of_copy", "execution", "warm_up_s", "compile_s", "capture_s", "peak_gpu_gb"),
)


def first_token(path: Path) -> dict[str, Any]:
    """Seconds of one fresh process, step by step. What follows the first token is apart."""
    begin = time.perf_counter()
    import torch
    import transformers.generation  # imported lazily otherwise, within the loading

    import gemq.checkpoint.load
    import gemq.decoding.decoder
    from gemq.evaluation.weight_traffic import synchronize

    assert transformers.generation
    imported = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = gemq.load(path, device=device)
    synchronize(model.device)
    loaded = time.perf_counter()
    ids = torch.arange(128)[None].to(model.device)
    decoder = gemq.decoding.decoder.Decoder(model, 1, 320)
    decoder.prefill(ids).tolist()
    first = time.perf_counter()
    seconds = {"imports": imported - begin, "load": loaded - imported, "prefill": first - loaded}
    seconds["files to first token"] = first - imported
    print(seconds, file=sys.stderr, flush=True)
    for name, compiled in (("then capture", False), ("then compile and capture", True)):
        if device == "cuda":
            since = time.perf_counter()
            decoder.prepare(compile_layers=compiled)
            for _ in decoder.decode(2):
                pass
            seconds[name] = time.perf_counter() - since
            print(f"{name}: {seconds[name]:.1f} s, {decoder.execution} {decoder.reasons}", file=sys.stderr, flush=True)
    return seconds


# Where the time goes


def profile(name: str, batch: int, compiled: bool, steps: int = 20) -> None:
    """Prints the kernels of a decode step by time, and how often each runs."""
    import torch

    from gemq.decoding.decoder import Decoder
    from shapes import SHAPES, dense_model, packed_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name.endswith("-bf16"):
        shape = next(s for s in SHAPES.values() if s.name.startswith(name.removesuffix("bf16")))
        model = dense_model(shape, device)
        model.set_experts_implementation("grouped_mm")
    else:
        model = packed_model(SHAPES[name], device)
    decoder = Decoder(model, batch, 256)
    decoder.prefill(torch.arange(128, device=device).expand(batch, -1))
    decoder.prepare(compile_layers=compiled and device == "cuda")
    print(f"{name}, batch {batch}: {decoder.execution} {decoder.seconds} {decoder.reasons}")
    for _ in decoder.decode(10):
        pass
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in decoder.decode(steps):
        pass
    wall = (time.perf_counter() - begin) / steps
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in decoder.decode(steps):
            pass
    events = []
    for event in profiler.key_averages():
        total = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        events.append((total / steps, event.count / steps, event.key))
    busy, kernels = sum(e[0] for e in events), sum(e[1] for e in events)
    print(f"a step: {wall * 1e6:.0f} us by the clock, {busy:.0f} us in {kernels:.0f} kernels")
    for total, count, key in sorted(events, reverse=True)[:45]:
        print(f"{total:9.1f} us {count:7.1f} x {total / max(count, 1e-9):7.2f} us  {key[:110]}")


if __name__ == "__main__":
    main()
