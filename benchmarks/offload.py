"""How fast is a model whose experts do not all fit on the GPU? Random packed models; appends to results/offload.csv.

    python benchmarks/offload.py                                          OLMoE's and Mixtral's shapes, trellis codes
    python benchmarks/offload.py --shapes olmoe-1b-7b-2.0 --shares 33     another shape, some shares
    python benchmarks/offload.py --no-compile --no-overlap                what `gemq generate` does; one fetch a layer

A share is that of the experts' codes that stay on the GPU, taken evenly, so that nothing is gained by usage.
A row has tokens a second at batch 1 (prompt 128, sampled at temperature 1), the bytes of codes that a step moves to the
GPU, counted from the routing of other steps, and what share of the bus that is: the time that these bytes take at the
bandwidth of a copy from pinned memory, measured in the same run, over the time of a step. Greedy tokens of each share
are compared with those of all experts on the GPU; a difference ends the run. ``--fetch`` prints the speed of the fetch
kernel alone.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from gemq.decoding.decoder import Decoder
from gemq.evaluation.weight_traffic import synchronize
from gemq.kernels import dispatch, fetch
from gemq.kernels.modules import PackedExperts
from gemq.kernels.offload import Residency, expert_code_bytes, offload_experts
from gemq.models.experts import record_experts_calls
from record import RESULTS, append, environment
from shapes import SHAPES, mean_bits, packed_model

FILE = RESULTS / "offload.csv"
CASES = ("olmoe-1b-7b-trellis-2.0", "mixtral-8x7b-trellis-2.5")
SHARES = (100, 66, 33, 10)
PROMPT, NEW_TOKENS, RUNS, COUNTED_STEPS = 128, 64, 3, 16
PREFILL = 1024
BUS_BYTES = 1 << 29


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=CASES, choices=SHAPES)
    parser.add_argument("--shares", nargs="+", type=int, default=SHARES, help="percent of codes on the GPU")
    parser.add_argument("--no-compile", action="store_true", help="leave decoder layers uncompiled")
    parser.add_argument("--no-overlap", action="store_true", help="fetch down projections before gate and up run")
    parser.add_argument("--fetch", action="store_true", help="print the speed of the fetch kernel instead")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bus = bus_bandwidth(device)
    print(f"a copy from pinned memory: {bus / 1e9:.1f} GB/s", flush=True)
    if args.no_overlap:
        dispatch.MAX_OVERLAPPED_TOKENS = 0
    for name in args.shapes:
        if args.fetch:
            time_fetch(name, device)
            continue
        expected: list[int] = []
        for share in args.shares:
            began = time.perf_counter()
            row, tokens = measure(name, share, device, bus, not args.no_compile)
            expected = expected or tokens
            if tokens != expected:
                raise SystemExit(f"{name}: tokens at {share} % differ from those at {args.shares[0]} %")
            append(FILE, {**row, "overlap": not args.no_overlap, **environment()})
            shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
            print(", ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
            print(f"-- same {len(tokens)} tokens; {time.perf_counter() - began:.0f} s in all", flush=True)


def bus_bandwidth(device: torch.device) -> float:
    """Bytes a second of a copy from pinned host memory to the GPU."""
    source = torch.empty(BUS_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(BUS_BYTES, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(6):
        synchronize(device)
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return BUS_BYTES / statistics.median(seconds[1:])


def offloaded_model(name: str, share: int, device: torch.device) -> tuple[Any, list[Any], Residency | None]:
    """A model with ``share`` percent of its experts' codes on the GPU, its experts modules, and where experts are."""
    model = packed_model(SHAPES[name], device)
    modules = [module for module in model.modules() if isinstance(module, PackedExperts)]
    if share >= 100:
        return model, modules, None
    sizes = [expert_code_bytes(module) for module in modules]
    totals = [sum(layer) for layer in sizes]
    capacity = max(max(totals), int(share / 100 * sum(totals) + (1 - share / 100) * max(totals)))
    usage = [[1 / len(layer)] * len(layer) for layer in sizes]
    return model, modules, offload_experts(modules, usage, capacity, device)


