"""Draws decode speed against bits from results/generation.csv: batch 1, end to end, with the limit of memory bandwidth.

    python benchmarks/plot_generation.py [--shape olmoe-1b-7b] [--device NAME] [--csv FILE] [--out FILE.svg]

The fastest row of each shape and commit, for one GPU (by default that of the last row); the newest commit's are filled.
The limit is the GPU's measured copy bandwidth over the bytes of weights that a step reads. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="olmoe-1b-7b")
    parser.add_argument("--device", help="name of a GPU in the rows")
    parser.add_argument("--csv", type=Path, default=ROOT / "results" / "generation.csv")
    parser.add_argument("--out", type=Path, default=ROOT.parent / "docs" / "generation.svg")
    args = parser.parse_args()
    with args.csv.open(encoding="utf-8") as stream:
        rows = [r for r in csv.DictReader(stream) if r["what"] == "decode" and r["batch"] == "1"]
    rows = [r for r in rows if r["shape"].startswith(args.shape + "-")]
    if not rows:
        raise SystemExit(f"{args.csv} has no decode rows of {args.shape} at batch 1: measure them with generation.py")
    rows = [r for r in rows if r["device"] == (args.device or rows[-1]["device"])]
    if not rows:
        raise SystemExit(f"{args.csv} has no rows of {args.device}: name a device of the file")
    best: dict[tuple[str, str], dict[str, str]] = {}  # of a commit and shape, the fastest way
    for row in rows:
        key = row["commit"], row["shape"]
        if key not in best or float(best[key]["p50"]) < float(row["p50"]):
            best[key] = row
    points = sorted(best.values(), key=lambda r: float(r["bits"]))
    packed = [r for r in points if not r["shape"].endswith("-bf16")]
    newest = next(r["commit"] for r in reversed(rows) if r in packed)
    plain = {r["shape"]: r for r in rows if r in points and r not in packed}

    figure, axes = plt.subplots(figsize=(7, 4.5))
    lines = {float(r["bits"]): float(r["copy_gb_per_s"]) * 1e9 / float(r["bytes"]) for r in packed}
    axes.plot(
        list(lines), list(lines.values()), "--", color="gray", label="limit: measured copy bandwidth / bytes a token"
    )
    for is_newest in (True, False):
        shown = [r for r in packed if (r["commit"] == newest) == is_newest]
        if shown:
            middle, low, high = ([float(r[p]) for r in shown] for p in ("p50", "p20", "p80"))
            spread = [[abs(m - x) for m, x in zip(middle, p, strict=True)] for p in (low, high)]
            label = "gemq, end to end" if is_newest else "earlier commits"
            style: dict[str, Any] = {
                "color": "tab:blue",
                "linestyle": "-" if is_newest else "none",
                "mfc": None if is_newest else "white",
            }
            axes.errorbar(
                [float(r["bits"]) for r in shown], middle, spread, marker="o", capsize=3, label=label, **style
            )
    for row in plain.values():
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
