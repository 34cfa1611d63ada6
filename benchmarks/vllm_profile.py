"""Where does a decode step in vLLM spend its time? Prints kernels by their time, for the models of ``vllm_serving``.

    python benchmarks/vllm_profile.py --weights packed --batches 1 64 256

Times are microseconds of a step on the device, averaged over all steps of a batch after its prompts. ``busy`` is the
time of all kernels and ``step`` the time of a step by the clock: what lies between is launches and the host.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from vllm_serving import SMALL, WEIGHTS, Load, Server

_profilers: list[Any] = []
"""Of the worker."""


def start(model: Any) -> None:
    """In the worker: start to record kernels."""
    activity = torch.profiler.ProfilerActivity
    profiler = torch.profiler.profile(activities=[activity.CUDA if torch.cuda.is_available() else activity.CPU])
    profiler.start()
    _profilers.append(profiler)


def stop(model: Any) -> list[tuple[str, int, float]]:
    """In the worker: return name, number of calls and total microseconds of each kernel."""
    profiler = _profilers.pop()
    profiler.stop()
    on_gpu = torch.cuda.is_available()
    events = profiler.key_averages()
    return [(e.key, e.count, e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in events]


def profile(server: Server, batch: int, kernels: int) -> None:
    """Print the kernels of a decode step with ``batch`` sequences that take the longest."""
    import vllm_profile  # this file, under a name that the worker can import

    prompt, num_steps = server.load.prompt, server.load.new_tokens
    recorded: list[dict[str, tuple[int, float]]] = []
    seconds = []
    for new_tokens in (1, num_steps + 1):  # the prompts' kernels are those of the first run
        server.run(batch, prompt, new_tokens)
        server.llm.apply_model(vllm_profile.start)
        began = time.perf_counter()
        server.run(batch, prompt, new_tokens)
        seconds.append(time.perf_counter() - began)
        recorded.append({name: (count, us) for name, count, us in server.llm.apply_model(vllm_profile.stop)[0]})
    prompts, steps = recorded
    by_name: dict[str, tuple[float, float]] = {}
    for name, (count, us) in steps.items():
        first_count, first_us = prompts.get(name, (0, 0.0))
        short_name = re.sub(r"<.*|\(.*", "", name)[:70]
        calls, total_us = by_name.get(short_name, (0.0, 0.0))
        by_name[short_name] = (calls + (count - first_count) / num_steps, total_us + (us - first_us) / num_steps)
    busy = sum(us for _, us in by_name.values())
    num_kernels = sum(count for count, _ in by_name.values())
    step = 1e6 * (seconds[1] - seconds[0]) / num_steps
    print(f"\nbatch {batch}: step {step:.0f} us, busy {busy:.0f} us in {num_kernels:.0f} kernels")
    for name, (mean_count, us) in sorted(by_name.items(), key=lambda item: -item[1][1])[:kernels]:
        print(f"  {us:8.1f} us  {mean_count:6.1f} calls  {name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="olmoe-1b-7b-2.0")
    parser.add_argument("--weights", choices=WEIGHTS, default="packed")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--kernels", type=int, default=16, help="lines of a batch")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "vllm-serving")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs and no torch.compile")
    parser.add_argument("--small", action="store_true", help="a small load, for a CPU")
    args = parser.parse_args()
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # sends functions to the worker
    load = (SMALL if args.small else Load())._replace(batches=tuple(args.batches))
    server = Server(args.dir / f"{args.shape}-{args.weights}", load, args.eager)
    for batch in args.batches:
        profile(server, batch, args.kernels)


if __name__ == "__main__":
    main()
