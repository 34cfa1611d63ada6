"""Values that no job can use are refused alike in YAML, on the command line and in Python, with a short line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from gemq import UserError
from gemq.allocation.problem import Allocation
from gemq.recipe import Recipe
from gemq.recipe_values import INTEGER_RANGES, MAX_NUMBER, MAX_SEED, NON_NEGATIVE_KEYS, convert, parse_size
from support.allocation_problems import random_problem

NEVER = [float("nan"), float("inf"), -1.0, 1e300, 1e308, 2 * MAX_NUMBER]


def refused(match: str, **values: object) -> None:
    for construct in (lambda: Recipe(**values), lambda: Recipe.from_dict(values)):  # type: ignore[arg-type]
        with pytest.raises(UserError, match=match) as caught:
            construct()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", [*NON_NEGATIVE_KEYS, "val_fraction"])
@pytest.mark.parametrize("value", NEVER)
def test_numbers_beyond_use(name, value):
    refused(name, **{name: value})


@pytest.mark.parametrize("name", INTEGER_RANGES)
def test_whole_numbers_beyond_use(name):
    low, high = INTEGER_RANGES[name]
    for value in (low, high):
        assert getattr(Recipe(**{name: value}), name) == value
    for value in (high + 1, 10**30, 10**5000):
        refused(f"{name} cannot be .*the maximum is {high}", **{name: value})
    refused(name, **{name: float("nan")})
    refused(name, **{name: 1.5})


@pytest.mark.parametrize("value", [1, 1.0, 5, 1e308])
def test_held_out_is_a_share(value):
    refused("val_fraction", val_fraction=value)


@pytest.mark.parametrize("size", [10**19, 10**400, 0, -1])
def test_sizes_beyond_use(size):
    refused("size", size=size)


@pytest.mark.parametrize("exponent", [21, 100, 5000])
def test_group_sizes_beyond_use(exponent):
    refused("group_size .* is not a power of two", group_size=2**exponent)


@pytest.mark.parametrize("seed", [2**53 + 1, MAX_SEED, str(2**53 + 1), f"{2**53 + 1}"])
def test_a_whole_number_is_taken_exactly(seed):
    """A number beyond 2^53 is none that a float holds."""
    assert Recipe(seed=seed).seed == int(seed)
    assert Recipe.from_dict({"seed": seed}).seed == int(seed)


@pytest.mark.parametrize(
    ("values", "same"),
    [
        ({"bits": "2.5", "num_windows": "64", "seed": 3.0}, {"bits": 2.5, "num_windows": 64, "seed": 3}),
        ({"bits": np.float32(2.5), "num_windows": np.int64(64)}, {"bits": 2.5, "num_windows": 64}),
        ({"calibration": "a.txt", "widths": "1,2,3"}, {"calibration": ("a.txt",), "widths": (1, 2, 3)}),
        ({"calibration": Path("a.txt"), "widths": [3, 1, 1, 2]}, {"calibration": ("a.txt",), "widths": (1, 2, 3)}),
        (
            {"calibration": [Path("a.txt"), "self"], "size": "12GB"},
            {"calibration": ("a.txt", "self"), "size": 12 * 10**9},
        ),
        ({"progressive": "3.0,2.0"}, {"progressive": (3.0, 2.0)}),
    ],
)
def test_python_takes_what_yaml_takes(values, same):
    assert Recipe(**values) == Recipe(**same) == Recipe.from_dict(values)
    assert Recipe(**values).to_dict() == Recipe(**same).to_dict()
    assert type(Recipe(**values).num_windows) is int


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"bits": 0}, "has 0 bits: give --bits from 1 to 3"),
        ({"bits": "two"}, "bits cannot be 'two': it takes a value of type float"),
        ({"bits": True}, "bits cannot be True"),
        ({"bits": [2.0]}, r"bits cannot be \[2.0\]"),
        ({"num_windows": 1.5}, "num_windows cannot be 1.5: it takes a value of type int"),
        ({"num_windows": "many"}, "num_windows cannot be 'many'"),
        ({"num_windows": None}, "num_windows cannot be None"),
        ({"reconstruct": 1}, "reconstruct cannot be 1: it takes a value of type bool"),
        ({"reconstruct": "no"}, "reconstruct cannot be 'no'"),
        ({"calibration": None}, "calibration cannot be None"),
        ({"calibration": {"a": "b"}}, "calibration cannot be"),
        ({"calibration": [["a"]]}, "calibration cannot be"),
        ({"calibration": "a\0b"}, "calibration cannot be"),
        ({"effort": ["low"]}, "effort cannot be"),
        ({"effort": None}, "effort cannot be None"),
        ({"quantizer": 3}, "quantizer cannot be '3'"),
        ({"widths": {"2": 1}}, "there is no width"),
        ({"widths": [10**400]}, "there is no width"),
        ({"widths": ["x" * 10_000]}, "there is no width"),
        ({"distill_parameters": "all"}, "distill_parameters cannot have 'all'"),
        ({"size": "1e400"}, "is not a size"),
        ({"bits": object()}, "bits cannot be"),
        ({"seed": 2**64}, f"seed cannot be {2**64}: the maximum is {MAX_SEED}"),
    ],
)
def test_python_refuses_what_yaml_refuses(values, match):
    refused(match, **values)


@pytest.mark.parametrize("text", ["1e400", "9" * 400 + "GB", "1e309 B"])
def test_sizes_that_no_number_holds(text):
    with pytest.raises(UserError, match="is not a size") as caught:
        parse_size(text)
    assert len(str(caught.value)) < 200


def test_messages_are_short_whatever_the_value():
    for value in (["x" * 100_000], 10**5000, "y" * 10**6):
        with pytest.raises(UserError) as caught:
            convert("bits", value, "float | None", "recipe")
        assert len(str(caught.value)) < 200


# YAML files


BOMB = "bits:\n - &c [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f" - &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in zip("cdefgh", "defghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (BOMB, "it has an alias"),
        ("a: &a [1]\nbits: *a\n", "it has an alias"),
        ("base: &b {bits: 2}\n<<: *b\n", "it has an alias"),
        ("bits: " + "[" * 5000 + "]" * 5000, "nested deeper"),
        ("bits: " + "{a: " * 5000 + "1" + "}" * 5000, "nested deeper"),
        ("- " * 5000 + "1", "nested deeper"),
        ("seed: " + "1" * 10_000, "is not valid YAML"),
        ("bits: 2\nbits: 3\n", "the key 'bits' twice"),
        ("bits: !!python/object/apply:os.system ['touch executed']", "is not valid YAML"),
        ("bits: !!binary x", "is not valid YAML"),
        ("bits: 2020-13-45", "is not valid YAML"),
        ("seed: 2020-01-01", "seed cannot be"),
        ("? [a, b]\n: 1\n", "is not valid YAML"),
        ("\0", "is not valid YAML"),
        ("x" * 200_000, "more than"),
        ("[" * 1000, "is not valid YAML"),
    ],
)
def test_yaml_that_is_no_recipe(tmp_path, monkeypatch, text, match):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(text)
    begin = time.monotonic()
    with pytest.raises(UserError, match=match) as caught:
        Recipe.from_yaml("recipe.yaml")
    assert time.monotonic() - begin < 5
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert os.listdir() == ["recipe.yaml"]


def test_a_recipe_that_is_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file: save it to one first"):
        Recipe.from_yaml(tmp_path / "pipe")


# Allocation files


@pytest.mark.parametrize(
    "text",
    [
        '{"widths": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"widths": [[1' + "0" * 400 + "]]}",
        '{"widths": [[1' + "0" * 5000 + "]]}",
        '{"widths": [[2]], "budget": {"bits": 1' + "0" * 400 + "}}",
        '{"widths": [[2]], "budget": {"bits": [1]}}',
        '{"widths": [[2]], "' + "x" * 10_000 + '": 1}',
        '{"widths": [["' + "x" * 10_000 + '"]]}',
        '{"widths": ["' + "x" * 10_000 + '"]}',
    ],
)
def test_allocations_that_are_none(text):
    with pytest.raises(UserError) as caught:
        Allocation.from_json(text, random_problem((1,)))
    assert len(str(caught.value)) < 400
