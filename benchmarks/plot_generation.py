"""Draws decode speed against bits from results/generation.csv: batch 1, end to end, with the limit of memory bandwidth.

    python benchmarks/plot_generation.py [--shape olmoe-1b-7b] [--csv FILE] [--out FILE.svg]

Takes each shape's last row for one GPU. The limit is the GPU's measured copy bandwidth over the bytes of weights that a
step reads. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="olmoe-1b-7b")
    parser.add_argument("--csv", type=Path, default=ROOT / "results" / "generation.csv")
    parser.add_argument("--out", type=Path, default=ROOT.parent / "docs" / "generation.svg")
    args = parser.parse_args()
    with args.csv.open(encoding="utf-8") as stream:
        rows = [r for r in csv.DictReader(stream) if r["what"] == "decode" and r["batch"] == "1"]
    rows = [r for r in rows if r["shape"].startswith(args.shape + "-")]
    if not rows:
        raise SystemExit(f"{args.csv} has no decode rows of {args.shape} at batch 1: measure them with generation.py")
    rows = [r for r in rows if r["device"] == rows[-1]["device"]]
    best: dict[str, dict[str, str]] = {}
    for row in rows:  # the newest commit's fastest way
        old = best.get(row["shape"])
        if old is None or old["commit"] != row["commit"] or float(old["p50"]) < float(row["p50"]):
            best[row["shape"]] = row
    points = sorted(best.values(), key=lambda r: float(r["bits"]))
    packed = [r for r in points if not r["shape"].endswith("-bf16")]
    plain = [r for r in points if r["shape"].endswith("-bf16")]

    figure, axes = plt.subplots(figsize=(7, 4.5))
    bits = [float(r["bits"]) for r in packed]
    limits = [float(r["copy_gb_per_s"]) * 1e9 / float(r["bytes"]) for r in packed]
    axes.plot(bits, limits, "--", color="gray", label="limit: measured copy bandwidth / bytes a token")
    middle = [float(r["p50"]) for r in packed]
    spread = [
        [float(r["p50"]) - float(r["p20"]) for r in packed],
        [float(r["p80"]) - float(r["p50"]) for r in packed],
    ]
    axes.errorbar(bits, middle, yerr=spread, marker="o", capsize=3, label="gemq, end to end")
    for row in plain:
        axes.axhline(float(row["p50"]), color="tab:red", linewidth=1, label=f"bf16, {row['execution']}")
    axes.set(
        xlabel="nominal bits per expert weight (attention 4 bit)",
        ylabel="tokens/s, batch 1",
        title=f"{args.shape} on {points[-1]['device']}: decode speed against bits",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.out, metadata={"Date": None})
    print(args.out)


if __name__ == "__main__":
    main()
