"""Bounds of memory: they decide where layers and activations are, never what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import gemq as library
from gemq.assets import builtin_texts
from gemq.models.reader import LayerReader
from gemq.recipe import Recipe
from support.cli import BUILTIN_TOKENS, contents, gemq, least_bytes, make_tiny_model

LOW = {"effort": "low", "num_windows": 8, "seq_len": 32, "micro_batch_tokens": 64, "widths": (1, 2, 3), "guard": False}
TRAINED = {**LOW, "candidate_epochs": 1, "reconstruction_epochs": 1, "distill_epochs": 1}
TEXT = {"calibration": (str(builtin_texts()[0]),)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers, of which a bound of memory leaves room for two."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "model", num_hidden_layers=5, vocab_size=BUILTIN_TOKENS)


def job(model: Path, recipe: Recipe, out: Path, **how: Any) -> tuple[Any, dict[str, bytes]]:
    result = library.quantize(str(model), recipe, out=out, device="cpu", **how)
    output = {f"out/{n}": b for n, b in contents(out).items()}
    return result, {
        **output,
        **{n: b for n, b in contents(out.with_name(f"{out.name}.work")).items() if n != "job.json"},
    }


@pytest.mark.parametrize("keys", [LOW, TRAINED], ids=["low", "trained"])
def test_a_bound_changes_no_byte(keys, model, tmp_path, monkeypatch):
    """Nothing but two layers fits: each is read again whenever it is needed, activations lie in files."""
    read: list[int] = []
    monkeypatch.setattr(LayerReader, "read", _counted(LayerReader.read, read))
    recipe = Recipe(**keys, **TEXT)
    free, expected = job(model, recipe, tmp_path / "free")
    assert free.spilled_bytes == {"host memory": 0, "disk": 0}
    often = len(read)
    bound, files = job(model, recipe, tmp_path / "bound", host_memory=least_bytes(model, {**keys, **TEXT}))
    assert bound.spilled_bytes["disk"] > 0
    assert len(read) - often > 2 * often
    assert files == expected
    assert not list(tmp_path.rglob(".spilled*"))


def _counted(function: Any, seen: list[int]) -> Any:
    def call(self: Any, index: int, *arguments: Any) -> Any:
        seen.append(index)
        return function(self, index, *arguments)

    return call


def test_a_bound_that_cannot_hold_is_refused_with_one_that_can(model, tmp_path):
    text = builtin_texts()[0]
    flags = ("--effort", "low", "--num-windows", "8", "--seq-len", "32", "--calibration", text)
    ran = gemq("quantize", model, "-o", tmp_path / "out", *flags, "--host-memory", "4MB", "--device", "cpu")
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert "give at least --host-memory" in ran.err
    assert not list(tmp_path.iterdir())
    enough = ran.err.split()[-1]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("guard: false\n")
    again = gemq("quantize", model, "-o", tmp_path / "out", *flags, "--recipe", recipe, "--host-memory", enough)
    assert again.code == 0, again.err


@pytest.mark.parametrize("flags", [("--gpu-memory", "1GB"), ("--host-memory", "90TB"), ("--host-memory", "much")])
def test_bounds_that_make_no_sense_are_refused(flags, model, tmp_path):
    ran = gemq("quantize", model, "-o", tmp_path / "out", *flags, "--device", "cpu")
    assert ran.code == 2
    assert ran.err.startswith(f"gemq: {flags[0]}")
    assert ran.err.count("\n") == 1
