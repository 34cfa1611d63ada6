"""Names of directories and names inside files that hold markup, terminal escapes or lone surrogates."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest

from support.cli import SMALL, gemq
from support.packed_checkpoints import write_packed


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return write_packed(tmp_path_factory.mktemp("packed") / "olmoe")


def with_config(packed, directory, change):
    """A copy of the checkpoint whose config.json was changed, without its checksums."""
    shutil.copytree(packed, directory)
    values = json.loads((directory / "config.json").read_text())
    del values["gemq_checksums"]
    change(values)
    (directory / "config.json").write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize("name", ["ck[/b]", "ck[v2]", "ck[red]", ":smile:"])
def test_a_directory_with_brackets(packed, tmp_path, name):
    directory = tmp_path / name
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(packed, directory)
    ran = gemq("inspect", directory, "--verify")
    assert (ran.code, ran.err) == (0, "")
    assert f"{name} (olmoe" in ran.out


@pytest.mark.parametrize(
    ("name", "shown"), [("[/red]", "[/red]"), ("\x1b]0;title\x07\x1b[31mred", r"\x1b]0;title\x07\x1b[31mred")]
)
def test_a_model_type(packed, tmp_path, name, shown):
    ran = gemq("inspect", with_config(packed, tmp_path / "ck", lambda values: values.update(model_type=name)))
    assert ran.code == 0
    assert f"({shown}, groups of" in ran.out
    assert "\x1b" not in ran.out


def test_a_lone_surrogate(packed, tmp_path):
    ran = gemq("inspect", with_config(packed, tmp_path / "ck", lambda values: values.update(model_type="\ud800")))
    assert ran.code == 0
    assert r"(\ud800, groups of" in ran.out


@pytest.mark.parametrize("command", [("inspect",), ("eval", "-q"), ("bench", "-q")], ids=" ".join)
def test_escapes_in_the_name_of_a_tensor(packed, tmp_path, command):
    def change(values):
        values["quantization_config"]["linears"]["\x1b]0;title\x07\x1b[2J\x1b[1;31mALL FINE\x1b[0m"] = 4

    ran = gemq(*command, with_config(packed, tmp_path / "ck", change))
    assert ran.code == 2
    assert ran.err.startswith("gemq: ")
    assert ran.err.rstrip("\n").isprintable()
    assert "ALL FINE" in ran.err


def test_a_job_whose_output_has_brackets(tiny_model, tmp_path):
    out = tmp_path / "out[b]"
    text = tmp_path / "text.txt"
    text.write_text("a few words, again and again. " * 100)
    ran = gemq("quantize", tiny_model, "-o", out, *SMALL, "--calibration", text)
    assert ran.code == 0, ran.err
    printed = ran.out.replace("\n", "")
    assert f"Saved {out}" in printed
    assert f"Try: gemq generate {shlex.quote(str(out))}" in printed
