"""What results/accuracy.csv says: the tables and the two figures of docs/accuracy.md.

    python benchmarks/accuracy_report.py [--csv FILE] [--docs DIR]

Of rows with the same name the newest counts. A name with a label in brackets is an experiment on the side and left out.
Variants of a model with outliers compute the same function, so their KL is shown as a multiple of the model's. Equal
rows give equal bytes. Figures have a white ground of their own, so that they read the same on light and dark pages.
Must not measure anything.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from accuracy_tables import Row, Rows, tables
from record import read
from row_families import DARK, FAMILIES, GREY, LIGHT, Family, family_and_budget
from rows import allocation_widths, newest, variant_base

plt.switch_backend("agg")

RESULTS = Path(__file__).parent / "results" / "accuracy.csv"
DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- table -->", "<!-- /table -->"
WIDTH_COLOURS = {1: "#fde6a8", 1.6: "#a6d9a0", 2: "#48b0b5", 3: "#2a6fae", 4: "#2d2f7f", 8: "#15133f"}


def main() -> None:
    """Writes the tables and figures, and prints their files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    arguments = parser.parse_args()
    for path in report(arguments.csv, arguments.docs):
        print(path)


def report(results: Path, docs: Path) -> list[Path]:
    """Makes the figures in ``docs`` and puts the tables into its accuracy.md. Returns the files written."""
    # The largest model, which the text is about, comes first.
    all_models = dict(
        sorted(newest(read(results)).items(), key=lambda item: -max(int(r["bytes"]) for r in item[1].values()))
    )
    models = {model: rows for model, rows in all_models.items() if variant_base(model) is None}
    page, curves, widths = docs / "accuracy.md", docs / "accuracy-kl.svg", docs / "accuracy-widths.svg"
    page.write_text(between_markers(page.read_text(encoding="utf-8"), tables(all_models)), encoding="utf-8")
    save(draw_curves(models), curves)
    save(draw_widths(*next(item for item in models.items() if _gemq(item[1]))), widths)
    return [page, curves, widths]


