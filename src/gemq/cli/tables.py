"""Tables and summaries on the terminal, from plain results. Must not import torch.

Some sentences of a job's summary are elsewhere: those of fallbacks in ``reporting.fallback_texts`` and
``runtime.fallbacks``, the guard's verdict in ``allocation.guard.describe``. ``pipeline.run_stages`` chooses the other
budget that is suggested.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from gemq.cli.fit_table import print_fit
from gemq.quant.widths import AnyWidth, ExpertWidths
from gemq.reporting.fallback_texts import FALLBACKS
from gemq.reporting.record import PAGE
from gemq.runtime.display import duration_text, size_text, styled
from gemq.runtime.tested_versions import untested_transformers

if TYPE_CHECKING:
    from gemq.checkpoint.contents import Contents
    from gemq.pipeline.plan import Plan
    from gemq.pipeline.quantize import Result
    from gemq.pipeline.size_curve import Curve

MAX_LINEARS_SHOWN = 4
MAX_WIDTH_COLUMNS = 8
"""More widths would not fit in the width of a terminal."""


def print_result(console: Console, result: Result) -> None:
    """Print the summary of ``quantize`` and ``export``: widths by layer, bytes, stages, fallbacks."""
    rows = []
    for index, (layer_widths, bits) in enumerate(zip(result.allocation, result.layer_bits, strict=True)):
        if layer_widths:
            rows.append((str(index), layer_widths, bits))
    print_widths(console, rows, result.expert_bits_nominal)
    _print_sizes(console, result)
    _print_calibration_and_gains(console, result)
    print_stages(console, result.stages)
    for tier, count in result.spilled_bytes.items():
        if count:
            console.print(
                f"Memory was short: up to {size_text(count)} of activations and packed layers were in {tier}."
            )
    _print_fallbacks(console, result.fallbacks)
    console.print(f"Work directory, which may be deleted: {result.work} ({size_text(result.work_bytes)})")
    _print_next_commands(console, result)


def _print_sizes(console: Console, result: Result) -> None:
    """Print bytes before and after, and bits per expert weight."""
    share = result.stored_bytes / result.original_bytes
    console.print(
        styled(
            (f"{size_text(result.original_bytes)} -> {size_text(result.stored_bytes)}", "bold"),
            f" ({share:.1%}), {result.quantized_share:.1%} of the parameters quantized; expert weights: "
            f"{result.expert_bits_nominal:.3f} bits, {result.expert_bits_stored:.3f} stored with scales and offsets "
            f"(budget {result.budget}, allocation {result.method})",
        )
    )
    reason = f", since {result.codes.reason}" if result.codes.reason else ""
    console.print(f"Experts have {result.codes.codes} codes{reason}")


def _print_calibration_and_gains(console: Console, result: Result) -> None:
    """Print the calibration data, the verdict of the guard, and what training gained."""
    from gemq.allocation.guard import describe

    sources = []
    for name, count in result.windows.items():
        rows = result.calibration_rows.get(name)
        columns = f" (column {', '.join(rows['columns'])})" if rows else ""
        sources.append(f"{count} {name}{columns}")
    tokens = sum(result.windows.values()) * result.seq_len
    console.print(f"Calibration: {tokens:,} tokens in windows of {result.seq_len}: {', '.join(sources)}")
    console.print(f"Guard: {describe(result.guard)}")
    for stage, unit in (("reconstruction", "layers' mean relative error"), ("distillation", "loss in nats per token")):
        loss_before = result.gains.get(f"{stage}_before")
        if loss_before is not None:
            loss_after = result.gains[f"{stage}_after"]
            console.print(f"{stage.capitalize()} on held-out windows: {unit} {loss_before:.4g} -> {loss_after:.4g}")


def _print_fallbacks(console: Console, fallbacks: dict[str, int]) -> None:
    """Print one line for each kind of fallback that happened, and the warning of an untested Transformers."""
    for name, count in fallbacks.items():
        if count:
            console.print(f"{count} {FALLBACKS.get(name, name.replace('_', ' '))}", style="yellow")
    if not any(fallbacks.values()):
        console.print("No fallbacks.")
    warning = untested_transformers()
    if warning is not None:
        console.print(warning, style="yellow")


def _print_next_commands(console: Console, result: Result) -> None:
    """Print where the checkpoint is, and commands to try next."""
    trust = ["--trust-remote-code"] if result.trust_remote_code else []
    if result.other_bits is not None:
        bits = f"{result.other_bits:g}"
        other_out = result.out.with_name(f"{result.out.name}-{bits}bit")
        if not other_out.exists():
            command = ["export", result.work, "-o", other_out, "--bits", bits, *trust]
            print_command(console, "Another budget takes seconds", command)
    verdict = f"{result.out} was complete already" if result.complete_before else f"Saved {result.out}"
    console.print(styled((verdict, "green")))
    if (result.out / PAGE).exists():
        console.print(f"Report: {result.out / PAGE}", soft_wrap=True)
    print_command(console, "Try", ["generate", result.out, "-p", "Once upon a time", *trust])


def print_command(console: Console, purpose: str, arguments: Sequence[object]) -> None:
    """Print a gemq command as it can be typed, in one line that a terminal does not break."""
    words = ["gemq", *map(str, arguments)]
    console.print(f"{purpose}: {shlex.join(words)}", soft_wrap=True)


def print_widths(console: Console, layers: Sequence[tuple[str, list[ExpertWidths], float]], mean: float) -> None:
    """Print a table of layers with the number of experts at each width, by matrix if their widths differ.

    Args:
        console: where to print
        layers: name, widths of the experts' matrices, and mean bits of each layer
        mean: bits of all layers
    """
    all_experts = [expert for _, layer_widths, _ in layers for expert in layer_widths]
    widths = sorted({width for expert in all_experts for width in expert})
    by_matrix = any(gate_up != down for gate_up, down in all_experts)
    pattern, names = short_names([name for name, _, _ in layers])
    title = "Experts at each width"
    if by_matrix:
        title += ": gate and up / down"
    if pattern:
        title += f" ({pattern})"
    table = Table(title=title, title_justify="left")
    table.add_column("layer", justify="right", overflow="fold")
    columns = _width_columns(widths)
    for label in columns:
        table.add_column(f"{label} bit", justify="right", overflow="fold")
    table.add_column("mean bits", justify="right", overflow="fold")
    for name, (_, layer_widths, bits) in zip(names, layers, strict=True):
        table.add_row(name, *_width_counts(layer_widths, columns.values(), by_matrix), f"{bits:.2f}")
    table.add_section()
    table.add_row("all", *_width_counts(all_experts, columns.values(), by_matrix), f"{mean:.2f}", style="bold")
    console.print(table)


def _width_columns(widths: Sequence[AnyWidth]) -> dict[str, list[AnyWidth]]:
    """Return the widths of each column of a table by the column's label. Many widths share columns of half a bit."""
    if len(widths) <= MAX_WIDTH_COLUMNS:
        return {str(width): [width] for width in widths}
    halves: dict[int, list[AnyWidth]] = {}
    for width in widths:
        halves.setdefault(int(2 * width.bits), []).append(width)
    return {str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}": group for group in halves.values()}


