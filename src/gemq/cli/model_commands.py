"""Commands that use checkpoints: eval, generate, serve, bench, inspect, demo. They import torch only when they run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gemq.cli.console import check_json_path, is_stdout, make_console, make_monitor, output_json, quiet_libraries
from gemq.cli.evaluation_flags import EvaluationFlags
from gemq.cli.flags import (
    ComputeDtype,
    Device,
    Json,
    ModelGpuMemory,
    Quiet,
    TrustRemoteCode,
    parse_memory,
    parse_numbers,
    with_flags,
)
from gemq.cli.startup import importing

TEMPLATE_TOKENS = 512
"""Tokens of a chat template that are counted for the memory of a text."""


@with_flags
def evaluate(
    model: Annotated[str, typer.Argument(help="A packed checkpoint, or any Transformers model.")],
    flags: EvaluationFlags,
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """Measure the perplexity of a model, and how far it is from a reference."""
    check_json_path(json_file)
    with importing():
        from gemq.cli.evaluation_tables import print_evaluation

    values = flags.run(model, quiet or is_stdout(json_file))
    if not output_json(json_file, values) and not quiet:
        print_evaluation(make_console(), values)


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
            "--compile",
            help="On a GPU: compile the layers after the first token, in place of fused kernels. For models whose "
            "layers cannot be fused, and long texts.",
        ),
    ] = False,
    dtype: ComputeDtype = "auto",
    device: Device = "auto",
    gpu_memory: ModelGpuMemory = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Generate text and print it as it is written."""
    with importing():
        from gemq.evaluation.evaluate import open_model
        from gemq.evaluation.generate import generate as generate_text
        from gemq.models.experts import use_fast_experts

    quiet_libraries()
    bound = parse_memory("--gpu-memory", gpu_memory)
    context = max_new_tokens + TEMPLATE_TOKENS + max(len(text.encode()) for text in prompt)  # a token has a byte
    opened = open_model(model, dtype, device, trust_remote_code, bound, context)
    if opened.contents is None:
        use_fast_experts(opened.model)
    if bound is not None:
        loaded: Any = opened.model
        share = loaded.gemq_residency.resident_share
        print(f"gemq: {share:.0%} of the experts' bytes stay on the GPU", file=sys.stderr, flush=True)
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
        bool,
        typer.Option("--compile/--no-compile", help="Compile the decoder layers in place of fused kernels (on a GPU)."),
    ] = False,
    dtype: ComputeDtype = "auto",
    device: Device = "auto",
    gpu_memory: ModelGpuMemory = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    json_file: Json = None,
) -> None:
    """Measure the speed of decoding and prefill, compared with the bandwidth of memory."""
    check_json_path(json_file)
    batches = parse_numbers("--batch", batch)
    prefills = parse_numbers("--prefill", prefill)
    with importing():
        from gemq.cli.tables import print_bench
        from gemq.evaluation.bench import bench_path

    values = bench_path(
        model,
        batches=batches,
        prefills=prefills,
        new_tokens=new_tokens,
        compiled=compiled,
        dtype=dtype,
        device=device,
        gpu_memory=parse_memory("--gpu-memory", gpu_memory),
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
        from gemq.cli.tables import print_contents

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
