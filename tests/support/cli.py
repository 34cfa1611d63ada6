"""What end-to-end tests share: the command line in this process, files compared, tiny models."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gemq.assets import builtin_model
from gemq.reporting.record import PAGE

SMALL = ("--effort", "low", "--num-windows", "8", "--seq-len", "64")
"""Flags of the smallest job that means anything on the built-in model: about 10 seconds."""
BUILTIN_TOKENS = 4096
"""Of the built-in model's vocabulary."""


def few_guard_windows(patch: pytest.MonkeyPatch) -> None:
    """Lets the guard judge by 6 windows, not 24: models write them token by token, and no job here is about them."""
    patch.setattr("gemq.pipeline.guard_stage.WINDOWS_PER_SOURCE", 2)
    patch.setattr("gemq.pipeline.guard_stage.GENERATED_WINDOWS", 4)


@dataclass(frozen=True)
class Ran:
    """What a command gave back."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


def gemq(*arguments: object) -> Ran:
    """``gemq ARGUMENTS`` in this process, which has imported torch already."""
    from gemq.cli import run

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(a) for a in arguments])
    return Ran(code, out.getvalue(), err.getvalue())


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by its relative path. Report pages are left out, since they have times."""
    files = (f for f in sorted(directory.rglob("*")) if f.is_file() and f.name != PAGE)
    return {str(f.relative_to(directory)): f.read_bytes() for f in files}


@dataclass(frozen=True)
class Finished:
    """One small job on the built-in model, made by ``gemq quantize --bits 2``. Not to be changed by a test."""

    model: Path
    out: Path
    work: Path
    figures: dict[str, Any]


def make_tiny_model(path: Path, seed: int = 0, **changes: Any) -> Path:
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    values = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        **changes,
    }
    torch.manual_seed(seed)
    OlmoeForCausalLM(OlmoeConfig(**values)).save_pretrained(path)
    return add_tokenizer(path, values["vocab_size"])


def write_first_layers(path: Path, layers: int) -> Path:
    """The first layers of the built-in model with its tokenizer: trained weights, and a part of the time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(builtin_model(), num_hidden_layers=layers).save_pretrained(path)
    AutoTokenizer.from_pretrained(builtin_model()).save_pretrained(path)
    return path


def add_tokenizer(path: Path, vocabulary: int = BUILTIN_TOKENS) -> Path:
    """The built-in tokenizer, or the first so many of its tokens."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(builtin_model() / name, path / name)
    if vocabulary < BUILTIN_TOKENS:
        values = json.loads((path / "tokenizer.json").read_text())
        tokens = {token: i for token, i in values["model"]["vocab"].items() if i < vocabulary}
        merges = [pair for pair in values["model"]["merges"] if "".join(pair) in tokens]
        values["model"] |= {"vocab": tokens, "merges": merges}
        (path / "tokenizer.json").write_text(json.dumps(values))
    return path


class Scene:
    """A directory that every test gets as it was when it was made, at the same path, which records name."""

    def __init__(self, base: Path, make: Callable[[Path], None]):
        self.path, self._saved = base / "scene", base / "saved"
        self.path.mkdir()
        make(self.path)
        shutil.copytree(self.path, self._saved)

    def restored(self) -> Path:
        """Puts every file back, with its time, and returns the directory."""
        shutil.rmtree(self.path)
        return Path(shutil.copytree(self._saved, self.path))


def least_bytes(model: Path, recipe: dict[str, Any]) -> int:
    """The smallest ``--host-memory`` that a job on the CPU takes: no layer stays, nothing waits in memory."""
    import torch

    from gemq.calibration.sources import host_bytes
    from gemq.models.source import Source
    from gemq.models.structure import find_structure
    from gemq.pipeline.stage_costs import Footprint
    from gemq.planning.memory_model import held_bytes
    from gemq.recipe import Recipe

    skeleton = Source(model).skeleton()
    structure, cpu = find_structure(skeleton), torch.device("cpu")
    values = Recipe.from_dict(recipe)
    footprint = Footprint(structure, values, skeleton.config, torch.float32, cpu)
    return held_bytes(skeleton, structure, torch.float32) + footprint.min_working_bytes + host_bytes(values.calibration)
