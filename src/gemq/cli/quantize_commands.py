"""Commands that make checkpoints: plan, quantize, export. Import torch only when they run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from gemq.cli.console import check_json, make_console, make_monitor, print_json, quiet_libraries, to_stdout
from gemq.cli.flags import (
    Allocate,
    AllocationFile,
    AttentionBits,
    Bits,
    Calib,
    CalibColumn,
    Device,
    Dtype,
    Effort,
    GpuMemory,
    GroupSize,
    HostMemory,
    Json,
    Model,
    Out,
    Progressive,
    Quiet,
    RecipeFile,
    Revision,
    Seed,
    Size,
    StoredBits,
    TrustRemoteCode,
    Widths,
    Window,
    Windows,
    given,
    recipe_of,
    size_of,
)
from gemq.cli.startup import importing
from gemq.errors import UserError
from gemq.models import file_hashes
from gemq.recipe import Recipe
from gemq.runtime.processes import is_first


def plan(
    model: Model,
    recipe: RecipeFile = None,
    bits: Bits = None,
    stored_bits: StoredBits = None,
    size: Size = None,
    progressive: Progressive = None,
    effort: Effort = None,
    calib: Calib = None,
    calib_column: CalibColumn = None,
    windows: Windows = None,
    window: Window = None,
    allocate: Allocate = None,
    allocation: AllocationFile = None,
    widths: Widths = None,
    group_size: GroupSize = None,
    attention_bits: AttentionBits = None,
    dtype: Dtype = None,
    seed: Seed = None,
    device: Device = "auto",
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json_file: Json = None,
) -> None:
    """Dry run without weights: sizes, memory, disk and time, and whether quantize would take these flags."""
    keys = given(locals(), Recipe)
    check_json(json_file)
    chosen = recipe_of(recipe, keys)
    bounds = {"gpu_memory": size_of("--gpu-memory", gpu_memory), "host_memory": size_of("--host-memory", host_memory)}
    with importing():
        from gemq.cli.report import print_plan
        from gemq.models.source import Source
        from gemq.pipeline.plan import plan as make_plan
        from gemq.runtime.device import pick_device

    picked = pick_device(device)
    source = Source.resolve(model, revision=revision, trust_remote_code=trust_remote_code, weights=False)
    weights = os.path.exists(model) and any(source.path.glob("*.safetensors"))  # of a hub's model some may be cached
    found = make_plan(source, chosen, picked, allocation=allocation, with_weights=weights, **bounds)
    if not print_json(json_file, found.to_dict()):
        print_plan(make_console(), found)


def quantize(
    model: Model,
    out: Out,
    recipe: RecipeFile = None,
    bits: Bits = None,
    stored_bits: StoredBits = None,
    size: Size = None,
    progressive: Progressive = None,
    effort: Effort = None,
    calib: Calib = None,
    calib_column: CalibColumn = None,
    windows: Windows = None,
    window: Window = None,
    allocate: Allocate = None,
    allocation: AllocationFile = None,
    widths: Widths = None,
    group_size: GroupSize = None,
    attention_bits: AttentionBits = None,
    dtype: Dtype = None,
    seed: Seed = None,
    device: Device = "auto",
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    work: Annotated[Path | None, typer.Option(help="Directory of intermediate results; default: OUT.work.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted job.")] = False,
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """Quantizes a model into a packed checkpoint."""
    chosen = recipe_of(recipe, given(locals(), Recipe))
    check_json(json_file)
    quiet = quiet or not is_first()
    if is_first() and not resume:
        file_hashes.begin(Path(os.path.expanduser(model)))
    with importing():
        from gemq.checkpoint.outputs import default_work
        from gemq.cli.report import print_result
        from gemq.pipeline.quantize import quantize as run_quantize
        from gemq.runtime.ranks import leave_ranks

    try:
        result = run_quantize(
            model,
            chosen,
            out=out,
            work=work,
            resume=resume,
            allocation=allocation,
            device=device,
            gpu_memory=size_of("--gpu-memory", gpu_memory),
            host_memory=size_of("--host-memory", host_memory),
            revision=revision,
            trust_remote_code=trust_remote_code,
            monitor=make_monitor(quiet or to_stdout(json_file)),
        )
    except KeyboardInterrupt:
        where = work or default_work(out)
        print(
            f"\nInterrupted. Nothing is lost: the same command with --resume goes on from {where}",
            file=sys.stderr,
        )
        raise typer.Exit(1) from None
    leave_ranks()
    if is_first() and not print_json(json_file, result.to_dict()) and not quiet:
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
        str | None, typer.Option("--model", help="Where the full-precision model lies now, if it was moved.")
    ] = None,
    finish: Annotated[bool, typer.Option("--finish", help="Refine at the new widths, as quantize does.")] = False,
    curve: Annotated[
        bool, typer.Option("--curve", help="Predicted cost and bytes of budgets over the ladder's range; no output.")
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
    """Another budget from a work directory, a size curve, or a plain twin.

    Other budgets take seconds: nothing is quantized again. --curve tells what they would take and predict, and writes
    curve.csv (and a figure, with matplotlib) into the work directory. The plain twin (--dense) is an ordinary
    bfloat16 checkpoint of the same weights, for tools that know no quantized format.
    """
    budget = {k: v for k, v in given(locals(), Recipe).items() if k in ("bits", "stored_bits", "size", "allocate")}
    check_json(json_file)
    if curve:
        if out is not None or dense is not None or allocation is not None or finish or budget.keys() - {"allocate"}:
            raise UserError("--curve goes over all budgets and makes no checkpoint: leave -o, --bits and others out")
        with importing():
            from gemq.cli.report import print_curve
            from gemq.pipeline.size_curve import size_curve, write_curve

        quiet_libraries()
        found = size_curve(work, budget.get("allocate"), model=model, trust_remote_code=trust_remote_code)
        written = write_curve(found, work)
        if not print_json(json_file, found.to_dict()) and not quiet:
            print_curve(make_console(), found, written)
        return
    if dense is not None:
        with importing():
            from gemq.checkpoint.dense_export import write_dense_twin

        if out is not None:
            raise UserError("--dense names the output: leave -o out")
        if budget or allocation is not None or finish or model is not None:
            raise UserError("--dense writes a checkpoint as it is: leave --bits and other flags of the budget out")
        quiet_libraries()
        write_dense_twin(work, dense, trust_remote_code=trust_remote_code)
        if not quiet:
            make_console().print(f"Saved {dense}: plain bfloat16, for tools that know no quantized format.")
        return
    if out is None:
        raise UserError("export needs an output: add -o OUT")
    with importing():
        from gemq.cli.report import print_result
        from gemq.pipeline.quantize import export as run_export

    result = run_export(
        work,
        out=out,
        changes=budget,
        finish=finish,
        allocation=allocation,
        device=device,
        gpu_memory=size_of("--gpu-memory", gpu_memory),
        host_memory=size_of("--host-memory", host_memory),
        model=model,
        trust_remote_code=trust_remote_code,
        monitor=make_monitor(quiet or to_stdout(json_file)),
    )
    if not print_json(json_file, result.to_dict()) and not quiet:
        print_result(make_console(), result)
        if not finish:
            make_console().print(
                "Assembled from the ladder, which was calibrated on full-precision activations; "
                "--finish refines at the new widths."
            )
