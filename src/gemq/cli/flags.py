"""Flags that several commands share, and the values that their texts stand for. Must not import torch."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from gemq.errors import UserError
from gemq.recipe import parse_size

Model = Annotated[str, typer.Argument(help="Local directory or hub id of a Transformers MoE model.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Directory to write; must not exist.")]
Bits = Annotated[float | None, typer.Option(help="Budget: average bits per expert weight (default 2.0).")]
StoredBits = Annotated[
    float | None, typer.Option(help="Budget: average bits per expert weight, including scales and offsets.")
]
Size = Annotated[str | None, typer.Option(help="Budget: size of the whole checkpoint, such as 12GB.")]
Allocate = Annotated[str | None, typer.Option(help="global (default), uniform, random, layerwise or frequency.")]
AllocationFile = Annotated[Path | None, typer.Option("--allocation", help="JSON file with the widths of every expert.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Json = Annotated[
    Path | None, typer.Option("--json", help="Write results as JSON to this file; - means standard output.")
]
GpuMemory = Annotated[
    str | None, typer.Option(help="Upper bound of GPU memory, such as 20GB (default: 90 % of what is free).")
]
ModelGpuMemory = Annotated[
    str | None,
    typer.Option(
        "--gpu-memory",
        help="Upper bound of GPU memory, such as 8GB: experts without room there stay in host memory (default: none).",
    ),
]
HostMemory = Annotated[
    str | None,
    typer.Option(
        help="Upper bound of host memory, such as 60GB (default: 90 % of what is free); without a GPU, of the job."
    ),
]
Context = Annotated[
    int | None, typer.Option(help="Tokens of prompt and answer that are to fit (default 8192, or the model's maximum).")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
RecipeFile = Annotated[
    str | None, typer.Option("--recipe", help="YAML file of recipe keys, or paper; flags override it.")
]
ComputeDtype = Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16.")]


@dataclasses.dataclass(frozen=True)
class RecipeFlags:
    """Flags that override keys of the recipe, under the names of these keys. None: not given."""

    bits: Bits = None
    stored_bits: StoredBits = None
    size: Size = None
    progressive: Annotated[
        str | None,
        typer.Option(help="Budgets in bits, such as 3.0,2.5,2.0: scores are computed again after all but the last."),
    ] = None
    effort: Annotated[
        str | None, typer.Option(help="How much is computed: low (trains nothing), medium (default) or high.")
    ] = None
    calibration: Annotated[
        list[str] | None,
        typer.Option(help="Text or JSONL file, data set id, or self (the model writes it); may be repeated."),
    ] = None
    calibration_column: Annotated[
        str | None,
        typer.Option(
            help="Column of JSONL rows and data sets (default: text, messages, or a prompt with its response)."
        ),
    ] = None
    num_windows: Annotated[int | None, typer.Option(help="Calibration windows from all sources (default 128).")] = None
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens per calibration window (default 2048, or the maximum of the model)."),
    ] = None
    allocate: Allocate = None
    codes: Annotated[
        str | None, typer.Option(help="Codes of experts: auto (default: trellis on a GPU), affine or trellis.")
    ] = None
    widths: Annotated[
        str | None,
        typer.Option(
            help="Candidate widths of experts (default 1,1.6,2,3, trellis 1,1.5,2,2.5,3; and 4 for larger budgets)."
        ),
    ] = None
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale and an offset (default 128).")] = (
        None
    )
    dense_bits: Annotated[
        int | None, typer.Option(help="Width of attention and dense linears (default 4; 16: unquantized).")
    ] = None
    dtype: Annotated[str | None, typer.Option(help="Compute type: auto, float32 or bfloat16.")] = None
    seed: Annotated[int | None, typer.Option(help="Seed of every random choice.")] = None

    def overrides(self) -> dict[str, Any]:
        """Return the recipe keys that the user gave, with their values."""
        return recipe_overrides(**vars(self))


def recipe_overrides(**flags: Any) -> dict[str, Any]:
    """Return the recipe keys among ``flags`` that the user gave, with their values. ``size`` is parsed."""
    overrides = {key: value for key, value in flags.items() if value is not None}
    if "size" in overrides:
        overrides["size"] = parse_size(overrides["size"])
    return overrides


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command with a parameter ``flags``, a dataclass of flags: it gets one flag for each of its fields."""
    signature = inspect.signature(command, eval_str=True)
    kind = signature.parameters["flags"].annotation
    hints = get_type_hints(kind, include_extras=True)
    flag_parameters = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(kind)
    ]
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name == "flags":
            parameters.extend(flag_parameters)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        values = {parameter.name: arguments.pop(parameter.name) for parameter in flag_parameters}
        command(flags=kind(**values), **arguments)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def parse_memory(flag: str, text: str | None) -> int | None:
    """Return the bytes of a text such as ``20GB``. Raises UserError that names the flag if it is not a size."""
    try:
        return None if text is None else parse_size(text)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error


def parse_numbers(flag: str, text: str | None) -> list[int] | None:
    """Return the positive integers of a text such as ``1,4,16``. Raises UserError that names the flag otherwise."""
    if text is None:
        return None
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise UserError(f"{flag} cannot be {text!r}: give numbers from 1 up, separated by commas")
    return numbers
