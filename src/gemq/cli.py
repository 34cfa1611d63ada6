"""The command line: flags in, plain function calls, tables or JSON out. Imports torch only inside commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gemq.errors import UserError
from gemq.output import check_json, make_console, make_monitor, print_json, quiet_libraries, to_stdout
from gemq.recipe import Recipe, parse_size

# from typer: some of its versions use the package click, others carry their own copy
ClickException: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    help="Shrinks Mixture-of-Experts language models: every expert gets its own bit-width.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # what is no user's mistake is a bug: a plain traceback is the better report
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(help="Local directory or hub id of a Transformers MoE model.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Directory to write; must not exist.")]
Bits = Annotated[float | None, typer.Option(help="Budget: average bits per expert weight (default 2.0).")]
StoredBits = Annotated[float | None, typer.Option(help="Budget with scales and offsets counted.")]
Size = Annotated[str | None, typer.Option(help="Budget: size of the whole checkpoint, such as 12GB.")]
Progressive = Annotated[
    str | None, typer.Option(help="Budgets in bits, such as 3.0,2.5,2.0: scores are computed again after each.")
]
Allocate = Annotated[str | None, typer.Option(help="global (default), uniform, random, layerwise or frequency.")]
AllocationFile = Annotated[Path | None, typer.Option("--allocation", help="JSON file with a width for every expert.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Json = Annotated[
    Path | None, typer.Option("--json", help="File for the figures as JSON; - prints them instead of tables.")
]
GpuMemory = Annotated[
    str | None,
    typer.Option(help="Most GPU memory that the job takes, such as 20GB (default: 90 % of what is free)."),
]
HostMemory = Annotated[
    str | None, typer.Option(help="Most host memory, such as 60GB (default: 90 % of what is free); on a CPU, in all.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model brings along.")]
RecipeFile = Annotated[
    str | None, typer.Option("--recipe", help="YAML file of recipe keys, or paper; flags override it.")
]
Calib = Annotated[
    list[str] | None,
    typer.Option(help="Text or JSONL file, data set id, or self (the model writes it); may be repeated."),
]
Windows = Annotated[int | None, typer.Option(help="Calibration windows from all sources together (default 128).")]
Window = Annotated[
    int | None, typer.Option(help="Tokens per calibration window (default 2048, or the most that the model takes).")
]
Widths = Annotated[
    str | None, typer.Option(help="Candidate widths of experts (default 1,1.6,2,3, and 4 above 2.5 bits).")
]
GroupSize = Annotated[int | None, typer.Option(help="Weights that share a scale and an offset (default 128).")]
AttentionBits = Annotated[
    int | None, typer.Option(help="Width of attention and dense linears (default 4; 16: unquantized).")
]
Effort = Annotated[
    str | None, typer.Option(help="How much is computed: low (trains nothing), medium (default) or high.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of every random choice.")]
Dtype = Annotated[str | None, typer.Option(help="Compute type: auto, float32 or bfloat16.")]
ComputeDtype = Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16.")]


@app.command()
def plan(
    model: Model,
    recipe: RecipeFile = None,
    bits: Bits = None,
    stored_bits: StoredBits = None,
    size: Size = None,
    effort: Effort = None,
    calib: Calib = None,
    windows: Windows = None,
    window: Window = None,
    widths: Widths = None,
    group_size: GroupSize = None,
    attention_bits: AttentionBits = None,
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json_file: Json = None,
) -> None:
    """Dry run without weights: sizes, memory, disk and time."""
    keys = _given(locals(), Recipe)
    check_json(json_file)
    chosen = _recipe(recipe, keys)
    from gemq.models.source import Source, pick_device
    from gemq.plan import plan as make_plan
    from gemq.summary import print_plan

    source = Source.resolve(model, revision=revision, trust_remote_code=trust_remote_code, weights=False)
    found = make_plan(source, chosen, pick_device(device))
    if not print_json(json_file, found.to_dict()):
        print_plan(make_console(), found)


@app.command()
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
    chosen = _recipe(recipe, _given(locals(), Recipe))
    check_json(json_file)
    from gemq.pipeline import quantize as run_quantize
    from gemq.summary import print_result

    try:
        result = run_quantize(
            model,
            chosen,
            out=out,
            work=work,
            resume=resume,
            allocation=allocation,
            device=device,
            gpu_memory=_size("--gpu-memory", gpu_memory),
            host_memory=_size("--host-memory", host_memory),
            revision=revision,
            trust_remote_code=trust_remote_code,
            monitor=make_monitor(quiet or to_stdout(json_file)),
        )
    except KeyboardInterrupt:
        where = work or out.with_name(out.name + ".work")
        print(
            f"\nInterrupted. Nothing is lost: the same command with --resume goes on from {where}",
            file=sys.stderr,
        )
        raise typer.Exit(1) from None
    if not print_json(json_file, result.to_dict()) and not quiet:
        print_result(make_console(), result)


@app.command()
def export(
    work: Annotated[Path, typer.Argument(help="Work directory of quantize, or with --dense a packed checkpoint.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Directory to write; must not exist.")] = None,
    bits: Bits = None,
    stored_bits: StoredBits = None,
    size: Size = None,
    allocate: Allocate = None,
    allocation: AllocationFile = None,
    finish: Annotated[bool, typer.Option("--finish", help="Refine at the new widths, as quantize does.")] = False,
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
    """Another budget from a work directory, or a plain twin.

    Other budgets take seconds: nothing is quantized again. The plain twin (--dense) is an ordinary bfloat16
    checkpoint of the same weights, for tools that know no quantized format.
    """
    budget = {k: v for k, v in _given(locals(), Recipe).items() if k in ("bits", "stored_bits", "size", "allocate")}
    check_json(json_file)
    if dense is not None:
        from gemq.checkpoint.twin import write_dense_twin

        if out is not None:
            raise UserError("--dense names the output: leave -o out")
        if budget or allocation is not None or finish:
            raise UserError("--dense writes a checkpoint as it is: leave --bits and other flags of the budget out")
        quiet_libraries()
        write_dense_twin(work, dense, trust_remote_code=trust_remote_code)
        if not quiet:
            make_console().print(f"Saved {dense}: plain bfloat16, for tools that know no quantized format.")
        return
    if out is None:
        raise UserError("export needs an output: add -o OUT")
    from gemq.pipeline import export as run_export
    from gemq.summary import print_result

    result = run_export(
        work,
        out=out,
        changes=budget,
        finish=finish,
        allocation=allocation,
        device=device,
        gpu_memory=_size("--gpu-memory", gpu_memory),
        host_memory=_size("--host-memory", host_memory),
        monitor=make_monitor(quiet or to_stdout(json_file)),
    )
    if not print_json(json_file, result.to_dict()) and not quiet:
        print_result(make_console(), result)
        if not finish:
            make_console().print(
                "Assembled from the ladder, which was calibrated on full-precision activations; "
                "--finish refines at the new widths."
            )


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A packed checkpoint, or any Transformers model.")],
    reference: Annotated[str | None, typer.Option(help="Full-precision model to compare with.")] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text file; may be repeated. Default: the built-in texts.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    max_windows: Annotated[int | None, typer.Option(help="Only the first windows of each text.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """Perplexity, and how far a model is from its reference."""
    check_json(json_file)
    if window < 2:
        raise UserError(f"--window {window} is too short: a window has at least 2 tokens")
    if max_windows is not None and max_windows < 1:
        raise UserError(f"--max-windows {max_windows} leaves nothing to score: give at least 1")
    from gemq.evaluate import evaluate_paths
    from gemq.summary import print_evaluation

    values = evaluate_paths(
        model,
        reference=reference,
        texts=text,
        window=window,
        max_windows=max_windows,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        monitor=make_monitor(quiet or to_stdout(json_file)),
    )
    if not print_json(json_file, values) and not quiet:
        print_evaluation(make_console(), values)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A packed checkpoint, or any Transformers model.")],
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the chat template.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="On a GPU: compile the layers after the first token; pays for long texts.")
    ] = False,
    dtype: ComputeDtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Streams text that a model writes."""
    quiet_libraries()
    from gemq.evaluate import open_model
    from gemq.generate import generate as write
    from gemq.models.experts import use_fast_experts

    opened = open_model(model, dtype, device, trust_remote_code)
    if opened.contents is None:
        use_fast_experts(opened.model)
    write(
        opened.model,
        opened.tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        raw=raw,
        stream=True,
        compile_layers=compiled,
    )


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="A packed checkpoint, or any Transformers model.")],
    batch: Annotated[str | None, typer.Option(help="Sequences decoded together (default 1,4,16; CPU: 1).")] = None,
    prefill: Annotated[str | None, typer.Option(help="Prompt lengths (default 128,512,2048; CPU: 128).")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens decoded a run (default 128; CPU: 16).")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the decoder layers (on a GPU).")
    ] = True,
    dtype: ComputeDtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """Speed: decode, prefill and first token, beside what memory allows."""
    check_json(json_file)
    batches, prefills = _numbers("--batch", batch), _numbers("--prefill", prefill)
    monitor = make_monitor(quiet or to_stdout(json_file))
    from gemq.bench import bench_path
    from gemq.summary import print_bench

    values = bench_path(
        model,
        batches=batches,
        prefills=prefills,
        new_tokens=new_tokens,
        compiled=compiled,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        monitor=monitor,
    )
    if not print_json(json_file, values) and not quiet:
        print_bench(make_console(), values)


