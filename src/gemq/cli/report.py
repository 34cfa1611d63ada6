"""What the user reads: tables on the terminal, from plain results. Computes nothing and imports no torch."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from gemq.quant.widths import ExpertWidths, width_name
from gemq.runtime.display import styled
from gemq.runtime.fallbacks import DESCRIPTIONS as ACCELERATIONS
from gemq.runtime.tested_versions import untested_transformers

if TYPE_CHECKING:
    from gemq.checkpoint.contents import Contents
    from gemq.pipeline.plan import Plan
    from gemq.pipeline.quantize import Result
    from gemq.pipeline.size_curve import Curve

FALLBACKS = {
    **ACCELERATIONS,
    "experts_without_tokens": "experts saw no calibration token: they got their layer's mean statistics",
    "experts_with_few_tokens": "experts saw fewer calibration tokens than they have inputs: more windows would help",
    "hessians_damped_more": "Hessians were singular and got more damping",
    "rungs_not_improved_by_training": (
        "experts at a width, or dense linears, did no better trained on held-out windows: GPTQ's codes kept"
    ),
    "layers_not_improved_by_training": "layers did no better trained on held-out windows: GPTQ's codes kept",
    "distillation_dropped": "distillation dropped: it did no better on held-out windows",
    "matrices_in_smaller_groups": "matrices got smaller groups, since the group size does not divide their inputs",
    "linears_not_quantized": "matrices were left unquantized: gates, inputs that no group size divides, other forms",
    "matrices_too_small_for_scales": "matrices have weights below 1e-5 only, which scales (from 2^-24) hold coarsely",
    "matrices_left_out": "stored matrices are no part of the model and were left out (such as multi-token prediction)",
    "calibration_windows_missing": "calibration windows fewer than asked for: the sources hold no more text",
    "calibration_rows_empty": "rows of calibration sources have no text and were left out",
    "calibration_rows_without_template": (
        "conversations of calibration sources went without the chat template, which could not be applied to them"
    ),
    "guard_windows_missing": "held-out windows fewer than the guard takes: the sources hold no more text",
    "chat_template_failures": "self-generated windows went without the chat template, which could not be applied",
    "training_launched_by_steps": "times a layer was trained without a CUDA graph, which model or memory did not allow",
    "windows_launched_by_steps": "windows were written without a CUDA graph, which model or memory did not allow",
}


def print_result(console: Console, result: Result) -> None:
    """After ``quantize`` and ``export``: widths by layer, bytes, stages, fallbacks."""
    from gemq.allocation.guard import describe

    layers = enumerate(zip(result.allocation, result.layer_bits, strict=True))
    rows = [(str(i), row, bits) for i, (row, bits) in layers if row]
    print_widths(console, rows, result.expert_bits_nominal)
    share = result.stored_bytes / result.original_bytes
    console.print(
        styled(
            (f"{_size(result.original_bytes)} -> {_size(result.stored_bytes)}", "bold"),
            f" ({share:.1%}), {result.quantized_share:.1%} of the parameters quantized; expert weights: "
            f"{result.expert_bits_nominal:.3f} bits, {result.expert_bits_stored:.3f} stored with scales and offsets "
            f"(budget {result.budget}, allocation {result.method})",
        )
    )
    sources = ", ".join(
        f"{count} {name}{_columns(result.calibration_rows.get(name))}" for name, count in result.windows.items()
    )
    tokens = sum(result.windows.values()) * result.window
    console.print(f"Calibration: {tokens:,} tokens in windows of {result.window}: {sources}")
    console.print(f"Guard: {describe(result.guard)}")
    for what, unit in (("reconstruction", "layers' mean relative error"), ("distillation", "loss in nats per token")):
        if f"{what}_before" in result.gains:
            before, after = result.gains[f"{what}_before"], result.gains[f"{what}_after"]
            console.print(f"{what.capitalize()} on held-out windows: {unit} {before:.4g} -> {after:.4g}")
    print_stages(console, result.stages)
    for place, count in result.waited.items():
        if count:
            console.print(f"Up to {_size(count)} of activations and packed layers waited in {place} for want of room.")
    for name, count in result.fallbacks.items():
        if count:
            console.print(f"{count} {FALLBACKS.get(name, name.replace('_', ' '))}", style="yellow")
    if not any(result.fallbacks.values()):
        console.print("No fallbacks.")
    if (line := untested_transformers()) is not None:
        console.print(line, style="yellow")
    console.print(f"Work directory, which may be deleted: {result.work} ({_size(result.work_bytes)})")
    trust = ("--trust-remote-code",) if result.trust_remote_code else ()
    if result.other_bits is not None:
        bits = f"{result.other_bits:g}"
        other = result.out.with_name(f"{result.out.name}-{bits}bit")
        how = ("export", result.work, "-o", other, "--bits", bits)
        if not other.exists():
            print_command(console, "Another budget takes seconds", *how, *trust)
    done = f"{result.out} was complete already" if result.complete_before else f"Saved {result.out}"
    console.print(styled((done, "green")))
    print_command(console, "Try", "generate", result.out, "-p", "Once upon a time", *trust)


def print_command(console: Console, purpose: str, *arguments: object) -> None:
    """A gemq command as it can be typed, in one line that a terminal does not break."""
    console.print(f"{purpose}: {shlex.join(['gemq', *map(str, arguments)])}", soft_wrap=True)


def _columns(rows: dict[str, Any] | None) -> str:
    """Which columns a source's texts are from; empty for sources without rows."""
    return f" (column {', '.join(rows['columns'])})" if rows else ""


