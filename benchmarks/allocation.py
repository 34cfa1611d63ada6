"""How long does the global program take at the size of Kimi-K2: 60 layers of 384 experts?

Synthetic costs: log-normal importance of experts and of layers, 4^-bits with log-normal noise. Appends a row
for each set of widths and each rule to results/allocation.csv: seconds of ``allocate`` alone and the largest gap.

    python benchmarks/allocation.py [--layers 60] [--experts 384] [--bits 2.0] [--runs 10]
"""

from __future__ import annotations

import argparse
import os
import platform
import time

import numpy as np
import scipy

import gemq
from gemq.allocation.problem import Budget, Problem, allocate
from gemq.quant.widths import Width
from record import RESULTS, append, commit

LADDERS: tuple[tuple[Width, ...], ...] = (
    (Width.ONE_BIT, Width.TWO_BIT, Width.THREE_BIT),
    (Width.ONE_BIT, Width.TERNARY, Width.TWO_BIT, Width.THREE_BIT),
    (Width.ONE_BIT, Width.TERNARY, Width.TWO_BIT, Width.THREE_BIT, Width.FOUR_BIT),
)
HIDDEN, INTERMEDIATE, GROUP = 7168, 2048, 128  # Kimi-K2


def synthetic(layers: int, experts: int, widths: tuple[Width, ...], seed: int) -> Problem:
    draw = np.random.default_rng(seed)
    n = layers * experts
    importance = draw.normal(0, 2, n) + draw.normal(0, 1, layers).repeat(experts)
    errors = 4.0 ** -np.array([w.bits for w in widths])
    stored = [
        2 * w.matrix_bytes(INTERMEDIATE, HIDDEN, GROUP) + w.matrix_bytes(HIDDEN, INTERMEDIATE, GROUP) for w in widths
    ]
    return Problem(
        widths=widths,
        layer=np.arange(layers).repeat(experts),
        costs=np.exp(importance[:, None] + draw.normal(0, 0.2, (n, len(widths)))) * errors,
        weights=np.full(n, 3 * HIDDEN * INTERMEDIATE),
        bytes=np.tile(stored, (n, 1)),
        counts=draw.integers(1, 1000, n),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--experts", type=int, default=384)
    parser.add_argument("--bits", type=float, default=2.0, help="budget, mean nominal bits per expert weight")
    parser.add_argument("--runs", type=int, default=10, help="each with costs of its own")
    args = parser.parse_args()
    for widths in LADDERS:
        for rule in (False, True):
            seconds, gaps = [], []
            for seed in range(args.runs):
                problem = synthetic(args.layers, args.experts, widths, seed)
                start = time.perf_counter()
                allocation = allocate(problem, Budget("bits", args.bits), layer_rule=rule)
                seconds.append(time.perf_counter() - start)
                gaps.append(allocation.gap or 0.0)
            p20, p50, p80 = np.percentile(seconds, (20, 50, 80))
            row = {
                "layers": args.layers,
                "experts": args.experts,
                "widths": "/".join(map(str, widths)),
                "bits": args.bits,
                "layer_rule": int(rule),
                "runs": args.runs,
                "seconds_p20": f"{p20:.4f}",
                "seconds_p50": f"{p50:.4f}",
                "seconds_p80": f"{p80:.4f}",
                "gap": f"{max(gaps):.2e}",
                "cpus": os.cpu_count(),
                "gemq": gemq.__version__,
                "scipy": scipy.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
                "commit": commit(),
            }
            print(", ".join(f"{key} {value}" for key, value in row.items()))
            append(RESULTS / "allocation.csv", row)


if __name__ == "__main__":
    main()
