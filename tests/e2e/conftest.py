"""One finished job on the built-in model and a tiny random model, made once for all tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gemq.assets import builtin_model
from support.cli import SMALL, Finished, few_guard_windows, gemq, make_tiny_model


@pytest.fixture(autouse=True)
def quick_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    few_guard_windows(monkeypatch)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    base = tmp_path_factory.mktemp("finished")
    model, out = builtin_model(), base / "out"
    with pytest.MonkeyPatch.context() as patch:
        few_guard_windows(patch)
        ran = gemq("quantize", model, "-o", out, "--bits", "2", *SMALL, "--json", "-")
    assert ran.code == 0, ran.err
    return Finished(model, out, base / "out.work", ran.json)


@pytest.fixture
def work(finished: Finished, tmp_path: Path) -> Path:
    """A work directory of its own, with everything that ``finished`` computed."""
    return Path(shutil.copytree(finished.work, tmp_path / "work"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OLMoE of two layers with a part of the built-in tokenizer: a job on it takes a fraction of a second."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
