"""Which releases of Transformers are tested, and the line that others get."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gemq import cli
from gemq.runtime import tested_versions
from gemq.runtime.tested_versions import NEWEST, OLDEST, untested_transformers

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("version", "age"),
    [
        ("5.17.0", None),
        ("5.23.1", None),
        ("5.24.0", None),
        ("5.24.9.dev0", None),
        ("5.25.0", "newer"),
        ("5.25.0.dev0", "newer"),
        ("6.0.1", "newer"),
        ("5.16.4", "older"),
        ("unknown", None),
    ],
)
def test_releases_outside_the_range_get_one_line(version, age, monkeypatch):
    monkeypatch.setattr(tested_versions.metadata, "version", lambda name: version)
    line = untested_transformers()
    if age is None:
        assert line is None
    else:
        assert line is not None
        assert f"Transformers {version} is {age} than" in line
        assert "pip install 'transformers==5.24.*'" in line


def test_commands_say_it_once_and_help_does_not(monkeypatch, capsys):
    monkeypatch.setattr(cli, "untested_transformers", lambda: "never tested")
    monkeypatch.setattr(cli, "app", lambda *_, **__: None)
    for arguments, said in ((["plan", "x"], 1), (["plan", "-h"], 0), (["--version"], 0), (["no-command"], 0)):
        assert cli.run(arguments) == 0
        assert capsys.readouterr().err.count("never tested") == said


def test_the_range_is_what_is_run():
    """The Makefile's default and the conformance results are of the newest and the oldest release in the range."""
    default = re.search(r"^TRANSFORMERS \?= (\d+)\.(\d+)\.", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert default is not None
    assert tuple(map(int, default.groups())) == NEWEST
    runs = [tuple(map(int, f.stem.split("."))) for f in (ROOT / "tests" / "conformance-results").glob("*.json")]
    assert (min(runs)[:2], max(runs)[:2]) == (OLDEST, NEWEST)