def measure(
    name: str, share: int, device: torch.device, bus: float, compiled: bool
) -> tuple[dict[str, Any], list[int]]:
    """A row, and greedy tokens."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    model, modules, residency = offloaded_model(name, share, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, PROMPT), generator=generator).to(device)

    greedy = Decoder(model, 1, PROMPT + NEW_TOKENS + 1)
    greedy.prefill(ids)
    greedy.prepare(compile_layers=False)
    tokens = [int(greedy.prefill(ids)), *(token for (token,) in greedy.decode(NEW_TOKENS))]

    decoder = Decoder(model, 1, PROMPT + NEW_TOKENS + 1, temperature=1.0)
    decoder.prefill(ids)
    moved = moved_bytes(decoder, modules, residency)
    decoder.prepare(compile_layers=compiled and device.type == "cuda")
    for reason in decoder.reasons.values():
        print(f"!! {reason}", flush=True)
    speeds = []
    for run in range(1 + RUNS):
        torch.manual_seed(run)
        decoder.prefill(ids)
        synchronize(device)
        began = time.perf_counter()
        for _ in decoder.decode(NEW_TOKENS):
            pass
        synchronize(device)
        speeds.append(NEW_TOKENS / (time.perf_counter() - began))
    speed = statistics.median(speeds[1:])
    row = {
        "shape": name,
        "bits": mean_bits(SHAPES[name]),
        "share": share,
        "resident_share": 1.0 if residency is None else residency.resident_share,
        "tokens_per_s": speed,
        "moved_mb": moved / 1e6,
        "bus_gb_per_s": bus / 1e9,
        "share_of_bus": moved * speed / bus,
        "prefill_tokens_per_s": prefill_speed(model, device),
        "execution": decoder.execution,
        "staging_mb": 0.0 if residency is None else residency.staging_bytes / 1e6,
        "peak_gpu_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0,
    }
    return row, tokens


@torch.no_grad()
def moved_bytes(decoder: Decoder, modules: Sequence[Any], residency: Residency | None) -> float:
    """Mean bytes of codes that a step moves to the GPU, from the routing of eager steps."""
    if residency is None:
        return 0.0
    sizes = [expert_code_bytes(module) for module in modules]
    total = 0
    for _ in range(COUNTED_STEPS):
        with ExitStack() as stack:
            calls = [stack.enter_context(record_experts_calls(module)) for module in modules]
            decoder.step()
        for layer_sizes, residents, (call,) in zip(sizes, residency.residents, calls, strict=True):
            chosen = set(call.top_k_index.flatten().tolist()) - residents
            total += sum(layer_sizes[expert] for expert in chosen)
    return total / COUNTED_STEPS


def prefill_speed(model: Any, device: torch.device) -> float:
    """Tokens a second of a prompt."""
    ids = torch.randint(model.config.vocab_size, (1, PREFILL), generator=torch.Generator().manual_seed(1)).to(device)
    decoder = Decoder(model, 1, PREFILL + 1)
    seconds = []
    for _ in range(3):
        synchronize(device)
        began = time.perf_counter()
        decoder.prefill(ids)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return PREFILL / min(seconds)


def time_fetch(name: str, device: torch.device) -> None:
    """Prints the speed of the fetch kernel for the experts of one token, by its options."""
    _, modules, residency = offloaded_model(name, 10, device)
    assert residency is not None
    sizes = expert_code_bytes(modules[0])
    slots = 2 if len(sizes) == 8 else 8
    index = torch.tensor([[expert for expert in range(len(sizes)) if expert not in residency.residents[0]][:slots]])
    moved = sum(sizes[expert] for expert in index[0].tolist())
    index = index.to(device)
    for programs in (4, 8, 16, 32, 64):
        for units in (256, 512, 1024, 2048):
            fetch.MATRIX_PROGRAMS, fetch.BLOCK_UNITS = programs, units
            seconds = []
            for _ in range(4):
                synchronize(device)
                began = time.perf_counter()
                for module in modules:
                    fetch.fetch_codes(index, module.fetch_table, module.down_proj.codes, False)
                synchronize(device)
                seconds.append((time.perf_counter() - began) / len(modules))
            speed = moved / min(seconds) / 1e9
            print(f"{name}: {programs} programs a matrix, blocks of {16 * units} bytes: {speed:.1f} GB/s", flush=True)


if __name__ == "__main__":
    main()
