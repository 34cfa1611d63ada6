"""``gemq bench``: figures of packed and plain models, and one line for what it cannot measure."""

from __future__ import annotations

import json

import pytest

from support.cli import Finished, gemq

FAST = ("--prefill", "8,16", "--new-tokens", 3)


def test_bench(finished: Finished, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "figures.json"
    ran = gemq("bench", finished.out, *FAST, "--batch", "1,3", "--device", "cpu", "--json", file)
    assert ran.code == 0, ran.err
    values = json.loads(file.read_text())
    assert values["seconds"].keys() == {"load", "first_token"}
    assert [row["batch"] for row in values["decode"]] == [1, 3]
    assert [row["tokens"] for row in values["prefill"]] == [8, 16]
    for row in values["decode"] + values["prefill"]:
        assert 0 < row["tokens_per_second"]["p20"] <= row["tokens_per_second"]["p50"] <= row["tokens_per_second"]["p80"]
    batch_1, batch_3 = values["decode"]
    assert batch_1["bytes_per_step"] < batch_3["bytes_per_step"] < finished.figures["stored_bytes"]
    assert batch_1["bytes_per_second"] == pytest.approx(batch_1["bytes_per_step"] * batch_1["tokens_per_second"]["p50"])
    assert batch_3["bytes_per_second"] == pytest.approx(
        batch_3["bytes_per_step"] * batch_3["tokens_per_second"]["p50"] / 3
    )
    for words in ("tokens/s", "weights a step", "CPU", "Seconds: load", "first token"):
        assert words in ran.out
    assert max(map(len, (line for line in ran.out.splitlines() if line[:1] in "│┃┏├└"))) <= 80


def test_bench_of_a_plain_model_for_comparison(tiny_model):
    values = json.loads(gemq("bench", tiny_model, *FAST, "--device", "cpu", "--json", "-").out)
    assert values["decode"][0]["execution"] == "eager"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere/at/all"], "does not exist"),
        (["MODEL", "--batch", "0"], "--batch cannot be '0'"),
        (["MODEL", "--prefill", "16,x"], "--prefill cannot be '16,x'"),
        (["MODEL", "--prefill", "100000"], "longer than the model takes"),
        (["MODEL", "--new-tokens", "1"], "--new-tokens cannot be 1"),
        (["MODEL", "--dtype", "int3"], "--dtype cannot be 'int3'"),
    ],
)
def test_bench_of_bad_input(tiny_model, arguments, words):
    ran = gemq("bench", *[tiny_model if a == "MODEL" else a for a in arguments], "-q")
    assert ran.code == 2
    assert words in ran.err
    assert ran.err.count("\n") == 1
