"""``gemq demo``: quantize the built-in model, export other allocations, compare them, and generate text with each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gemq.assets import builtin_model
from gemq.cli.tables import print_result
from gemq.errors import UserError
from gemq.evaluation.evaluate import evaluate_paths, open_model
from gemq.evaluation.generate import generate
from gemq.pipeline.quantize import export, quantize
from gemq.recipe import Recipe
from gemq.runtime.progress import Monitor

WINDOWS, WINDOW, TOKENS = 32, 256, 24_576
"""Number and length of calibration windows, and total tokens: few, so that the demo takes minutes on two cores."""

PROMPT = "The configuration file"


@dataclass(frozen=True)
class Variant:
    """A checkpoint that is exported from the work directory of the demo.

    Attributes:
        name: as the table shows it
        directory: of the checkpoint
        changes: recipe keys
        reconstruct: whether its layers are reconstructed
    """

    name: str
    directory: str
    changes: dict[str, Any]
    reconstruct: bool = False


VARIANTS = (
    Variant("random 2.0 *", "random-2.0", {"bits": 2.0, "allocate": "random"}),
    Variant("uniform 2 bit *", "uniform-2", {"bits": 2.0, "allocate": "uniform"}),
    Variant("gemq 2.0 *", "gemq-2.0-exported", {"bits": 2.0}),
    Variant("gemq 1.5", "gemq-1.5", {"bits": 1.5}, reconstruct=True),
)
TABLE_ORDER = ("full precision", "random 2.0 *", "uniform 2 bit *", "gemq 2.0 *", "gemq 2.0", "gemq 1.5")
CAPTION = "* exported in seconds from the same experts: layers not reconstructed, nothing distilled"


def run_demo(out: Path, device: str, console: Console) -> dict[str, Any]:
    """Run the demo into ``out`` and print its table. Returns the figures of each variant and the result of the job."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists: delete it, or name another directory with -o")
    model = builtin_model()
    monitor = Monitor(console)
    console.print(
        f"Built-in model {model.name}: quantizing to 2.0 bits, calibrated on {WINDOWS} windows that it writes itself."
    )
    recipe = Recipe(bits=2.0, num_windows=WINDOWS, seq_len=WINDOW, total_tokens=TOKENS)
    work, quantized = out / "work", out / "gemq-2.0"
    result = quantize(str(model), recipe, out=quantized, work=work, device=device, monitor=monitor)
    print_result(console, result)
    paths = {"full precision": model, "gemq 2.0": quantized}
    for variant in VARIANTS:
        console.print(f"From the same work directory: {variant.name}")
        paths[variant.name] = out / variant.directory
        export(
            work,
            out=paths[variant.name],
            changes=variant.changes,
            reconstruct=variant.reconstruct,
            device=device,
            monitor=monitor,
        )
    rows = {name: _measure(paths[name], model, device, monitor) for name in TABLE_ORDER}
    _print_table(console, rows)
    return {"variants": rows, "quantize": result.to_dict()}


def _measure(checkpoint: Path, model: Path, device: str, monitor: Monitor) -> dict[str, Any]:
    """Return size, perplexity, KL from the full-precision ``model``, and a generated text of a checkpoint."""
    reference = None if checkpoint == model else str(model)
    values = evaluate_paths(str(checkpoint), reference=reference, device=device, monitor=monitor)
    opened = open_model(str(checkpoint), "float32", device)
    text = generate(opened.model, opened.tokenizer, PROMPT, max_new_tokens=24)
    return {
        "bytes": values["stored_bytes"],
        "perplexity": values["perplexity"],
        "mean_kl": values.get("mean_kl", 0.0),
        "text": " ".join((PROMPT + text).split()),
    }


def _print_table(console: Console, rows: dict[str, dict[str, Any]]) -> None:
    """Print one row for each variant."""
    title = "Built-in texts, float32, windows of 512 tokens"
    table = Table(title=title, title_justify="left", caption=CAPTION, caption_justify="left", show_lines=True)
    table.add_column("", no_wrap=True)
    for column in ("MB", "perplexity", "KL"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("writes")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['perplexity']:.2f}",
            f"{row['mean_kl']:.4f}",
            row["text"],
        )
    console.print(table)