def _width_counts(experts: Sequence[ExpertWidths], columns: Iterable[Sequence[AnyWidth]], by_matrix: bool) -> list[str]:
    """Return for each column how many experts have its widths, as ``3``, or as ``3 / 2`` for the two matrices."""
    counts = [Counter(matrix_widths) for matrix_widths in zip(*experts, strict=True)]
    if not by_matrix:
        counts = counts[:1]
    cells = []
    for widths in columns:
        totals = [sum(count[width] for width in widths) for count in counts]
        cells.append(" / ".join(str(total or "·") for total in totals))
    return cells


def short_names(names: Sequence[str]) -> tuple[str, list[str]]:
    """Shorten names that differ in their first number only.

    Returns:
        ``model.layers.*.experts`` and what the star stands for in each name; an empty string and ``names`` if they
        differ otherwise. The pattern is also empty if the names are only numbers.
    """
    split_names = [re.split(r"(\d+)", name, maxsplit=1) for name in names]
    have_numbers = all(len(split_name) == 3 for split_name in split_names)
    if len(names) < 2 or not have_numbers or len({(prefix, suffix) for prefix, _, suffix in split_names}) > 1:
        return "", list(names)
    prefix, _, suffix = split_names[0]
    pattern = f"{prefix}*{suffix}" if prefix or suffix else ""
    return pattern, [number for _, number, _ in split_names]


