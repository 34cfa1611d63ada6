"""Is ``gemq plan`` right? A stage's expected seconds and bytes next to those of a real job on this machine.

    python benchmarks/plan.py MODEL [--effort low] [--num-windows 40] [--seq-len 512] [--calibration FILE ...]
                              [--keep DIR]

One row per stage in results/plan.csv: planned and measured seconds, and the peak memory of the whole job.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from gemq.pipeline.plan import plan
from gemq.pipeline.quantize import quantize
from gemq.recipe import Recipe
from gemq.runtime.device import pick_device
from record import RESULTS, append, environment


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--effort", default="low")
    parser.add_argument("--num-windows", type=int, default=40)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--calibration", action="append", default=[])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--csv", type=Path, default=RESULTS / "plan.csv")
    args = parser.parse_args()
    flags = {"effort": args.effort, "num_windows": args.num_windows, "seq_len": args.seq_len, "bits": 2.0}
    recipe = Recipe.from_yaml(args.recipe, {**flags, **({"calibration": args.calibration} if args.calibration else {})})
    device = pick_device(args.device)
    planned = plan(args.model, recipe, device=args.device)
    with tempfile.TemporaryDirectory() as directory:
        result = quantize(args.model, recipe, out=Path(directory) / "out", device=args.device)
    seconds = {name: cost["seconds"] for name, cost in result.stages.items()}
    tries = len(result.guard.get("tried", []))
    seconds["all"] = sum(seconds.values())
    peak = "peak_gpu_bytes" if device.type == "cuda" else "peak_host_bytes"
    peak_bytes = max(cost[peak] for cost in result.stages.values())
    host_bytes = 0 if device.type == "cuda" else planned.host_bytes
    for name, measured in seconds.items():
        expected = planned.seconds.get(name, 0.0) if name != "all" else sum(planned.seconds.values())
        row = {
            "model": Path(args.model).name,
            "effort": args.effort,
            "tokens": planned.tokens,
            "stage": name,
            "planned_s": expected,
            "measured_s": measured,
            "planned_gb": (planned.quickest_bytes + host_bytes) / 1e9 if name == "all" else "",
            "measured_gb": peak_bytes / 1e9 if name == "all" else "",
            "guard_tries": tries,
            **environment(),
        }
        append(args.csv, row)
        print(f"{name:22} planned {expected:8.1f} s, measured {measured:8.1f} s", flush=True)
    print(f"memory: planned {(planned.quickest_bytes + host_bytes) / 1e9:.3f} GB, measured {peak_bytes / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
