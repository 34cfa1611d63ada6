"""The script of docs/research.md runs as printed, and its allocation is what the checkpoint has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import gemq
from support.cli import make_tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "research.md"


def test_the_script_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib").use("agg")
    script = "".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    full, small = "gemq.Recipe(bits=2.0)", 'gemq.Recipe(bits=2.0, effort="low", num_windows=4, seq_len=32)'
    assert script.count(full) == 1
    monkeypatch.chdir(tmp_path)
    model = make_tiny_model(tmp_path / "path" / "to" / "model", max_position_embeddings=512)
    names: dict[str, Any] = {}
    exec(script.replace(full, small), names)

    assert Path(names["model"]).samefile(model)
    assert (tmp_path / "costs.svg").stat().st_size > 0
    custom = gemq.inspect("custom")
    assert [widths for _, widths, _ in custom.layers] == names["allocation"].by_layer
    assert custom.to_dict()["allocation"] == json.loads(Path("custom.json").read_text())["widths"]
    best = gemq.allocate(names["problem"], names["budget"])
    assert best.predicted_cost <= names["by_gemq"].predicted_cost * (1 + 1e-4)  # the gap of the program
    assert [widths for _, widths, _ in gemq.inspect("global").layers] == best.by_layer


def test_counts_of_the_problem_are_the_scored_tokens(tmp_path: Path) -> None:
    """Every token of the windows goes to two experts of each layer, and each expert has two rows."""
    model = make_tiny_model(tmp_path / "model")
    recipe = gemq.Recipe(bits=2.0, effort="low", num_windows=4, seq_len=32, guard=False)
    result = gemq.quantize(model, recipe, out=tmp_path / "out")
    problem = gemq.allocation_problem(result.work)
    for rows in problem.by_layer:
        assert problem.counts[rows].sum() == 4 * 32 * 2 * problem.units_per_expert
