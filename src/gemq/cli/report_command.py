"""The command ``report``: the report page of a checkpoint, completed with measurements. Must not import torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gemq.cli.console import make_console, make_monitor, quiet_libraries
from gemq.cli.evaluation_flags import EvaluationFlags
from gemq.cli.flags import Quiet, parse_memory, with_flags
from gemq.cli.startup import importing
from gemq.errors import UserError
from gemq.runtime.files import check_writable, read_input

MAX_RESULTS_BYTES = 64 << 20
"""Upper bound for a file of results."""


@with_flags
def report(
    checkpoint: Annotated[Path, typer.Argument(help="A packed checkpoint.")],
    flags: EvaluationFlags,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="JSON file that gemq eval or gemq bench wrote, taken instead of measuring; may be repeated."),
    ] = None,
    bench: Annotated[
        bool, typer.Option("--bench", help="Also measure the speed of decoding and prefill, as gemq bench does.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write report.html into a checkpoint, and measurements into it and into the model card.

    With --reference, --text, --generate or --tasks the checkpoint is evaluated as gemq eval does. With --bench its
    speed is measured as gemq bench does. Other sections stay.
    """
    values = [_read_results(path) for path in results or []]
    gpu_memory = parse_memory("--gpu-memory", flags.gpu_memory)
    if flags.host_memory is not None and not flags.names_a_measurement:
        raise UserError(
            "--host-memory bounds an evaluation: leave it out, or add --reference, --text, --generate or --tasks"
        )
    quiet_libraries()
    with importing():
        from gemq.checkpoint.contents import inspect_checkpoint
        from gemq.cli.evaluation_tables import print_evaluation
        from gemq.reporting.record import PAGE, read_record

    inspect_checkpoint(checkpoint)
    check_writable(checkpoint / PAGE)  # what cannot be reported is refused before it is evaluated
    read_record(checkpoint)
    if flags.names_a_measurement:
        measured = flags.run(checkpoint, quiet)
        if not quiet:
            print_evaluation(make_console(), measured)
        values.append(measured)
    if values or not bench:
        _write(checkpoint, values, flags, quiet)
    if bench:  # an evaluation is written by then, in case this fails
        _write(checkpoint, [_measure_speed(checkpoint, flags, gpu_memory, quiet)], flags, quiet)


def _write(checkpoint: Path, values: Sequence[dict[str, Any]], flags: EvaluationFlags, quiet: bool) -> None:
    """Write measurements into the page and the model card, and print where they are."""
    from gemq.reporting.update import update_report

    page, has_card = update_report(
        checkpoint, values, reference=flags.reference, trust_remote_code=flags.trust_remote_code
    )
    if quiet:
        return
    console = make_console()
    console.print(f"Written: {page}", soft_wrap=True)
    if values and not has_card:
        console.print("README.md has no place for measurements, and stays as it is.", style="yellow")


def _measure_speed(checkpoint: Path, flags: EvaluationFlags, gpu_memory: int | None, quiet: bool) -> dict[str, Any]:
    """Return what ``gemq bench`` measures of a checkpoint by default, and print it."""
    with importing():
        from gemq.cli.tables import print_bench
        from gemq.evaluation.bench import bench_path

    speed = bench_path(
        str(checkpoint),
        dtype=flags.dtype or "auto",
        device=flags.device,
        gpu_memory=gpu_memory,
        trust_remote_code=flags.trust_remote_code,
        monitor=make_monitor(quiet),
    )
    if not quiet:
        print_bench(make_console(), speed)
    return speed


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
