"""Tables of ``gemq eval``, from plain results. Must not import torch."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from gemq.runtime.display import size_text

ROLES = ("reference", "model")
"""The two models of a generation check, in the order of columns."""


def print_evaluation(console: Console, values: dict[str, Any]) -> None:
    """Print the summary of ``eval``: one row per text, and what the models wrote."""
    has_reference = "mean_kl" in values
    table = Table(title=str(values["model"]), title_justify="left")
    table.add_column("text", overflow="fold")
    columns = ["perplexity", "KL", "KL 99%", "99.9%", "top-1"] if has_reference else ["perplexity"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in values["texts"].items():
        table.add_row(name, *_evaluation_cells(row, has_reference))
    table.add_section()
    table.add_row("all", *_evaluation_cells(values, has_reference), style="bold")
    console.print(table)
    console.print(f"{values['tokens']:,} tokens in {values['windows']} windows; ± is the standard error over windows.")
    if has_reference:
        console.print(f"Perplexity of the reference: {values['reference_perplexity']:.3f}")
    if values["layers"]:
        by_layer = " ".join(f"{share:.3f}" for share in values["layers"])
        console.print(f"Routing agreement {values['routing_agreement']:.1%}, by layer: {by_layer}")
    if values["stored_bytes"]:
        bits = values["expert_bits_stored"]
        stored_bits = f", {bits:.3f} stored bits per expert weight" if bits else ""
        console.print(f"{size_text(values['stored_bytes'])}{stored_bits}")
    for name, rows in values.get("rows", {}).items():
        empty_rows = f", {rows['empty_rows']} rows without text left out" if rows["empty_rows"] else ""
        console.print(f"{name}: text of its rows is from column {', '.join(rows['columns'])}{empty_rows}")
    if "generation" in values:
        _print_generation(console, values["generation"])
    if "tasks" in values:
        _print_tasks(console, values["tasks"])
    for line in values["fallbacks"]:
        console.print(line, style="yellow")


def _evaluation_cells(row: dict[str, Any], has_reference: bool) -> list[str]:
    """Return the figures of one text."""
    cells = [_with_error(row, "perplexity", ".3f")]
    if has_reference:
        cells.append(_with_error(row, "mean_kl", ".4f"))
        cells += [f"{row[key]:.3f}" for key in ("kl_p99", "kl_p999")]
        cells.append(_with_error(row, "top1_agreement", ".1%"))
    return cells


def _with_error(row: dict[str, Any], key: str, form: str) -> str:
    """Format a figure and its standard error as ``10.656 ±0.123``."""
    value, error = format(row[key], form), row[f"{key}_stderr"]
    if error is None:
        return value
    return f"{value.removesuffix('%')} ±{format(error, form)}"


def _print_generation(console: Console, generation: dict[str, Any]) -> None:
    """Print what the models wrote in figures: a row per figure, a column per model and way of choosing tokens."""
    roles = [role for role in ROLES if role in generation]
    if not roles:
        return
    templated = generation["prompts_in_chat_template"]
    template = f", {templated} in the chat template" if templated else ""
    title = f"Continuations of {generation['prompts']} prompts{template}, up to {generation['max_new_tokens']} tokens"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    columns = []
    for mode in ("greedy", "sampled"):
        for role in roles:
            table.add_column(f"{mode}\n{role}", justify="right", no_wrap=True)
            columns.append(generation[role][mode])
    count = generation["prompts"]
    rates = [column["repetition_rate"] for column in columns]
    table.add_row("repeated 4-grams", *("-" if rate is None else f"{rate:.1%}" for rate in rates))
    table.add_row("run into a loop", *(f"{column['loops']} of {count}" for column in columns))
    table.add_row("end early", *(f"{column['ended']} of {count}" for column in columns))
    lengths = [column["ended_mean_tokens"] for column in columns]
    table.add_row("mean tokens to end", *("-" if length is None else f"{length:.0f}" for length in lengths))
    if any("mean_kl" in column for column in columns):
        table.add_row("KL on its own text", *(_kl_cell(column) for column in columns))
    console.print(table)
    console.print("The texts themselves are in the results of --json.")


def _print_tasks(console: Console, tasks: dict[str, Any]) -> None:
    """Print the results of lm-eval: a row per task and metric."""
    table = Table(title=f"Tasks (lm-eval {tasks['lm_eval']})", title_justify="left")
    table.add_column("task", overflow="fold")
    for column in ("few-shot", "documents"):
        table.add_column(column, justify="right")
    table.add_column("metric")
    table.add_column("value", justify="right", no_wrap=True)
    for name, row in tasks["results"].items():
        counts = ["" if row[key] is None else f"{row[key]:,}" for key in ("num_fewshot", "documents")]
        for metric in row["metrics"]:
            variant = "" if metric["filter"] == "none" else f" ({metric['filter']})"
            error = "" if metric["stderr"] is None else f" ±{metric['stderr']:.4f}"
            table.add_row(name, *counts, f"{metric['metric']}{variant}", f"{metric['value']:.4f}{error}")
    console.print(table)
    if tasks["limit"] is not None:
        console.print(f"Only the first {tasks['limit']} documents of each task: not comparable with published figures")


def _kl_cell(column: dict[str, Any]) -> str:
    """Format the KL along the texts of a column, if it was measured."""
    return _with_error(column, "mean_kl", ".4f") if "mean_kl" in column else "-"
