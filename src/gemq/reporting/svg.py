"""Static SVG pictures: maps of widths and the size curve. Everything that comes from a file is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from gemq.reporting.sentences import width_unit
from gemq.reporting.widths import MATRICES, LayerWidths, text_color, width_colors

FONT = "font-family='system-ui,sans-serif' font-size='12'"
STANDALONE_STYLE = (
    "<style>text{fill:#222}.axis{stroke:#999}.grid{stroke:#ddd}.model-line,.model-mark{stroke:#2563a8}"
    ".uniform-line{stroke:#888;stroke-dasharray:5 4}.model-mark{fill:#2563a8}"
    ".random-mark{fill:#c2410c;stroke:#c2410c}</style>"
)

MAP_WIDTH = 640
"""Width of a map in the picture of a model card, in pixels, and the widest that one of few experts becomes."""
MAX_CELL, MAX_CELL_HEIGHT, MIN_CELL_HEIGHT = 24, 16, 5
MAX_SEPARATED_COLUMNS = 64
"""Columns of a map that have lines between them. With more, the lines would hide the cells."""
LEFT, RIGHT, TOP, LINE = 48, 16, 24, 18
"""Margins of a picture, and the height of a line of text."""

CHART_WIDTH, CHART_HEIGHT = 720, 340
CHART_LEFT, CHART_BOTTOM = 64, 52


class Mark(NamedTuple):
    """A checkpoint in the chart of a size curve.

    Attributes:
        kind: ``model`` or ``random``, which chooses its color and shape
        label: what the legend calls it
        stored_bytes: bytes of all tensors
        cost: predicted cost
    """

    kind: str
    label: str
    stored_bytes: int
    cost: float


def cells(rows: Sequence[Sequence[float]], colors: Mapping[float, str]) -> str:
    """Return the cells of a map, one unit wide and high: a path for each width, with equal neighbors in one run.

    Args:
        rows: a width for each cell
        colors: by width
    """
    paths: dict[float, list[str]] = {width: [] for width in colors}
    for y, row in enumerate(rows):
        start = 0
        for x in range(1, len(row) + 1):
            if x == len(row) or row[x] != row[start]:
                paths[row[start]].append(f"M{start} {y}h{x - start}v1h-{x - start}z")
                start = x
    return "".join(f"<path fill='{colors[width]}' d='{''.join(path)}'/>" for width, path in paths.items() if path)


def lines_between_cells(columns: int, rows: int) -> str:
    """Return the path of the lines that separate the rows of a map, and its columns if they are wide enough."""
    vertical = "".join(f"M{x} 0V{rows}" for x in range(1, columns)) if columns <= MAX_SEPARATED_COLUMNS else ""
    return vertical + "".join(f"M0 {y}H{columns}" for y in range(1, rows))


def widths_picture(layers: Sequence[LayerWidths]) -> str:
    """Return an SVG file with the widths of all experts, for a model card."""
    colors = width_colors(layers)
    columns = max(len(layer.widths[0]) for layer in layers)
    cell_width = min(MAX_CELL, MAP_WIDTH / columns)
    cell_height = min(MAX_CELL_HEIGHT, max(MIN_CELL_HEIGHT, 400 / len(layers)))
    map_width, map_height = columns * cell_width, len(layers) * cell_height
    width = max(LEFT + map_width, 40 * len(colors) + LEFT, 300) + RIGHT
    content = []
    y = float(TOP)
    for matrix, title in enumerate(MATRICES):
        content.append(f"<text x='{LEFT}' y='{y:g}'>{title}: a row for each layer, a column for each expert</text>")
        y += LINE / 2
        rows = [layer.widths[matrix] for layer in layers]
        scale = f"transform='translate({LEFT} {y:g}) scale({cell_width:.6g} {cell_height:.6g})'"
        lines = lines_between_cells(columns, len(layers))
        separators = f"<path d='{lines}' fill='none' stroke='#fff' vector-effect='non-scaling-stroke'/>"
        content.append(f"<g {scale} shape-rendering='crispEdges'>{cells(rows, colors)}{separators}</g>")
        for index in labeled_indices(len(layers), math.ceil(LINE / cell_height)):
            baseline = y + (index + 0.5) * cell_height + 4
            content.append(
                f"<text x='{LEFT - 6}' y='{baseline:.4g}' text-anchor='end'>{_short(layers[index].name)}</text>"
            )
        y += map_height + LINE * 1.5
    for index, (bits, color) in enumerate(colors.items()):
        x = LEFT + 40 * index
        content.append(f"<rect x='{x}' y='{y - 12:g}' width='36' height='16' fill='{color}'/>")
        content.append(
            f"<text x='{x + 18}' y='{y:g}' text-anchor='middle' style='fill:{text_color(color)}'>{bits:g}</text>"
        )
    y += LINE
    content.append(f"<text x='{LEFT}' y='{y:g}'>{width_unit(layers)}</text>")
    return standalone("".join(content), width, y + LINE / 2, "Widths of all experts by layer")


def labeled_indices(count: int, spacing: int) -> range:
    """Return the indices among ``count`` that get a label, at least ``spacing`` apart, in round steps."""
    steps = (step * 10**power for power in range(9) for step in (1, 2, 5))
    return range(0, count, next(step for step in steps if step >= spacing))


def standalone(content: str, width: float, height: float, title: str) -> str:
    """Return an SVG file on a white background."""
    size = f"viewBox='0 0 {width:g} {height:g}' width='{width:g}'"
    background = "<rect width='100%' height='100%' fill='#fff'/>"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' {size} {FONT} role='img'><title>{escape(title)}</title>"
        f"{STANDALONE_STYLE}{background}{content}</svg>\n"
    )


def size_curve_chart(points: Sequence[Mapping[str, Any]], unit: float, marks: Sequence[Mark] = ()) -> str:
    """Return the size curve as the content of an SVG of ``CHART_WIDTH`` by ``CHART_HEIGHT``.

    Each point can be focused and has its figures as ``data-tip``.

    Args:
        points: plain values of ``CurvePoint``, in ascending order of budget
        unit: cost that the figure shows as 1
        marks: checkpoints
    """
    curves = [(point["stored_bytes"], point["predicted_cost"] / unit, point["uniform_cost"] / unit) for point in points]
    costs = [cost for curve in curves for cost in curve[1:]] + [mark.cost / unit for mark in marks]
    smallest_cost = min((cost for cost in costs if cost > 0), default=1.0)
    sizes = [size for size, *_ in curves] + [mark.stored_bytes for mark in marks]
    axes = _Axes(min(sizes), max(sizes), smallest_cost, max(*costs, smallest_cost))
    content = [axes.draw()]
    for column, name in ((2, "uniform-line"), (1, "model-line")):
        line = " ".join(f"{axes.x(curve[0]):.1f},{axes.y(curve[column]):.1f}" for curve in curves)
        content.append(f"<polyline class='{name}' fill='none' stroke-width='2' points='{line}'/>")
    for point, (size, cost, uniform) in zip(points, curves, strict=True):
        tip = f"{point['bits']:g} bits, {axes.size(size)}: predicted cost {cost:.3g}, uniform widths {uniform:.3g}"
        content.append(_point("model-mark", "circle r='3.5'", axes.x(size), axes.y(cost), tip))
    for mark in marks:
        share = mark.cost / unit
        tip = f"{mark.label}, {axes.size(mark.stored_bytes)}: predicted cost {share:.3g}"
        shape = "circle r='7' fill-opacity='0.35'" if mark.kind == "model" else "path d='M0-6L6 5H-6z'"
        content.append(_point(f"{mark.kind}-mark", shape, axes.x(mark.stored_bytes), axes.y(share), tip))
    content.append(_legend(marks))
    return "".join(content)


def _point(name: str, shape: str, x: float, y: float, tip: str) -> str:
    """Return a shape at a position of a chart, that can be focused."""
    tip = escape(tip, quote=True)
    position = f"transform='translate({x:.1f} {y:.1f})'"
    return f"<{shape} class='{name}' {position} tabindex='0' role='img' aria-label='{tip}' data-tip='{tip}'/>"


def _legend(marks: Sequence[Mark]) -> str:
    """Return the legend of a size curve, in the upper right corner."""
    entries = [("model-line", "allocated by gemq"), ("uniform-line", "uniform widths, or two mixed at random")]
    x, y = CHART_WIDTH - 290, 22
    lines = []
    for name, label in entries:
        lines.append(
            f"<path class='{name}' stroke-width='2' d='M{x} {y - 4}h24'/><text x='{x + 32}' y='{y}'>{label}</text>"
        )
        y += LINE
    for mark in marks:
        shape = "circle r='6' fill-opacity='0.35'" if mark.kind == "model" else "path d='M0-6L6 5H-6z'"
        lines.append(f"<{shape} class='{mark.kind}-mark' transform='translate({x + 12} {y - 4})'/>")
        lines.append(f"<text x='{x + 32}' y='{y}'>{escape(mark.label)}</text>")
        y += LINE
    return "".join(lines)


class _Axes:
    """Axes of a chart: bytes on a linear scale, costs on a logarithmic one."""

    def __init__(self, low_size: float, high_size: float, low_cost: float, high_cost: float) -> None:
        margin = (high_size - low_size) * 0.04 or high_size * 0.1
        self._low, self._high = low_size - margin, high_size + margin
        self._bottom = math.log10(low_cost) - 0.08
        self._top = max(math.log10(high_cost) + 0.08, self._bottom + 0.3)
        self._floor = low_cost
        self._unit, self._unit_name = next(
            (unit, name)
            for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
            if high_size >= unit or unit == 1
        )

    def x(self, size: float) -> float:
        """Return the horizontal position of a size in bytes."""
        return CHART_LEFT + (CHART_WIDTH - CHART_LEFT - RIGHT) * (size - self._low) / (self._high - self._low)

    def y(self, cost: float) -> float:
        """Return the vertical position of a cost. Costs of zero are drawn at the smallest other one."""
        share = (math.log10(max(cost, self._floor)) - self._bottom) / (self._top - self._bottom)
        return CHART_HEIGHT - CHART_BOTTOM - (CHART_HEIGHT - CHART_BOTTOM - RIGHT) * share

    def size(self, size: float) -> str:
        """Return a size as text."""
        return f"{size / self._unit:.4g} {self._unit_name}"

    def draw(self) -> str:
        """Return axes, grid and labels."""
        bottom, right = CHART_HEIGHT - CHART_BOTTOM, CHART_WIDTH - RIGHT
        lines = []
        for exponent in range(math.floor(self._bottom), math.ceil(self._top) + 1):
            for digit in (1, 2, 5):
                cost = digit * 10.0**exponent
                if self._bottom <= math.log10(cost) <= self._top:
                    y = self.y(cost) if cost >= self._floor else bottom
                    lines.append(f"<path class='grid' d='M{CHART_LEFT} {y:.1f}H{right}'/>")
                    lines.append(f"<text x='{CHART_LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>{cost:g}</text>")
        for size in _round_ticks(self._low / self._unit, self._high / self._unit):
            x = self.x(size * self._unit)
            lines.append(f"<path class='axis' d='M{x:.1f} {bottom}v5'/>")
            lines.append(f"<text x='{x:.1f}' y='{bottom + 20}' text-anchor='middle'>{size:g}</text>")
        lines.append(f"<path class='axis' fill='none' d='M{CHART_LEFT} {RIGHT}V{bottom}H{right}'/>")
        middle = (CHART_LEFT + right) / 2
        lines.append(
            f"<text x='{middle:g}' y='{CHART_HEIGHT - 10}' text-anchor='middle'>checkpoint in {self._unit_name}</text>"
        )
        lines.append(
            f"<text transform='translate(14 {bottom / 2:g}) rotate(-90)' text-anchor='middle'>predicted cost</text>"
        )
        return "".join(lines)


def _round_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Return about ``count`` round numbers between two numbers."""
    raw_step = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw_step))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= raw_step)
    start = math.ceil(low / step)
    return [round(index * step, 12) for index in range(start, math.floor(high / step) + 1)]


def _short(name: str) -> str:
    """Return the name of a layer for a narrow margin, escaped."""
    return escape(name if len(name) <= 6 else f"…{name[-5:]}")