def print_widths(console: Console, layers: Sequence[tuple[str, list[ExpertWidths], float]], mean: float) -> None:
    """A table of layers with the number of experts at each width, for each of their matrices if these differ.

    layers: name, widths and mean bits of each; mean: bits of all
    """
    widths = sorted({w for _, row, _ in layers for both in row for w in both})
    differ = any(first != down for _, row, _ in layers for first, down in row)
    pattern, names = short_names([name for name, _, _ in layers])
    title = "Experts at each width" + (": gate and up / down" if differ else "") + (f" ({pattern})" if pattern else "")
    table = Table(title=title, title_justify="left")
    table.add_column("layer", justify="right", overflow="fold")
    for width in widths:
        table.add_column(f"{width_name(width)} bit", justify="right", overflow="fold")
    table.add_column("mean bits", justify="right", overflow="fold")

    def cells(row: list[ExpertWidths]) -> list[str]:
        counts = [Counter(matrix) for matrix in zip(*row, strict=True)][: 2 if differ else 1]
        return [" / ".join(str(count[w] or "·") for count in counts) for w in widths]

    for name, (_, row, bits) in zip(names, layers, strict=True):
        table.add_row(name, *cells(row), f"{bits:.2f}")
    table.add_section()
    table.add_row("all", *cells([both for _, row, _ in layers for both in row]), f"{mean:.2f}", style="bold")
    console.print(table)


def short_names(names: Sequence[str]) -> tuple[str, list[str]]:
    """``model.layers.*.experts`` and what stands for the star in each name; as they are where they differ otherwise."""
    parts = [re.split(r"(\d+)", name, maxsplit=1) for name in names]
    if len(names) > 1 and all(len(p) == 3 for p in parts) and len({(p[0], p[2]) for p in parts}) == 1:
        return (f"{parts[0][0]}*{parts[0][2]}" if parts[0][0] or parts[0][2] else ""), [p[1] for p in parts]
    return "", list(names)