def between_markers(text: str, content: str) -> str:
    """``text`` with ``content`` between its two markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"the page needs {BEGIN} and {END} once each")
    return text[: text.index(BEGIN)] + f"{BEGIN}\n{content}\n{END}" + text[text.index(END) + len(END) :]


# KL against size


@dataclass
class Series:
    """The points of a family: stored bits and KL."""

    family: Family
    x: list[float]
    y: list[float]


def draw_curves(models: dict[str, Rows]) -> Any:
    """A panel a model: KL on a log axis against stored bits of an expert weight, a line for each family."""
    models = {model: rows for model, rows in models.items() if _series(rows)}
    figure, panels = plt.subplots(len(models), 1, figsize=(8.6, 5.6 * len(models)), squeeze=False, layout="constrained")
    for axes, (model, rows) in zip(panels[:, 0], models.items(), strict=True):
        all_series = _series(rows)
        axes.set_yscale("log")
        for series in all_series:
            ours = series.family is FAMILIES[0]
            look = {"color": series.family.colour, "linestyle": series.family.line, "zorder": 4 if ours else 3}
            axes.plot(series.x, series.y, marker="o", ms=7 if ours else 5, lw=2.8 if ours else 1.5, **look)
        shown = [row for row in rows.values() if family_and_budget(row["name"])]
        sizes = {round(float(row["stored_bits"]), 3): int(row["bytes"]) / 1e6 for row in shown}  # some use up not quite
        axes.set_xlim(min(sizes) - 0.2, max(sizes) + 0.3)
        low, high = min(min(s.y) for s in all_series), max(max(s.y) for s in all_series)
        axes.set_ylim(low / 1.35, high * 1.25)
        axes.set_xticks(list(sizes), [f"{bits:g} bits\n{size:.1f} MB" for bits, size in sizes.items()])
        ticks = [step * 10**power for power in (-3, -2, -1, 0) for step in (1, 1.5, 2, 3, 5, 7)]
        ticks = [tick for tick in ticks if low / 1.35 < tick < high * 1.25]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("stored bits of an expert weight, and size of the whole checkpoint")
        title = f"{model}: KL to full precision, nats a token, on texts that calibration did not see"
        axes.set_title(title, loc="left", pad=24)
        styles = "solid: reconstructed and distilled;  dashed: GPTQ on the calibration text alone.  Lower is better."
        axes.text(0, 1.02, styles, transform=axes.transAxes, fontsize=10, color=GREY)
        _style(axes, grid="both")
    figure.canvas.draw()  # labels go where there is room, which the layout decides
    for axes, rows in zip(panels[:, 0], models.values(), strict=True):
        _label_lines(axes, _series(rows))
    return figure


def _series(rows: Rows) -> list[Series]:
    """The series of all families that are drawn and have rows."""
    all_series = []
    for family in FAMILIES:
        if not family.label:
            continue
        matches = {name: family_and_budget(name) for name in rows}
        family_rows = [rows[name] for name, match in matches.items() if match is not None and match[0] is family]
        # "assembled 2.0" and "assembled 2.0 default" are one point.
        points = sorted({float(row["stored_bits"]): float(row["val_kl"]) for row in family_rows}.items())
        if points:
            all_series.append(Series(family, [p[0] for p in points], [p[1] for p in points]))
    return all_series


def _label_lines(axes: Any, all_series: list[Series]) -> None:
    """Writes each family's name near one of its points, where it covers least; a thin line leads there from afar."""
    paths = [axes.transData.transform(np.column_stack([s.x, s.y])) for s in all_series]
    inked, points = np.concatenate([_along(path) for path in paths]), np.concatenate(paths)
    frame = axes.get_window_extent()
    label_boxes: list[Any] = []
    for series, path in sorted(zip(all_series, paths, strict=True), key=lambda pair: len(pair[1])):
        ours, colour = series.family is FAMILIES[0], series.family.colour
        font = {"color": colour, "fontsize": 14 if ours else 11, "fontweight": "bold" if ours else "normal"}
        best, best_cost = None, np.inf
        for spot in _spots(series):
            label = axes.annotate(series.family.label, textcoords="offset points", **spot, **font)
            box = label.get_window_extent().padded(3)
            label.remove()
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            cost = 1000 * (outside + sum(bool(box.overlaps(label_box)) for label_box in label_boxes))
            cost += 100 * box.count_contains(points) + 15 * box.count_contains(inked)
            if _is_far(spot):
                anchor = axes.transData.transform(spot["xy"])
                lead = _along(np.array([anchor, anchor + np.array(spot["xytext"]) * axes.figure.dpi / 72]))[4:]
                cost += 8 * np.count_nonzero(np.linalg.norm(lead[:, None] - inked, axis=2).min(axis=1) < 4)
            cost += 5 * box.padded(12).count_contains(points)  # a name between two points could be either's
            # Rather close, at the right of the line's right end.
            cost += np.hypot(*spot["xytext"]) + 3 * (len(path) - 1 - series.x.index(spot["xy"][0]))
            cost += {"left": 0, "center": 4, "right": 8}[spot["ha"]]
            if cost < best_cost:
                best, best_cost, best_box = spot, cost, box
        assert best is not None
        far = {"arrowprops": {"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkB": 4}}
        line = far if _is_far(best) else {}
        axes.annotate(series.family.label, textcoords="offset points", **best, **font, **line, zorder=5)
        label_boxes.append(best_box)


def _spots(series: Series) -> Iterator[dict[str, Any]]:
    """Where a label may stand: around each point, in three distances."""
    across, along = {1: "left", 0: "center", -1: "right"}, {1: "bottom", 0: "center", -1: "top"}
    for point in zip(series.x, series.y, strict=True):
        for away in (9, 22, 38):
            for dx, dy in ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 1), (-1, -1), (-1, 0)):
                step = away * (0.7 if dx and dy else 1)
                yield {"xy": point, "xytext": (dx * step, dy * step), "ha": across[dx], "va": along[dy]}


def _is_far(spot: dict[str, Any]) -> bool:
    """Whether a label there needs a line that leads to its point."""
    return bool(np.hypot(*spot["xytext"]) > 15)


def _along(path: np.ndarray) -> np.ndarray:
    """Points along a polyline, one every few pixels."""
    segments = [path]
    for a, b in itertools.pairwise(path):
        steps = np.linspace(0, 1, max(2, int(np.hypot(*(b - a)) / 4)))[:, None]
        segments.append(a + steps * (b - a))
    return np.concatenate(segments)


# Widths


def draw_widths(model: str, rows: Rows) -> Any:
    """Widths of gemq's allocations: a square for each expert, or counts where the rows hold no more than those."""
    chosen = _gemq(rows)
    if all(row.get("allocation") for row in chosen.values()):
        return _draw_experts(model, {bits: allocation_widths(row["allocation"]) for bits, row in chosen.items()})
    return _draw_counts(model, {bits: _counts(row) for bits, row in chosen.items()})


def _gemq(rows: Rows) -> Rows:
    """gemq's rows by budget."""
    by_budget = {f[1]: row for name, row in rows.items() if (f := family_and_budget(name)) and f[0] is FAMILIES[0]}
    return dict(sorted(by_budget.items(), key=lambda item: float(item[0])))