def print_stages(console: Console, stages: dict[str, dict[str, float]]) -> None:
    """Print seconds and peak memory of each stage."""
    with_gpu = any(cost["peak_gpu_bytes"] for cost in stages.values())
    table = Table(title="Stages of this run", title_justify="left")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    if with_gpu:
        table.add_column("peak GPU memory", justify="right")
    table.add_column("peak host memory", justify="right")
    for name, cost in stages.items():
        cells = [name, f"{cost['seconds']:.1f}"]
        if with_gpu:
            cells.append(size_text(cost["peak_gpu_bytes"]))
        table.add_row(*cells, size_text(cost["peak_host_bytes"]))
    table.add_section()
    total_seconds = sum(cost["seconds"] for cost in stages.values())
    table.add_row("all", f"{total_seconds:.1f}", style="bold")
    console.print(table)


def print_plan(console: Console, plan: Plan) -> None:
    """Print the summary of ``plan``."""
    _print_parameters(console, plan)
    sizes = Table(title=f"Checkpoint size (now {size_text(plan.original_bytes)})", title_justify="left")
    sizes.add_column("bits per expert weight", justify="right")
    sizes.add_column("size", justify="right")
    for bits, size in plan.sizes.items():
        sizes.add_row(bits, size_text(size))
    console.print(sizes)
    stages = Table(title=f"Expected time on {plan.device}", title_justify="left")
    stages.add_column("stage")
    stages.add_column("time", justify="right")
    for name, seconds in plan.seconds.items():
        stages.add_row(name, duration_text(seconds))
    stages.add_section()
    stages.add_row("all", duration_text(sum(plan.seconds.values())), style="bold")
    console.print(stages)
    _print_job(console, plan)
    if plan.fit is not None:
        print_fit(console, plan.fit)
    if plan.least_bytes > plan.available_bytes:
        console.print(
            f"This machine has {size_text(plan.available_bytes)} of it: quantize would refuse here.", style="yellow"
        )
    linears = plan.linears_not_quantized
    if linears:
        console.print(f"{len(linears)} linears stay unquantized: {', '.join(linears[:MAX_LINEARS_SHOWN])}")


def _print_parameters(console: Console, plan: Plan) -> None:
    """Print the number of parameters of each kind."""
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


def _print_job(console: Console, plan: Plan) -> None:
    """Print budget, calibration, and the disk and memory that the job takes."""
    minimum, fastest, host = (
        size_text(plan.least_bytes),
        size_text(plan.quickest_bytes),
        size_text(plan.host_bytes),
    )
    if plan.device == "cpu":
        memory = f"at least {minimum} of memory (--host-memory), {fastest} to be fastest, plus {host} for libraries"
    else:
        memory = f"at least {minimum} of GPU memory (--gpu-memory), {fastest} to be fastest, {host} of host memory"
    bits = f"{plan.bits:.4g}"
    bits_of_budget = "" if plan.budget == f"{bits} bits" else f" ({bits} bits per expert weight)"
    console.print(
        f"Job: budget {plan.budget}{bits_of_budget}, {plan.tokens:,} tokens of calibration in windows of "
        f"{plan.seq_len}. Estimates: {size_text(plan.work_bytes)} of disk for the work directory; {memory}. "
        "Times are estimated from counted operations and a measurement of a second; reading and writing files is not "
        "included."
    )
    if plan.is_codes_open:
        console.print(
            "Counted for trellis codes. If the job finds that the experts' inputs cannot be equalized, it takes affine "
            "codes, which have more bytes at equal bits."
        )


