"""Commands that make checkpoints: plan, quantize, export. They import torch only when they run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from gemq.cli.console import check_json_path, is_stdout, make_console, make_monitor, output_json, quiet_libraries
from gemq.cli.flags import (
    Allocate,
    AllocationFile,
    Bits,
    Context,
    Device,
    GpuMemory,
    HostMemory,
    Json,
    Model,
    Out,
    Quiet,
    RecipeFile,
    RecipeFlags,
    Revision,
    Size,
    StoredBits,
    TrustRemoteCode,
    parse_memory,
    recipe_overrides,
    with_flags,
)
from gemq.cli.startup import importing
from gemq.errors import UserError
from gemq.models import file_hashes
from gemq.recipe import Recipe
from gemq.runtime.processes import is_first

DEFAULT_RECIPE = "default"


@with_flags
def plan(
    model: Model,
    flags: RecipeFlags,
    recipe: RecipeFile = None,
    allocation: AllocationFile = None,
    device: Device = "auto",
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory of a GPU that is to serve the model, such as 24GB: which budget fits, and why."),
    ] = None,
    context: Context = None,
    batch: Annotated[int, typer.Option(help="With --memory: sequences that are served at the same time.")] = 1,
    gpus: Annotated[int, typer.Option(help="With --memory: GPUs that share the model (tensor parallel).")] = 1,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json_file: Json = None,
) -> None:
    """Dry run without weights: sizes, memory, disk and time, and whether quantize would accept these flags.

    With --memory also: the largest budget that fits into a GPU with room for a context, and the context that other
    budgets leave.
    """
    overrides = flags.overrides()
    check_json_path(json_file)
    _check_fit_flags("--memory", memory, context, batch, gpus)
    resolved_recipe = Recipe.from_yaml(recipe or DEFAULT_RECIPE, overrides)
    gpu_bytes = parse_memory("--gpu-memory", gpu_memory)
    host_bytes = parse_memory("--host-memory", host_memory)
    with importing():
        from gemq.cli.tables import print_plan
        from gemq.pipeline.plan import plan as make_plan

    result = make_plan(
        model,
        resolved_recipe,
        allocation=allocation,
        device=device,
        gpu_memory=gpu_bytes,
        host_memory=host_bytes,
        memory=parse_memory("--memory", memory),
        context=context,
        batch=batch,
        gpus=gpus,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if not output_json(json_file, result.to_dict()):
        print_plan(make_console(), result)


def _check_fit_flags(flag: str, memory: str | None, context: int | None, batch: int = 1, gpus: int = 1) -> None:
    """Raise UserError for flags of a fit without a memory, and for numbers below 1."""
    numbers = {"--context": context, "--batch": batch, "--gpus": gpus}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UserError(f"{name} cannot be {number}: give at least 1")
    if memory is None and (context is not None or batch > 1 or gpus > 1):
        raise UserError(f"--context, --batch and --gpus say what is to fit: add {flag}, such as {flag} 24GB")


@with_flags
def quantize(
    model: Model,
    out: Out,
    flags: RecipeFlags,
    recipe: RecipeFile = None,
    allocation: AllocationFile = None,
    device: Device = "auto",
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    fit: Annotated[
        str | None,
        typer.Option(help="Budget: the largest that fits into a GPU with this memory, such as 24GB, and --context."),
    ] = None,
    context: Context = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    work: Annotated[Path | None, typer.Option(help="Directory of intermediate results; default: OUT.work.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted job.")] = False,
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """Quantize a model into a packed checkpoint."""
    resolved_recipe = Recipe.from_yaml(recipe or DEFAULT_RECIPE, flags.overrides())
    check_json_path(json_file)
    _check_fit_flags("--fit", fit, context)
    fit_bytes = parse_memory("--fit", fit)
    if fit_bytes is not None and (resolved_recipe.has_budget or allocation is not None):
        raise UserError("--fit chooses the budget: leave out --bits, --stored-bits, --size and other budgets")
    quiet = quiet or not is_first()
    if is_first() and not resume:
        file_hashes.start_hashing(Path(os.path.expanduser(model)))
    with importing():
        from gemq.checkpoint.outputs import default_work_directory
        from gemq.cli.tables import print_result
        from gemq.pipeline.fit import fitting_recipe
        from gemq.pipeline.quantize import quantize as run_quantize
        from gemq.runtime.device import pick_device
        from gemq.runtime.ranks import leave_ranks

    if fit_bytes is not None:
        resolved_recipe = fitting_recipe(
            model,
            resolved_recipe,
            fit_bytes,
            pick_device(device),
            context=context,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        if is_first() and not quiet and not is_stdout(json_file):
            make_console().print(f"Largest budget that fits into {fit}: {resolved_recipe.budget_text}")
    try:
        result = run_quantize(
            model,
            resolved_recipe,
            out=out,
            work=work,
            resume=resume,
            allocation=allocation,
            device=device,
            gpu_memory=parse_memory("--gpu-memory", gpu_memory),
            host_memory=parse_memory("--host-memory", host_memory),
            revision=revision,
            trust_remote_code=trust_remote_code,
            monitor=make_monitor(quiet or is_stdout(json_file)),
        )
    except KeyboardInterrupt:
        work_directory = work or default_work_directory(out)
        print(
            f"\nInterrupted. Nothing is lost: the same command with --resume continues from {work_directory}",
            file=sys.stderr,
        )
        raise typer.Exit(1) from None
    leave_ranks()
    if is_first() and not output_json(json_file, result.to_dict()) and not quiet:
        print_result(make_console(), result)


def export(
    work: Annotated[Path, typer.Argument(help="Work directory of quantize, or with --dense a packed checkpoint.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Directory to write; must not exist.")] = None,
    bits: Bits = None,
    stored_bits: StoredBits = None,
    size: Size = None,
    allocate: Allocate = None,
    allocation: AllocationFile = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Where the full-precision model is, if it was moved.")
    ] = None,
    reconstruct: Annotated[
        bool,
        typer.Option(
            "--reconstruct", help="Run the guard, reconstruction and distillation at the new widths, as quantize does."
        ),
    ] = False,
    curve: Annotated[
        bool,
        typer.Option(
            "--curve", help="Predicted cost and bytes of all budgets, written to curve.csv and curve.svg there."
        ),
    ] = False,
    dense: Annotated[
        Path | None, typer.Option(help="Write a packed checkpoint as plain bfloat16 to this directory.")
    ] = None,
    device: Device = "auto",
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """Another budget from a work directory, a size curve, or a dense checkpoint.

    Other budgets take seconds: nothing is quantized again. --curve predicts bytes and cost of every budget, and writes
    curve.csv and a figure into the work directory. A dense checkpoint (--dense) is an ordinary
    bfloat16 checkpoint of the same weights, for tools that do not know the packed format.
    """
    budget = recipe_overrides(bits=bits, stored_bits=stored_bits, size=size, allocate=allocate)
    check_json_path(json_file)
    if curve:
        if (
            out is not None
            or dense is not None
            or allocation is not None
            or reconstruct
            or budget.keys() - {"allocate"}
        ):
            raise UserError("--curve covers all budgets and writes no checkpoint: remove -o, --bits and others")
        _export_curve(work, budget.get("allocate"), model, trust_remote_code, quiet, json_file)
        return
    if dense is not None:
        if out is not None:
            raise UserError("--dense names the output: leave -o out")
        if budget or allocation is not None or reconstruct or model is not None:
            raise UserError("--dense writes a checkpoint as it is: leave --bits and other flags of the budget out")
        _export_dense(work, dense, trust_remote_code, quiet)
        return
    if out is None:
        raise UserError("export needs an output: add -o OUT")
    with importing():
        from gemq.cli.tables import print_result
        from gemq.pipeline.quantize import export as run_export

    result = run_export(
        work,
        out=out,
        changes=budget,
        reconstruct=reconstruct,
        allocation=allocation,
        device=device,
        gpu_memory=parse_memory("--gpu-memory", gpu_memory),
        host_memory=parse_memory("--host-memory", host_memory),
        model=model,
        trust_remote_code=trust_remote_code,
        monitor=make_monitor(quiet or is_stdout(json_file)),
    )
    if not output_json(json_file, result.to_dict()) and not quiet:
        print_result(make_console(), result)
        if not reconstruct:
            make_console().print(
                "Assembled from the candidates, which were calibrated on full-precision activations; "
                "--reconstruct reconstructs the layers at the new widths."
            )


def _export_curve(
    work: Path, allocate: str | None, model: str | None, trust_remote_code: bool, quiet: bool, json_file: Path | None
) -> None:
    """Run ``gemq export --curve``."""
    with importing():
        from gemq.cli.tables import print_curve
        from gemq.pipeline.size_curve import size_curve, write_curve

    quiet_libraries()
    curve = size_curve(work, allocate, model=model, trust_remote_code=trust_remote_code)
    files = write_curve(curve, work)
    if not output_json(json_file, curve.to_dict()) and not quiet:
        print_curve(make_console(), curve, files)


def _export_dense(checkpoint: Path, out: Path, trust_remote_code: bool, quiet: bool) -> None:
    """Run ``gemq export --dense``."""
    with importing():
        from gemq.checkpoint.dense_export import write_dense_checkpoint

    quiet_libraries()
    write_dense_checkpoint(checkpoint, out, trust_remote_code=trust_remote_code)
    if not quiet:
        make_console().print(f"Saved {out}: plain bfloat16, for tools that do not know the packed format.")
