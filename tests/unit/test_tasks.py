"""Tasks of lm-eval: results, and what bad input gets. What needs lm-eval itself is skipped without it."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from gemq.assets import builtin_model
from gemq.cli.evaluation_tables import _print_tasks
from gemq.errors import UserError
from gemq.evaluation import tasks
from support.cli import gemq
from support.packed_checkpoints import write_packed

TASKS = Path(__file__).parents[1] / "support" / "tasks"
"""A task with its data, which is read from the current directory."""

RESULTS: dict[str, Any] = {
    "results": {
        "arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": "N/A"},
        "gsm8k": {
            "alias": "gsm8k",
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": 0.125,
            "exact_match,flexible-extract": 0.5,
            "exact_match_stderr,flexible-extract": 0.125,
        },
    },
    "n-samples": {"gsm8k": {"original": 100, "effective": 4}},
    "n-shot": {"gsm8k": 5},
    "versions": {"gsm8k": 3.0},
    "higher_is_better": {"gsm8k": {"exact_match": True}},
}


def test_figures_of_tasks_and_groups_are_read_from_results():
    row = tasks._row("gsm8k", RESULTS)
    assert (row["documents"], row["num_fewshot"], row["version"]) == (4, 5, 3.0)
    strict, flexible = row["metrics"]
    assert strict == {
        "metric": "exact_match",
        "filter": "strict-match",
        "value": 0.25,
        "stderr": 0.125,
        "higher_is_better": True,
    }
    assert flexible["value"] == 0.5
    group = tasks._row("arc", RESULTS)
    assert group["documents"] is None
    assert group["metrics"][0]["stderr"] is None


def test_the_table_has_a_row_for_each_metric():
    console = Console(file=io.StringIO(), width=120)
    rows = {name: tasks._row(name, RESULTS) for name in RESULTS["results"]}
    _print_tasks(console, {"lm_eval": "0.4.13", "limit": 4, "results": rows})
    printed = console.file.getvalue()
    assert "exact_match (strict-match)" in printed
    assert "0.2500 ±0.1250" in printed
    assert "Only the first 4 documents" in printed


def test_an_unknown_task_gets_the_name_of_a_similar_one():
    manager = SimpleNamespace(all_tasks=["arc_easy", "gsm8k"], match_tasks=lambda names: [])
    with pytest.raises(UserError, match="no task 'arc_esy': did you mean arc_easy"):
        tasks._match(manager, "arc_esy")


def test_without_lm_eval_a_line_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks", raising=False)
    ran = gemq("eval", builtin_model(), "--tasks", "arc_easy", "--json", tmp_path / "results.json")
    assert ran.code == 2
    assert ran.err == f"gemq: --tasks needs lm-eval, which is not installed: {tasks.INSTALL}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tasks", "a,,b"), "names separated by commas"),
        (("--tasks", "a", "--task-limit", "0"), "--task-limit 0"),
        (("--tasks", "a", "--num-fewshot", "-1"), "--num-fewshot"),
        (("--task-limit", "3"), "add --tasks"),
    ],
)
def test_flags_out_of_range_get_one_line(flags, words):
    ran = gemq("eval", builtin_model(), *flags)
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert words in ran.err


def test_a_task_from_a_file_runs_and_its_figures_are_in_the_json(monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(TASKS)
    flags = ("--max-windows", 1, "--seq-len", 64, "--device", "cpu", "--quiet", "--json", "-")
    ran = gemq("eval", builtin_model(), "--tasks", "gemq_next_word.yaml", "--task-limit", 3, *flags)
    assert ran.code == 0, ran.err
    assert ran.err == ""
    row = ran.json["tasks"]["results"]["gemq_next_word"]
    assert row["documents"] == 3
    assert row["metrics"][0]["metric"] == "acc"
    assert row["metrics"][0]["value"] >= 2 / 3
    assert ran.json["perplexity"] > 1


def test_a_task_whose_data_is_missing_gets_one_line(monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    ran = gemq("eval", builtin_model(), "--tasks", TASKS / "gemq_next_word.yaml", "--device", "cpu", "--quiet")
    assert ran.code == 2
    assert ran.err.startswith("gemq: tasks ")
    assert ran.err.count("\n") == 1
    assert "next_word.jsonl" in ran.err


def test_lm_eval_opens_a_packed_checkpoint_as_model_gemq(tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.api.registry import get_model

    from gemq.evaluation.harness_model import GemqLM

    assert get_model("gemq") is GemqLM
    with pytest.raises(UserError, match="not a gemq checkpoint"):
        GemqLM(pretrained=str(builtin_model()), device="cpu")
    packed = write_packed(tmp_path / "packed")
    model = GemqLM.create_from_arg_string(
        f"pretrained={packed},tokenizer={builtin_model()},dtype=float32", {"batch_size": 2, "device": "cpu"}
    )
    assert model.batch_size == 2
    assert type(model.model.model.layers[0].mlp.experts).__name__.startswith("Packed")