@app.command()
def inspect(checkpoint: Annotated[Path, typer.Argument(help="A packed checkpoint.")], json_file: Json = None) -> None:
    """What a packed checkpoint holds: widths, bytes, format."""
    check_json(json_file)
    from gemq.inspect import inspect_checkpoint
    from gemq.summary import print_contents

    contents = inspect_checkpoint(checkpoint)
    if not print_json(json_file, contents.to_dict()):
        print_contents(make_console(), contents)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory for the results.")] = Path("demo-out"),
    device: Device = "auto",
    json_file: Json = None,
) -> None:
    """The whole job on the built-in model: quantize, compare, write."""
    check_json(json_file)
    quiet_libraries()
    from gemq.demo import run_demo

    print_json(json_file, run_demo(out, device, make_console()))


def run(arguments: list[str]) -> int:
    """Runs the command line and returns its exit code. A user's mistake is one line on stderr."""
    try:
        code = app(arguments or ["--help"], prog_name="gemq", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except UserError as error:
        return _fail(str(error))
    except ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "gemq"
        return _fail(f"{error.format_message().rstrip('.')}: see {command} --help")
    except (KeyboardInterrupt, typer.Abort):
        print("\nInterrupted.", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fail(message: str) -> int:
    print(f"gemq: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _given(values: dict[str, Any], recipe: type[Recipe]) -> dict[str, Any]:
    """The recipe keys among a command's arguments that the user gave."""
    keys = {k: v for k, v in values.items() if k in recipe.__dataclass_fields__ and v is not None}
    if "size" in keys:
        keys["size"] = parse_size(keys["size"])
    return keys


def _size(flag: str, text: str | None) -> int | None:
    """``20GB`` -> bytes. Raises UserError naming the flag when it is no size."""
    try:
        return None if text is None else parse_size(text)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error


def _numbers(flag: str, text: str | None) -> list[int] | None:
    """``1,4,16`` -> whole numbers from 1 up."""
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise UserError(f"{flag} cannot be {text!r}: give numbers from 1 up, separated by commas")
    return numbers


def _recipe(file: str | None, flags: dict[str, Any]) -> Recipe:
    return Recipe.from_yaml(file or "default", flags)
