"""What the terminal shows: names as they are, nothing cut, any encoding."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gemq.cli.tables import short_names
from support.cli import Finished, gemq


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of its own, whose output goes to a pipe."""
    environ = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    command = [sys.executable, "-m", "gemq", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**environ, **environment}, check=False)


@pytest.mark.parametrize("name", ["m[/a]", "ck[v2]", "[red]", "a:smile:b"])
def test_names_are_no_markup(name, finished: Finished, tmp_path):
    checkpoint = Path(shutil.copytree(finished.out, tmp_path / name.replace("/", os.sep)))
    ran = gemq("inspect", checkpoint)
    assert ran.code == 0, ran.err
    assert str(checkpoint) in ran.out.replace("\n", "")
    text = tmp_path / f"{name.replace('/', '_')}.txt"
    text.write_text("Once upon a time there was a file.\n" * 200)
    ran = gemq("eval", finished.out, "--text", text, "--seq-len", 64, "--max-windows", 2)
    assert ran.code == 0, ran.err
    assert text.stem in ran.out


def test_a_terminal_without_unicode_gets_all_of_it(finished: Finished, tmp_path):
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    text = tmp_path / "späß.txt"
    text.write_text("Once upon a time there was a file.\n" * 200)
    ran = run("eval", finished.out, "--text", text, "--seq-len", "64", "--max-windows", "2", **ascii_only)
    assert ran.returncode == 0, ran.stderr
    assert "+-" in ran.stdout
    assert "sp\\xe4\\xdf" in ran.stdout
    assert (ran.stdout + ran.stderr).isascii()


def test_a_pipe_gets_whole_tables(finished: Finished, tmp_path):
    name = "a text whose name is longer than any column of a terminal that is eighty columns wide would allow it to be"
    text = tmp_path / f"{name}.txt"
    text.write_text("Once upon a time there was a file.\n" * 200)
    ran = run("eval", finished.out, "--text", text, "--seq-len", "64", "--max-windows", "2")
    assert ran.returncode == 0, ran.stderr
    assert name in ran.stdout
    assert "score: 2/2, 0:00:0" in ran.stderr


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_gets_all_of_a_table(columns, finished: Finished, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = tmp_path / "a text whose name is longer than its column.txt"
    text.write_text("Once upon a time there was a file.\n" * 200)
    arguments = ("--reference", finished.model, "--text", text, "--seq-len", 64, "--max-windows", 2)
    for command in (("inspect", finished.out), ("eval", finished.out, *arguments), ("plan", finished.model)):
        ran = gemq(*command)
        assert ran.code == 0, ran.err
        lines = [line for line in ran.out.splitlines() if line[:1] in "│┃┏├└"]
        assert max(map(len, lines)) <= columns
        assert "…" not in ran.out


def test_short_names():
    paths = [f"model.layers.{i}.mlp.experts" for i in (1, 2, 10)]
    assert short_names(paths) == ("model.layers.*.mlp.experts", ["1", "2", "10"])
    assert short_names(["0", "1"]) == ("", ["0", "1"])
    mixed = ["model.layers.0.mlp.experts", "model.layers.1.moe.experts"]
    assert short_names(mixed) == ("", mixed)
