"""Folders with a tiny model in them, and what may be changed in them, for tests of reading source models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import gemq
from gemq.pipeline.quantize import Result
from gemq.recipe import Recipe
from support.families import random_model, tiny_config
from support.tokenizer import save_tokenizer

Tensors = dict[str, torch.Tensor]


def model_folder(folder: Path, family: str = "olmoe", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A tiny random model of a family with a tokenizer. ``changes``: fields of its configuration."""
    random_model(tiny_config(family, **changes), dtype=dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def edit_tensors(folder: Path, change: Callable[[Tensors], Tensors | None]) -> None:
    """Changes the stored tensors, in place or by returning others."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors = change(tensors) or tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def edit_config(folder: Path, *absent: str, **values: Any) -> None:
    """Changes config.json: sets ``values``, leaves out ``absent``."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({name: value for name, value in config.items() if name not in absent}))


def quantize(folder: Path, bits: float = 2.0, **keys: Any) -> Result:
    """The result of a short job, whose output is ``out`` beside the folder. ``keys``: of the recipe."""
    text = folder.parent / "text.txt"
    text.write_text("".join(chr(33 + i * i % 93) for i in range(400)))
    recipe = Recipe(effort="low", bits=bits, calibration=(str(text),), num_windows=4, seq_len=24, guard=False, **keys)
    return gemq.quantize(str(folder), recipe, out=folder.parent / "out", device="cpu")