def print_curve(console: Console, curve: Curve, files: list[Path]) -> None:
    """Print the summary of ``export --curve``: a row per budget. Costs are shares of uniform's at the smallest."""
    table = Table(title=f"Budgets ({curve.method}; now {size_text(curve.original_bytes)})", title_justify="left")
    for column in ("bits", "stored bits", "experts", "checkpoint", "predicted cost", "uniform's"):
        table.add_column(column, justify="right")
    for point in curve.points:
        table.add_row(
            f"{point.bits:g}",
            f"{point.stored_bits:.3f}",
            size_text(point.expert_bytes),
            size_text(point.stored_bytes),
            f"{point.predicted_cost / curve.unit:.3g}",
            f"{point.uniform_cost / curve.unit:.3g}",
        )
    console.print(table)
    console.print(
        "Predicted costs are shares of uniform's at the smallest budget, here and in the figure (the CSV has the costs "
        "themselves); they rank budgets, not models. Between two widths, uniform is a random mixture of candidate "
        "widths."
    )
    console.print(f"Written: {', '.join(map(str, files))}", soft_wrap=True)


def print_contents(console: Console, contents: Contents) -> None:
    """Print the summary of ``inspect``."""
    print_widths(console, list(contents.layers), contents.expert_bits_nominal)
    linears = ", ".join(f"{count} at {bits} bits" for bits, count in contents.linears.items())
    trellis = f"trellis codes with states of {contents.state_bits} bits, " if contents.state_bits else ""
    groups = f"groups of {contents.group_size}"
    console.print(f"{contents.path} ({contents.model_type}, {trellis}{groups})", soft_wrap=True)
    console.print(
        f"{size_text(contents.stored_bytes)} = experts {size_text(contents.expert_bytes)} + "
        f"linears {size_text(contents.linear_bytes)} + other {size_text(contents.other_bytes)}"
    )
    console.print(
        f"Expert weights: {contents.expert_bits_nominal:.3f} bits, {contents.expert_bits_stored:.3f} stored. "
        f"Dense linears: {linears or 'none quantized'}."
    )


def print_bench(console: Console, values: dict[str, Any]) -> None:
    """Print the summary of ``bench``."""
    threads = f", {values['threads']} threads" if values["threads"] else ""
    console.print(
        f"{values['model']} on {values['device']}{threads}, {values['dtype']}, {size_text(values['stored_bytes'])}; "
        f"the device copies {_rate(values['copy_bytes_per_second'])}"
    )
    decode = Table(title=f"Decode, {values['new_tokens']} tokens, median of runs", title_justify="left")
    for column in ("batch", "tokens/s", "p20", "p80", "weights a step", "read", "of copy"):
        decode.add_column(column, justify="right")
    for row in values["decode"]:
        traffic = ["-", "-", "-"]
        if "bytes_per_step" in row:
            traffic = [
                size_text(row["bytes_per_step"]),
                _rate(row["bytes_per_second"]),
                f"{row['share_of_copy']:.1%}",
            ]
        decode.add_row(str(row["batch"]), *_speed_cells(row), *traffic)
    console.print(decode)
    prefill = Table(title="Prefill, batch 1, median of runs", title_justify="left")
    for column in ("tokens", "tokens/s", "p20", "p80"):
        prefill.add_column(column, justify="right")
    for row in values["prefill"]:
        prefill.add_row(str(row["tokens"]), *_speed_cells(row))
    console.print(prefill)
    seconds = dict(values["decode"][0]["seconds"]) if values["decode"] else {}
    seconds.update(values["seconds"])
    console.print("Seconds: " + ", ".join(f"{name.replace('_', ' ')} {s:.2f}" for name, s in seconds.items()))
    executions = dict.fromkeys(row["execution"] for row in values["decode"])
    console.print(
        f"Decoded with: {', '.join(executions)}. Weights a step: dense weights once, and once the experts that any "
        "token is routed to."
    )
    for line in values["fallbacks"]:
        console.print(line, style="yellow")


def _speed_cells(row: dict[str, Any]) -> list[str]:
    """Return the tokens per second of a measurement: median, then its percentiles 20 and 80."""
    speed = row["tokens_per_second"]
    return [f"{speed[percentile]:,.1f}" for percentile in ("p50", "p20", "p80")]


def _rate(bytes_per_second: float) -> str:
    """Format as ``1,234.5 GB/s``."""
    return f"{bytes_per_second / 1e9:,.1f} GB/s"


def _count(parameters: int) -> str:
    """Format as ``5.7 M`` or ``12.3 k``."""
    return f"{parameters / 1e6:,.1f} M" if parameters >= 1e6 else f"{parameters / 1e3:,.1f} k"
