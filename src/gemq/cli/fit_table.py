"""The table of ``gemq plan --memory``, from plain results. Must not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from gemq.runtime.display import size_text

if TYPE_CHECKING:
    from gemq.pipeline.fit import Fit, FitRow


def print_fit(console: Console, fit: Fit) -> None:
    """Print the largest budget that fits, what it takes, and the context that other budgets leave."""
    sequences = "" if fit.batch == 1 else f", {fit.batch} sequences"
    gpus = "" if fit.gpus == 1 else f" on each of {fit.gpus} GPUs"
    table = Table(title=f"{size_text(fit.memory_bytes)}{gpus}, {fit.context:,} tokens{sequences}", title_justify="left")
    for column in ("bits per expert weight", "weights", "in use", "fits", "room for tokens"):
        table.add_column(column, justify="right")
    for row in fit.rows:
        style = "bold" if row.bits == fit.bits else ""
        fits = "yes" if row.total_bytes <= fit.memory_bytes else "no"
        table.add_row(
            f"{row.bits:g}",
            size_text(row.weight_bytes),
            size_text(row.total_bytes),
            fits,
            _context(fit, row),
            style=style,
        )
    console.print(table)
    widest = ", that of the widest candidates" if fit.bits == fit.rows[-1].bits else ""
    console.print(
        f"Largest budget that fits: {fit.bits:g} bits{widest}. Weights {size_text(fit.weight_bytes)}, cache "
        f"{size_text(fit.cache_bytes)}, CUDA and work space {size_text(fit.working_bytes)} (estimates).",
        style="bold",
    )
    if fit.gpus == 1 and fit.rows[-1].total_bytes > fit.memory_bytes:
        console.print(
            "A larger budget runs more slowly with gemq generate --gpu-memory, which leaves experts in host memory."
        )
    if fit.windowed_layers and fit.static_cache_bytes > fit.cache_bytes:
        console.print(
            f"Layers whose cache keeps a window of tokens: {fit.windowed_layers}. gemq generate keeps all tokens "
            f"there, in {size_text(fit.static_cache_bytes - fit.cache_bytes)} more."
        )
    if fit.estimated_layers:
        console.print(
            f"Layers whose cache could not be measured, and counts as full attention: {fit.estimated_layers}",
            style="yellow",
        )


def _context(fit: Fit, row: FitRow) -> str:
    """Format the context that a budget leaves room for."""
    if row.context == fit.longest_context:
        return f"{row.context:,} (all)"
    return f"{row.context:,}" if row.context else "none"
