"""Commands that use checkpoints: eval, generate, serve, bench, inspect, demo. They import torch only when they run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from gemq.cli.console import check_json_path, is_stdout, make_console, make_monitor, output_json, quiet_libraries
from gemq.cli.flags import (
    ComputeDtype,
    Device,
    EvaluationDtype,
    GenerationFlag,
    GpuMemory,
    HostMemory,
    Json,
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
    parse_numbers,
)
from gemq.cli.startup import importing
from gemq.errors import UserError


def check_window_flags(seq_len: int, max_windows: int | None) -> None:
    """Raise UserError if the windows of an evaluation would be empty."""
    if seq_len < 2:
        raise UserError(f"--seq-len {seq_len} is too short: a window has at least 2 tokens")
    if max_windows is not None and max_windows < 1:
        raise UserError(f"--max-windows {max_windows} leaves nothing to score: give at least 1")


def evaluate(
    model: Annotated[str, typer.Argument(help="A packed checkpoint, or any Transformers model.")],
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
    dtype: EvaluationDtype = "float32",
    device: Device = "auto",
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """Measure the perplexity of a model, and how far it is from a reference."""
    check_json_path(json_file)
    check_window_flags(seq_len, max_windows)
    task_names = read_task_names(tasks, task_path, task_limit, num_fewshot)
    with importing():
        from gemq.cli.evaluation_report import print_evaluation
        from gemq.evaluation.evaluate import evaluate_paths

    values = evaluate_paths(
        model,
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
        monitor=make_monitor(quiet or is_stdout(json_file)),
    )
    if not output_json(json_file, values) and not quiet:
        print_evaluation(make_console(), values)


def read_task_names(
    tasks: str | None, task_path: list[Path] | None, task_limit: int | None, num_fewshot: int | None
) -> list[str]:
    """Return the names in the flag ``--tasks``. Raise UserError for numbers out of range, and flags without it."""
    if task_limit is not None and task_limit < 1:
        raise UserError(f"--task-limit {task_limit} leaves nothing to run: give at least 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"--num-fewshot cannot be {num_fewshot}: give 0 or more")
    if tasks is None:
        if task_path or task_limit is not None or num_fewshot is not None:
            raise UserError("--task-path, --task-limit and --num-fewshot are for tasks: add --tasks")
        return []
    names = [name.strip() for name in tasks.split(",")]
    if not all(names):
        raise UserError(f"--tasks cannot be {tasks!r}: give names separated by commas, such as arc_easy,gsm8k")
    return names


def generate(
    model: Annotated[str, typer.Argument(help="A packed checkpoint, or any Transformers model.")],
    prompt: Annotated[
        list[str], typer.Option("-p", "--prompt", help="Text to continue; may be repeated for several texts.")
    ],
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to write.")] = 100,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the chat template.")] = False,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="On a GPU: compile the layers after the first token; worthwhile only for long texts."
        ),
    ] = False,
    dtype: ComputeDtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Generate text and print it as it is written."""
    with importing():
        from gemq.evaluation.evaluate import open_model
        from gemq.evaluation.generate import generate as generate_text
        from gemq.models.experts import use_fast_experts

    quiet_libraries()
    opened = open_model(model, dtype, device, trust_remote_code)
    if opened.contents is None:
        use_fast_experts(opened.model)
    for text in prompt:
        generate_text(
            opened.model,
            opened.tokenizer,
            text,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            raw=raw,
            stream=True,
            compile_layers=compiled,
        )


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A packed checkpoint. Flags of vllm serve may follow it.")],
) -> None:
    """Serve a packed checkpoint with vLLM, through the API of OpenAI: gemq serve OUT --port 8000."""
    from gemq.integrations.vllm.server import server_command
    from gemq.runtime.tested_versions import untested_vllm

    command = server_command(model, context.args)
    warning = untested_vllm()
    if warning is not None:
        print(f"gemq: {warning}", file=sys.stderr, flush=True)
    os.execv(command[0], command)


def bench(
    model: Annotated[str, typer.Argument(help="A packed checkpoint, or any Transformers model.")],
    batch: Annotated[str | None, typer.Option(help="Batch sizes of decoding (default 1,4,16; CPU: 1).")] = None,
    prefill: Annotated[str | None, typer.Option(help="Prompt lengths (default 128,512,2048; CPU: 128).")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens decoded per run (default 128; CPU: 16).")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the decoder layers (on a GPU).")
    ] = True,
    dtype: ComputeDtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """Measure the speed of decoding and prefill, compared with the bandwidth of memory."""
    check_json_path(json_file)
    batches = parse_numbers("--batch", batch)
    prefills = parse_numbers("--prefill", prefill)
    with importing():
        from gemq.cli.report import print_bench
        from gemq.evaluation.bench import bench_path

    values = bench_path(
        model,
        batches=batches,
        prefills=prefills,
        new_tokens=new_tokens,
        compiled=compiled,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        monitor=make_monitor(quiet or is_stdout(json_file)),
    )
    if not output_json(json_file, values) and not quiet:
        print_bench(make_console(), values)


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A packed checkpoint.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte and compare with the checksums that gemq wrote.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Show the contents of a packed checkpoint: widths, bytes, format."""
    check_json_path(json_file)
    with importing():
        from gemq.checkpoint.contents import inspect_checkpoint
        from gemq.cli.report import print_contents

    contents = inspect_checkpoint(checkpoint, verify=verify)
    if not output_json(json_file, contents.to_dict()):
        print_contents(make_console(), contents)
        if verify:
            make_console().print("All weights and config.json are as gemq wrote them (checksums).")


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory for the results.")] = Path("demo-out"),
    device: Device = "auto",
    json_file: Json = None,
) -> None:
    """Run a whole job on the built-in model: quantize, compare, generate."""
    check_json_path(json_file)
    with importing():
        from gemq.cli.run_demo import run_demo

    quiet_libraries()
    output_json(json_file, run_demo(out, device, make_console()))
