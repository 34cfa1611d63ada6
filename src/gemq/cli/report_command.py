"""The command ``report``: the report page of a checkpoint, completed with measurements. Must not import torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gemq.cli.console import make_console, make_monitor, quiet_libraries
from gemq.cli.flags import (
    Device,
    EvaluationDtype,
    GenerationFlag,
    GpuMemory,
    HostMemory,
    MaxNewTokens,
    MaxWindows,
    NumFewshot,
    Quiet,
    Reference,
    SeqLen,
    TaskLimit,
    TaskNames,
    TaskPaths,
    TextColumn,
    Texts,
    TrustRemoteCode,
    parse_memory,
)
from gemq.cli.model_commands import check_window_flags, read_task_names
from gemq.cli.startup import importing
from gemq.errors import UserError
from gemq.runtime.files import check_writable, read_input

MAX_RESULTS_BYTES = 64 << 20
"""Upper bound for a file of results."""


def report(
    checkpoint: Annotated[Path, typer.Argument(help="A packed checkpoint.")],
    reference: Reference = None,
    text: Texts = None,
    text_column: TextColumn = None,
    seq_len: SeqLen = 512,
    max_windows: MaxWindows = None,
    generate: GenerationFlag = False,
    max_new_tokens: MaxNewTokens = None,
    tasks: TaskNames = None,
    task_path: TaskPaths = None,
    task_limit: TaskLimit = None,
    num_fewshot: NumFewshot = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="JSON file that gemq eval or gemq bench wrote, taken instead of measuring; may be repeated."),
    ] = None,
    dtype: EvaluationDtype = "float32",
    device: Device = "auto",
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Write report.html into a checkpoint, and measurements into it and into the model card.

    With --reference, --text, --generate or --tasks the checkpoint is evaluated as gemq eval does. Other sections stay.
    """
    check_window_flags(seq_len, max_windows)
    task_names = read_task_names(tasks, task_path, task_limit, num_fewshot)
    is_measured = reference is not None or bool(text) or generate or bool(task_names)
    if max_new_tokens is not None and not generate:
        raise UserError("--max-new-tokens is the length of generated texts: add --generate")
    values = [_read_results(path) for path in results or []]
    quiet_libraries()
    with importing():
        from gemq.checkpoint.contents import inspect_checkpoint
        from gemq.cli.evaluation_report import print_evaluation
        from gemq.evaluation.evaluate import evaluate_paths
        from gemq.reporting.record import PAGE, read_record
        from gemq.reporting.update import update_report

    inspect_checkpoint(checkpoint)
    check_writable(checkpoint / PAGE)  # what cannot be reported is refused before it is evaluated
    read_record(checkpoint)
    if is_measured:
        measured = evaluate_paths(
            checkpoint,
            reference=reference,
            texts=text,
            text_column=text_column,
            seq_len=seq_len,
            max_windows=max_windows,
            generate=generate,
            max_new_tokens=max_new_tokens,
            tasks=task_names,
            task_directories=task_path or (),
            task_limit=task_limit,
            num_fewshot=num_fewshot,
            dtype=dtype,
            device=device,
            gpu_memory=parse_memory("--gpu-memory", gpu_memory),
            host_memory=parse_memory("--host-memory", host_memory),
            trust_remote_code=trust_remote_code,
            monitor=make_monitor(quiet),
        )
        if not quiet:
            print_evaluation(make_console(), measured)
        values.append(measured)
    page, has_card = update_report(checkpoint, values, reference=reference, trust_remote_code=trust_remote_code)
    if not quiet:
        console = make_console()
        console.print(f"Written: {page}", soft_wrap=True)
        if values and not has_card:
            console.print("README.md has no place for measurements, and stays as it is.", style="yellow")


def _read_results(path: Path) -> dict[str, Any]:
    """Return the results in a JSON file. Raises UserError if it cannot be read or holds no object."""
    try:
        values = json.loads(read_input(path, MAX_RESULTS_BYTES))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check --results") from error
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no results of gemq eval or gemq bench: give the file that their --json wrote")
    return values
