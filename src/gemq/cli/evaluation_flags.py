"""The flags of an evaluation, which ``gemq eval`` and ``gemq report`` share. Must not import torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from gemq.cli.console import make_monitor
from gemq.cli.flags import Device, GpuMemory, HostMemory, TrustRemoteCode, parse_memory
from gemq.cli.startup import importing
from gemq.errors import UserError


@dataclasses.dataclass(frozen=True)
class EvaluationFlags:
    """What is measured and how. Raises UserError for values out of range, and for flags without the one they need."""

    reference: Annotated[str | None, typer.Option(help="Full-precision model to compare with.")] = None
    text: Annotated[
        list[Path] | None, typer.Option(help="Text or JSONL file; may be repeated. Default: the built-in texts.")
    ] = None
    text_column: Annotated[
        str | None, typer.Option(help="Column of JSONL rows (default: text, messages, or a prompt with its response).")
    ] = None
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 512
    max_windows: Annotated[int | None, typer.Option(help="Only the first windows of each text.")] = None
    generate: Annotated[
        bool,
        typer.Option(
            "--generate", help="Also continue 32 prompts with each model: repetition, loops, early ends, KL on the way."
        ),
    ] = False
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of each continuation (default 512; CPU: 128).")] = (
        None
    )
    tasks: Annotated[
        str | None,
        typer.Option(help="Also run these tasks of lm-eval, such as arc_easy,gsm8k: names, or paths of YAML files."),
    ] = None
    task_path: Annotated[
        list[Path] | None, typer.Option(help="Directory with YAML files of more tasks; may be repeated.")
    ] = None
    task_limit: Annotated[int | None, typer.Option(help="Only the first documents of each task.")] = None
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in each prompt of a task (default: as each task defines).")
    ] = None
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or auto (default: float32, but auto to measure speed).")
    ] = None
    device: Device = "auto"
    gpu_memory: GpuMemory = None
    host_memory: HostMemory = None
    trust_remote_code: TrustRemoteCode = False

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise UserError(f"--seq-len {self.seq_len} is too short: a window has at least 2 tokens")
        if self.max_windows is not None and self.max_windows < 1:
            raise UserError(f"--max-windows {self.max_windows} leaves nothing to score: give at least 1")
        if self.max_new_tokens is not None and not self.generate:
            raise UserError("--max-new-tokens is the length of generated texts: add --generate")
        if self.task_limit is not None and self.task_limit < 1:
            raise UserError(f"--task-limit {self.task_limit} leaves nothing to run: give at least 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(f"--num-fewshot cannot be {self.num_fewshot}: give 0 or more")
        if self.tasks is None and (self.task_path or self.task_limit is not None or self.num_fewshot is not None):
            raise UserError("--task-path, --task-limit and --num-fewshot are for tasks: add --tasks")
        if not all(self.task_names):
            raise UserError(f"--tasks cannot be {self.tasks!r}: give names separated by commas, such as arc_easy,gsm8k")

    @property
    def task_names(self) -> list[str]:
        """The names in ``--tasks``."""
        return [] if self.tasks is None else [name.strip() for name in self.tasks.split(",")]

    @property
    def names_a_measurement(self) -> bool:
        """Whether a flag asks for a measurement, rather than saying how one is made."""
        return self.reference is not None or bool(self.text) or self.generate or bool(self.task_names)

    def run(self, model: str | Path, quiet: bool) -> dict[str, Any]:
        """Evaluate ``model`` and return the values of ``evaluate_paths``. ``quiet``: no progress is shown."""
        with importing():
            from gemq.evaluation.evaluate import evaluate_paths

        return evaluate_paths(
            model,
            reference=self.reference,
            texts=self.text,
            text_column=self.text_column,
            seq_len=self.seq_len,
            max_windows=self.max_windows,
            generate=self.generate,
            max_new_tokens=self.max_new_tokens,
            tasks=self.task_names,
            task_directories=self.task_path or (),
            task_limit=self.task_limit,
            num_fewshot=self.num_fewshot,
            dtype=self.dtype or "float32",
            device=self.device,
            gpu_memory=parse_memory("--gpu-memory", self.gpu_memory),
            host_memory=parse_memory("--host-memory", self.host_memory),
            trust_remote_code=self.trust_remote_code,
            monitor=make_monitor(quiet),
        )
