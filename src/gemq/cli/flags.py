"""Flags that several commands have, and what their texts mean. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gemq.errors import UserError
from gemq.recipe import Recipe, parse_size

Model = Annotated[str, typer.Argument(help="Local directory or hub id of a Transformers MoE model.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Directory to write; must not exist.")]
Bits = Annotated[float | None, typer.Option(help="Budget: average bits per expert weight (default 2.0).")]
StoredBits = Annotated[float | None, typer.Option(help="Budget with scales and offsets counted.")]
Size = Annotated[str | None, typer.Option(help="Budget: size of the whole checkpoint, such as 12GB.")]
Progressive = Annotated[
    str | None, typer.Option(help="Budgets in bits, such as 3.0,2.5,2.0: scores are computed again after each.")
]
Allocate = Annotated[str | None, typer.Option(help="global (default), uniform, random, layerwise or frequency.")]
AllocationFile = Annotated[Path | None, typer.Option("--allocation", help="JSON file with the widths of every expert.")]
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
CalibColumn = Annotated[
    str | None,
    typer.Option(help="Column of JSONL rows and data sets (default: text, messages, or a prompt with its response)."),
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


def given(values: dict[str, Any], recipe: type[Recipe]) -> dict[str, Any]:
    """The recipe keys among a command's arguments that the user gave."""
    keys = {k: v for k, v in values.items() if k in recipe.__dataclass_fields__ and v is not None}
    if "size" in keys:
        keys["size"] = parse_size(keys["size"])
    return keys


def size_of(flag: str, text: str | None) -> int | None:
    """``20GB`` -> bytes. Raises UserError naming the flag when it is no size."""
    try:
        return None if text is None else parse_size(text)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error


def numbers(flag: str, text: str | None) -> list[int] | None:
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


def recipe_of(file: str | None, flags: dict[str, Any]) -> Recipe:
    return Recipe.from_yaml(file or "default", flags)