def _counts(row: Row) -> dict[float, int]:
    counts = Counter[float]()
    for field in row["widths"].replace("/", " ").split():
        width, _, count = field.partition(":")
        counts[float(width)] += int(count)
    return dict(counts)


def _draw_experts(model: str, by_budget: dict[str, list[list[tuple[float, float]]]]) -> Any:
    # Experts have no order of their own: by their widths over all budgets, the same in each panel.
    total = np.sum([np.array(layers) for layers in by_budget.values()], axis=(0, 3))
    order = np.argsort(-total, axis=1, kind="stable")
    layers, experts = total.shape
    figure, panels = plt.subplots(
        1, len(by_budget), figsize=(9, 1.3 + 0.25 * layers), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (bits, widths) in zip(panels[0], by_budget.items(), strict=True):
        sorted_widths = np.take_along_axis(np.array(widths), order[..., None], axis=1).reshape(layers, -1)
        colours = np.array([[to_rgb(WIDTH_COLOURS[w]) for w in layer] for layer in sorted_widths.tolist()])
        axes.pcolormesh(colours, edgecolors="white", linewidth=0.7)
        axes.set_xticks([])
        axes.set_yticks(np.arange(layers) + 0.5, [str(n) for n in range(layers)])
        axes.set_title(f"gemq {bits}", loc="left")
        _style(axes)
        axes.spines[:].set_visible(False)
    panels[0, 0].invert_yaxis()
    panels[0, 0].set_ylabel("layer")
    caption = (
        f"each layer's {experts} experts, most bits over all budgets first: gate and up, then down, of one and the next"
    )
    figure.supxlabel(caption, fontsize=10, color=DARK)
    _key(
        figure,
        f"{model}: bits of each expert",
        {w for rows in by_budget.values() for row in rows for expert in row for w in expert},
    )
    return figure


def _draw_counts(model: str, by_budget: dict[str, dict[float, int]]) -> Any:
    figure, axes = plt.subplots(figsize=(9, 1.3 + 0.62 * len(by_budget)), layout="constrained")
    for y, counts in enumerate(by_budget.values()):
        left = 0
        for width, count in sorted(counts.items()):
            axes.barh(y, count, left=left, height=0.72, color=WIDTH_COLOURS[width], edgecolor="white")
            if count >= 0.025 * sum(counts.values()):
                ink = _ink(WIDTH_COLOURS[width])
                axes.text(left + count / 2, y, str(count), ha="center", va="center", color=ink)
            left += count
    axes.set_yticks(range(len(by_budget)), [f"gemq {bits}" for bits in by_budget])
    axes.set_xlim(0, max(sum(counts.values()) for counts in by_budget.values()))
    axes.invert_yaxis()
    axes.set_xlabel("experts")
    _style(axes)
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False)
    _key(figure, f"{model}: experts at each width", {width for counts in by_budget.values() for width in counts})
    return figure


def _key(figure: Any, title: str, widths: set[float]) -> None:
    """The figure's title, and under it which colour is which width."""
    names = {w: "ternary (1.6)" if w == 1.6 else f"{w:g} bit" for w in sorted(widths)}
    patches = [Patch(color=WIDTH_COLOURS[w], label=name) for w, name in names.items()]
    look = {"frameon": False, "handlelength": 1.2, "handleheight": 1.2, "columnspacing": 1.6, "alignment": "left"}
    position = {"loc": "outside upper left", "ncols": len(patches), "title": title, "title_fontsize": 12}
    figure.legend(handles=patches, fontsize=10.5, labelcolor=DARK, **position, **look)


def _ink(ground: str) -> str:
    red, green, blue = to_rgb(ground)
    return DARK if 0.3 * red + 0.59 * green + 0.11 * blue > 0.55 else "white"


# Both figures


def _style(axes: Any, grid: str = "") -> None:
    axes.title.set(fontsize=12, color=DARK)
    axes.tick_params(colors=DARK, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")
    if grid:
        axes.grid(axis=grid, color=LIGHT, lw=0.8)
        axes.set_axisbelow(True)


def save(figure: Any, path: Path) -> None:
    """Same rows, same bytes: no date, no version, and ids that do not depend on the run."""
    with matplotlib.rc_context({"svg.hashsalt": "gemq"}):
        figure.savefig(path, dpi=110, metadata={"Date": None, "Creator": None} if path.suffix == ".svg" else None)
    plt.close(figure)


if __name__ == "__main__":
    main()