def print_stages(console: Console, stages: dict[str, dict[str, float]]) -> None:
    table = Table(title="Stages of this run", title_justify="left")
    with_gpu = any(s["peak_gpu_bytes"] for s in stages.values())
    for column in ("stage", "seconds", *(["peak GPU memory"] if with_gpu else []), "peak host memory"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, cost in stages.items():
        gpu = [_size(cost["peak_gpu_bytes"])] if with_gpu else []
        table.add_row(name, f"{cost['seconds']:.1f}", *gpu, _size(cost["peak_host_bytes"]))
    table.add_section()
    table.add_row(
        "all",
        f"{sum(s['seconds'] for s in stages.values()):.1f}",
        *([""] if with_gpu else []),
        "",
        style="bold",
    )
    console.print(table)


def print_evaluation(console: Console, values: dict[str, Any]) -> None:
    """After ``eval``: one row per text."""
    compared = "mean_kl" in values
    table = Table(title=str(values["model"]), title_justify="left")
    table.add_column("text", overflow="fold")
    for column in ("perplexity", *(["KL", "top-1", "routing"] if compared else [])):
        table.add_column(column, justify="right", no_wrap=True)

    def add(name: str, row: dict[str, Any], **style: Any) -> None:
        cells = [_with_error(row, "perplexity", ".3f")]
        if compared:
            routing = row["routing_agreement"]
            cells += [
                _with_error(row, "mean_kl", ".4f"),
                _with_error(row, "top1_agreement", ".1%"),
                "-" if routing is None else f"{routing:.1%}",
            ]
        table.add_row(name, *cells, **style)

    for name, row in values["texts"].items():
        add(name, row)
    table.add_section()
    add("all", values, style="bold")
    console.print(table)
    console.print(f"{values['tokens']:,} tokens in {values['windows']} windows; ± is the standard error over windows.")
    if values["stored_bytes"]:
        bits = values["expert_bits_stored"]
        text = f"{_size(values['stored_bytes'])}" + (f", {bits:.3f} stored bits per expert weight" if bits else "")
        console.print(text)
    for name, read in values.get("rows", {}).items():
        left_out = f", {read['empty_rows']} rows without text left out" if read["empty_rows"] else ""
        console.print(f"{name}: text of its rows is from column {', '.join(read['columns'])}{left_out}")
    if values["layers"]:
        console.print("Routing agreement by layer: " + " ".join(f"{x:.3f}" for x in values["layers"]))


def _with_error(row: dict[str, Any], key: str, form: str) -> str:
    """``10.656 ±0.123``: a figure and its standard error."""
    error = row[f"{key}_stderr"]
    if error is None:
        return format(row[key], form)
    if form.endswith("%"):
        return f"{format(row[key], form)[:-1]} ±{format(error, form)}"
    return f"{format(row[key], form)} ±{format(error, form)}"


def print_plan(console: Console, plan: Plan) -> None:
    """After ``plan``."""
    table = Table(title=plan.model, title_justify="left")
    table.add_column("parameters")
    table.add_column("count", justify="right")
    table.add_column("share", justify="right")
    total = sum(plan.parameters.values())
    for kind, count in plan.parameters.items():
        if count:
            table.add_row(kind, _count(count), f"{count / total:.1%}")
    table.add_section()
    table.add_row("all", _count(total), f"{plan.quantized_share:.1%} quantized", style="bold")
    console.print(table)
    console.print(f"{plan.experts} experts in {plan.moe_layers} of {plan.layers} layers")
    sizes = Table(title=f"Checkpoint size (now {_size(plan.original_bytes)})", title_justify="left")
    sizes.add_column("bits per expert weight", justify="right")
    sizes.add_column("size", justify="right")
    for bits, size in plan.sizes.items():
        sizes.add_row(bits, _size(size))
    console.print(sizes)
    stages = Table(title=f"Expected time on {plan.device}", title_justify="left")
    stages.add_column("stage")
    stages.add_column("time", justify="right")
    for name, seconds in plan.seconds.items():
        stages.add_row(name, _duration(seconds))
    stages.add_section()
    stages.add_row("all", _duration(sum(plan.seconds.values())), style="bold")
    console.print(stages)
    least, quickest, host = (_size(x) for x in (plan.least_bytes, plan.quickest_bytes, plan.host_bytes))
    if plan.device == "cpu":
        memory = (
            f"at least {least} of memory (--host-memory), {quickest} to be quickest, {host} beside it for libraries"
        )
    else:
        memory = f"at least {least} of GPU memory (--gpu-memory), {quickest} to be quickest, {host} of host memory"
    bits = f"{plan.bits:.4g}"
    buys = "" if plan.budget == f"{bits} bits" else f" ({bits} bits per expert weight)"
    console.print(
        f"Job: budget {plan.budget}{buys}, {plan.tokens:,} tokens of calibration in windows of {plan.window}. "
        f"Estimates: {_size(plan.work_bytes)} of disk for the work directory; {memory}. "
        "Times rest on counted work and a second's measurement; files are not in them."
    )
    if plan.least_bytes > plan.available_bytes:
        console.print(
            f"This machine has {_size(plan.available_bytes)} of it: quantize would refuse here.", style="yellow"
        )
    if plan.linears_not_quantized:
        console.print(
            f"{len(plan.linears_not_quantized)} linears stay unquantized: {', '.join(plan.linears_not_quantized[:4])}"
        )


def print_curve(console: Console, curve: Curve, written: list[Path]) -> None:
    """After ``export --curve``: a row per budget. Costs are relative to uniform's at the smallest budget."""
    table = Table(title=f"Budgets ({curve.method}; now {_size(curve.original_bytes)})", title_justify="left")
    for column in ("bits", "stored bits", "experts", "checkpoint", "predicted cost", "uniform's"):
        table.add_column(column, justify="right")
    for p in curve.points:
        sizes = (_size(p.expert_bytes), _size(p.stored_bytes))
        costs = (f"{p.predicted_cost / curve.unit:.3g}", f"{p.uniform_cost / curve.unit:.3g}")
        table.add_row(f"{p.bits:g}", f"{p.stored_bits:.3f}", *sizes, *costs)
    console.print(table)
    console.print(
        "Predicted costs are shares of uniform's at the smallest budget, here and in the figure (the CSV has them as "
        "they are); they rank budgets, not models. Between two widths, uniform is a random mixture of candidate widths."
    )
    console.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True)
    if not any(path.suffix == ".svg" for path in written):
        console.print("No figure: matplotlib is not installed. To have one: pip install matplotlib")


