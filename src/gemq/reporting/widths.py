"""The widths of a checkpoint's experts as pages and cards show them.

Shapes: L layers with experts, E experts of a layer.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

PALETTE = ("#fde725", "#a5db36", "#4ac16d", "#1fa187", "#277f8e", "#365c8d", "#433e85", "#482878")
"""Colors from the fewest to the most bits: viridis without its darkest end, for dark pages. Its order shows in print
and to the color-blind."""

MATRICES = ("gate and up", "down")
"""Names of an expert's two matrices, in the order of a pair of widths."""


class LayerWidths(NamedTuple):
    """The experts of a layer.

    Attributes:
        name: number of the layer in the model, or the path of its experts
        widths: for each of the two matrices, the width of every expert: two lists of E numbers
        bits: mean nominal bits per weight
    """

    name: str
    widths: tuple[list[float], list[float]]
    bits: float


def layer_names(paths: Sequence[str]) -> list[str]:
    """Return the first number in each path, or the paths themselves if they have none or share one."""
    numbers = [number.group() if (number := re.search(r"\d+", path)) else "" for path in paths]
    return numbers if all(numbers) and len(set(numbers)) == len(numbers) else list(paths)


def width_counts(layers: Sequence[LayerWidths]) -> list[tuple[float, list[int]]]:
    """Return each width in use, ascending, with the number of matrices of both kinds that have it."""
    counters: tuple[Counter[float], ...] = (Counter(), Counter())
    for layer in layers:
        for counter, widths in zip(counters, layer.widths, strict=True):
            counter.update(widths)
    return [(width, [counter[width] for counter in counters]) for width in sorted(counters[0] | counters[1])]


def width_colors(layers: Sequence[LayerWidths]) -> dict[float, str]:
    """Return a color for each width in use. Equal ratios of bits are equal steps of color."""
    widths = [width for width, _ in width_counts(layers)]
    low, high = math.log2(widths[0]), math.log2(widths[-1])
    return {width: _color((math.log2(width) - low) / (high - low) if high > low else 0.5) for width in widths}


def _color(share: float) -> str:
    """Return the color at ``share`` of the palette, from 0 to 1, mixed from its two neighbors."""
    position = share * (len(PALETTE) - 1)
    index = min(int(position), len(PALETTE) - 2)
    fraction = position - index
    channels = []
    for start in (1, 3, 5):
        low, high = (int(PALETTE[index + step][start : start + 2], 16) for step in (0, 1))
        channels.append(round(low + fraction * (high - low)))
    return "#" + "".join(f"{channel:02x}" for channel in channels)


def text_color(background: str) -> str:
    """Return black or white, whichever is easier to read on a color such as ``#1fa187``."""
    red, green, blue = (int(background[start : start + 2], 16) for start in (1, 3, 5))
    return "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else "#fff"