def print_contents(console: Console, contents: Contents) -> None:
    """After ``inspect``."""
    print_widths(console, list(contents.layers), contents.expert_bits_nominal)
    linears = ", ".join(f"{count} at {bits} bits" for bits, count in contents.linears.items()) or "none quantized"
    console.print(f"{contents.path} ({contents.model_type}, groups of {contents.group_size})", soft_wrap=True)
    console.print(
        f"{_size(contents.stored_bytes)} = experts {_size(contents.expert_bytes)} + "
        f"linears {_size(contents.linear_bytes)} + other {_size(contents.other_bytes)}"
    )
    console.print(
        f"Expert weights: {contents.expert_bits_nominal:.3f} bits, {contents.expert_bits_stored:.3f} stored. "
        f"Dense linears: {linears}."
    )


def print_bench(console: Console, values: dict[str, Any]) -> None:
    """After ``bench``."""
    threads = f", {values['threads']} threads" if values["threads"] else ""
    console.print(
        f"{values['model']} on {values['device']}{threads}, {values['dtype']}, {_size(values['stored_bytes'])}; "
        f"the device copies {_rate(values['copy_bytes_per_second'])}"
    )
    decode = Table(title=f"Decode, {values['new_tokens']} tokens, median of runs", title_justify="left")
    for column in ("batch", "tokens/s", "p20", "p80", "weights a step", "read", "of copy"):
        decode.add_column(column, justify="right")
    for row in values["decode"]:
        speed = row["tokens_per_second"]
        moved = ["-"] * 3
        if "bytes_per_step" in row:
            size, rate = _size(row["bytes_per_step"]), _rate(row["bytes_per_second"])
            moved = [size, rate, f"{row['share_of_copy']:.1%}"]
        decode.add_row(str(row["batch"]), *(f"{speed[p]:,.1f}" for p in ("p50", "p20", "p80")), *moved)
    console.print(decode)
    prefill = Table(title="Prefill, batch 1, median of runs", title_justify="left")
    for column in ("tokens", "tokens/s", "p20", "p80"):
        prefill.add_column(column, justify="right")
    for row in values["prefill"]:
        speed = row["tokens_per_second"]
        prefill.add_row(str(row["tokens"]), *(f"{speed[p]:,.1f}" for p in ("p50", "p20", "p80")))
    console.print(prefill)
    seconds = {**values["decode"][0]["seconds"], **values["seconds"]} if values["decode"] else values["seconds"]
    console.print("Seconds: " + ", ".join(f"{name.replace('_', ' ')} {s:.2f}" for name, s in seconds.items()))
    runs = ", ".join(dict.fromkeys(row["execution"] for row in values["decode"]))
    console.print(f"Decoded with: {runs}. Weights a step: dense ones once, experts that any token chose once.")
    for line in values["fallbacks"]:
        console.print(line, style="yellow")


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:,.1f} GB/s"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} M" if parameters >= 1e6 else f"{parameters / 1e3:,.1f} k"


def _size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
