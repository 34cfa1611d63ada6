"""The recipe: defaults, what is refused and how, YAML, and budgets."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import subprocess
import sys

import pytest
import yaml

from gemq import UserError
from gemq.quant.widths import Width, group_size_for
from gemq.recipe import Recipe
from gemq.recipe_defaults import EFFORTS
from gemq.recipe_values import CHOICES, parse_size


def refused(match: str, **values: object) -> None:
    with pytest.raises(UserError, match=match) as caught:
        Recipe(**values)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 250


@pytest.mark.sample
def test_defaults():
    """As DESIGN.md names them."""
    recipe = Recipe()
    assert recipe.bits is recipe.stored_bits is recipe.size is None
    assert recipe.budget_text == "2 bits"
    assert (recipe.num_windows, recipe.seq_len, recipe.seed, recipe.calibration) == (128, None, 0, ("self",))
    assert recipe.candidate_widths == (1, 1.6, 2, 3)
    assert recipe.width_names == "1, 1.6, 2, 3"
    assert (recipe.group_size, recipe.dense_bits, recipe.quantizer) == (128, 4, "gptq")
    assert (recipe.allocate, recipe.layer_rule, recipe.reconstruct) == ("global", False, True)
    assert recipe.dtype == "auto"


def test_recipes_cannot_be_changed_and_compare_by_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().seed = 1  # type: ignore[misc]
    assert Recipe(bits=2) == Recipe(bits=2.0)
    assert Recipe(widths=(3, 1, 1, 2)) == Recipe(widths=(1, 2, 3))


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    for choice in CHOICES[name]:
        epochs = {"candidate_epochs": 0, "reconstruction_epochs": 0}  # training cannot start from round to nearest
        assert getattr(Recipe(**{name: choice}, **epochs), name) == choice
    refused(rf"{name} cannot be 'best': choose from {CHOICES[name][0]}", **{name: "best"})


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"bits": 2.0, "size": 10**9}, "bits and size each set the budget: give only one"),
        ({"bits": 2.0, "stored_bits": 2.0, "size": 1}, "bits and stored_bits and size each set"),
        ({"bits": 0.5}, r"no allocation of widths 1, 1\.6, 2, 3 has 0\.5 bits: give --bits from 1 to 3"),
        ({"bits": 9}, r"has 9 bits: give --bits from 1 to 4$"),
        ({"bits": 4.5}, r"has 4\.5 bits: give --bits from 1 to 4, or allow a wider width with --widths .*,8$"),
        ({"bits": 2, "widths": (3, 4)}, r"widths 3, 4 has 2 bits: give --bits from 3 to 4"),
        ({"bits": 3, "widths": (1.6,)}, r"give --bits from 1\.625 to 1\.625, or allow .* --widths 1\.6,3"),
        ({"stored_bits": 0.0}, r"stored_bits must be a positive number \(it is 0"),
        ({"stored_bits": -1.0}, "stored_bits must be a positive number"),
        ({"size": 0}, "size must be a positive number"),
        ({"widths": ()}, "widths is empty: name at least one"),
        ({"widths": (2, 5)}, r"there is no width 5: choose from 1, 1\.6, 2, 3, 4, 8"),
        ({"widths": ("two",)}, "there is no width 'two': choose from"),
        ({"group_size": 100}, "group_size 100 is not a power of two from 16 up: try 128"),
        ({"group_size": 8}, "group_size 8 is not"),
        ({"group_size": 0}, "group_size 0 is not"),
        ({"group_size": -16}, "group_size -16 is not"),
        ({"dense_bits": 1}, "dense_bits cannot be 1: choose 2, 3, 4, 8, or 16 for unquantized"),
        ({"dense_bits": 5}, "dense_bits cannot be 5"),
        ({"calibration": ()}, "calibration names no source: give a text file"),
        ({"num_windows": 0}, "num_windows cannot be 0: the minimum is 1"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens cannot be 0: the minimum is 1"),
        ({"seed": -1}, "seed cannot be -1: the minimum is 0"),
        ({"seq_len": 1}, "seq_len cannot be 1: a window has at least 2 tokens"),
        ({"dampening": -0.1}, r"dampening must be a number from 0 up \(it is -0\.1\)"),
        ({"hessian_shrinkage": -1.0}, "hessian_shrinkage must be a number from 0 up"),
        ({"smoothing": -1.0}, "smoothing must be a number from 0 up"),
    ],
)
@pytest.mark.sample
def test_what_is_refused(values, match):
    refused(match, **values)


# Widths of the candidates


@pytest.mark.parametrize(
    ("values", "wide"),
    [
        ({"bits": 2.5}, False),
        ({"bits": 2.51}, True),
        ({"bits": 4}, True),
        ({"stored_bits": 2.5}, False),
        ({"stored_bits": 2.6}, True),
        ({"size": 10**9}, True),  # nobody knows yet how many bits that is
        ({}, False),
    ],
)
def test_four_bits_join_above_two_and_a_half(values, wide):
    assert Recipe(**values).candidate_widths == ((1, 1.6, 2, 3, 4) if wide else (1, 1.6, 2, 3))


def test_named_widths_win():
    assert Recipe(bits=2.9, widths=(8, 2)).candidate_widths == (2, 8)
    assert Recipe(widths=("1.6", "2")).candidate_widths == (1.6, 2)  # type: ignore[arg-type]


# Changes


def test_replace_keeps_or_replaces_the_budget():
    recipe = Recipe(bits=2.0, seed=3)
    assert recipe.replace(seed=4) == Recipe(bits=2.0, seed=4)
    assert recipe.replace(size=10**9) == Recipe(size=10**9, seed=3)
    assert recipe.replace(stored_bits=2.25) == Recipe(stored_bits=2.25, seed=3)
    assert Recipe(size=5).replace(bits=1.5) == Recipe(bits=1.5)
    assert recipe.replace(bits=None) == Recipe(seed=3)
    assert recipe.replace(size=None) == recipe  # a flag that was not given
    with pytest.raises(UserError, match="each set the budget"):
        recipe.replace(bits=2.0, size=7)
    with pytest.raises(UserError, match="no allocation"):
        recipe.replace(bits=0.1)


@pytest.mark.parametrize(
    ("values", "text"),
    [({"bits": 1.5}, "1.5 bits"), ({"stored_bits": 2.25}, "2.25 stored bits"), ({"size": 12 * 10**9}, "12 GB")],
)
def test_budget_text(values, text):
    assert Recipe(**values).budget_text == text


def test_progressive():
    """The last budget is the recipe's; another one, wherever it comes from, gives the schedule another end."""
    recipe = Recipe.from_yaml("default", {"progressive": "3.0, 2.5,2"})
    assert (recipe.progressive, recipe.bits) == ((3.0, 2.5, 2.0), 2.0)
    assert recipe.replace(bits=1.5).progressive == (3.0, 2.5, 2.0, 1.5)
    assert recipe.replace(bits=2.5).progressive == (3.0, 2.5)
    assert recipe.replace(bits=3.0).progressive == ()
    assert recipe.replace(stored_bits=2.25).progressive == ()
    assert Recipe.from_yaml("paper").progressive == (3.0, 2.5, 2.0)
    assert Recipe.from_yaml("paper", {"bits": 1.5}).progressive == (3.0, 2.5, 2.0, 1.5)
    assert Recipe.from_yaml("paper", {"size": 10**9}).progressive == ()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"progressive": [2.0, 2.5]}, "does not fall"),
        ({"progressive": [3.0, 2.0], "bits": 2.5}, "make that its last budget"),
        ({"progressive": [3.0, 2.0], "size": 10**9}, "leave out stored_bits and size"),
        ({"progressive": [3.5, 2.0]}, "3.5 bits: give --bits from 1 to 3, or allow a wider width"),
        ({"progressive": [3.0, 2.0], "reconstruct": False}, "needs reconstruct"),
        ({"progressive": [3.0, 2.0], "allocate": "uniform"}, "allocate global or layerwise"),
        ({"progressive": "three"}, "progressive cannot be 'three'"),
    ],
)
def test_progressive_mistakes(values, match):
    with pytest.raises(UserError, match=match):
        Recipe.from_dict(values)


def test_efforts():
    """Low trains nothing; a key of the recipe wins over the effort."""
    assert set(EFFORTS) == set(CHOICES["effort"])
    for effort, keys in EFFORTS.items():
        recipe = Recipe(effort=effort)
        assert {name: getattr(recipe, name) for name in keys} == keys
    assert not any(EFFORTS["low"].values())
    assert Recipe(effort="medium", distill_epochs=0).distill_epochs == 0


# YAML


@pytest.mark.sample
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(
            effort="low", bits=2.25, calibration=("a.txt", "self"), widths=(1.6, 2, 4), layer_rule=True, seq_len=512
        ),
        Recipe(size=12 * 10**9, allocate="random", reconstruct=False, smoothing=0.0, dtype="float32"),
        Recipe(effort="low", stored_bits=2.5, quantizer="rtn", allocate_by="expert", dense_bits=16),
    ],
)
def test_round_trips(recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.to_dict()))
    assert Recipe.from_yaml(file) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_values_as_people_write_them(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "size: 12GB\nwidths: 1,1.6,3\ncalibration: notes.txt\nnum_windows: 64.0\ndampening: 1e-3\nlayer_rule: true\n"
    )
    recipe = Recipe.from_yaml(file)
    assert recipe.size == 12 * 10**9
    assert recipe.candidate_widths == (1, 1.6, 3)
    assert recipe.calibration == ("notes.txt",)
    assert recipe.num_windows == 64
    assert isinstance(recipe.num_windows, int)
    assert recipe.dampening == 1e-3
    assert recipe.layer_rule is True
    file.write_text("widths: [2, 3]\ncalibration: [a.txt, self]\nbits: 2\nseq_len: null\n")
    recipe = Recipe.from_yaml(file)
    assert (recipe.widths, recipe.calibration, recipe.bits, recipe.seq_len) == ((2, 3), ("a.txt", "self"), 2.0, None)
    file.write_text("# nothing yet\n")
    assert Recipe.from_yaml(file) == Recipe()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("bit: 2", "unknown key 'bit': did you mean 'bits'?"),
        ("colour: red", "unknown key 'colour': docs/recipe.md lists the keys"),
        ("2: 3", "unknown key 2"),
        ("bits: two", "bits cannot be 'two': it takes a value of type float"),
        ("bits: true", "bits cannot be True"),
        ("num_windows: 1.5", r"num_windows cannot be 1\.5: it takes a value of type int"),
        ("num_windows: true", "num_windows cannot be True"),
        ("num_windows: [1]", r"num_windows cannot be \[1\]"),
        ("seed: null", "seed cannot be None"),
        ("reconstruct: 1", "reconstruct cannot be 1: it takes a value of type bool"),
        ("reconstruct: 'no'", "reconstruct cannot be 'no'"),
        ("widths: 2,7", "there is no width '7'"),
        ("size: huge", "'huge' is not a size: write it like 12GB"),
        ("- bits", "holds no keys: write lines such as 'bits: 2.0'"),
        ("just words", "holds no keys"),
        ("bits: [2", "is not valid YAML .*write lines such as"),
        ("bits: .inf", "no allocation of widths"),
        ("bits: .nan", "no allocation of widths"),
        ("num_windows: .inf", "num_windows cannot be inf"),
        ("num_windows: .nan", "num_windows cannot be nan"),
        ("dampening: .nan", "dampening must be a number from 0 up"),
        ("dampening: .inf", "dampening must be a number from 0 up"),
        ("stored_bits: .nan", "stored_bits must be a positive number"),
        ("stored_bits: .inf", "stored_bits must be a positive number"),
        ("size: .inf", "size cannot be inf"),
    ],
)
def test_yaml_mistakes(text, match, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=match) as caught:
        Recipe.from_yaml(file)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"cannot read recipe .*No such file"):
        Recipe.from_yaml(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"cannot read recipe .*[Dd]irectory"):
        Recipe.from_yaml(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot read recipe .*not a text file"):
        Recipe.from_yaml(tmp_path / "binary")


# Sizes and widths as users write them


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GB", 12_000_000_000),
        ("800 MB", 800_000_000),
        ("1.5e9", 1_500_000_000),
        ("1.5gb", 1_500_000_000),
        ("7k", 7000),
        ("2T", 2 * 10**12),
        (" 64 B ", 64),
        ("123", 123),
        ("0.5 G", 500_000_000),
    ],
)
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "12 GiB", "1.2.3", "0", "1,5GB", "12 PB", "nan", "1e", "twelve"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="is not a size: write it like 12GB or 800MB") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


def test_widths():
    assert [f"{width}" for width in Width] == ["1", "1.6", "2", "3", "4", "8"]
    for width in Width:
        assert Width(str(width)) is Width(width.value) is Width(float(width.value)) is Width(width) is width
        assert copy.deepcopy(width) is width
        assert type(width.value) is (float if width is Width.TERNARY else int)  # JSON writes 2, not 2.0
    assert sorted(reversed(Width)) == list(Width)
    assert max(Width) is Width.EIGHT_BIT
    assert [width.bits for width in Width] == [1, 1.625, 2, 3, 4, 8]
    assert [width.levels for width in Width] == [2, 3, 4, 8, 16, 256]
    for bad in (0, 7, 1.625, None, [], "x", float("nan"), float("inf")):
        with pytest.raises(UserError, match="there is no width"):
            Width(bad)


def test_a_width_equals_its_number():
    assert Width.TERNARY == 1.6
    assert Width.TERNARY != 1.625
    assert {Width.TWO_BIT: "a", Width.TERNARY: "b"} == {2: "a", 1.6: "b"}
    assert Width.TWO_BIT != "2"
    with pytest.raises(TypeError):  # the number of ternary is not its bits
        Width.TERNARY * 128
    with pytest.raises(TypeError):
        json.dumps(Width.TWO_BIT)


def test_bytes():
    """Ternary: 26 bytes a group of 128, 13 of 64. Everything else without waste."""
    assert [w.group_bytes(128) for w in Width] == [16, 26, 32, 48, 64, 128]
    assert [Width.TERNARY.group_bytes(g) for g in (64, 32, 16)] == [13, 7, 4]
    assert Width.THREE_BIT.matrix_bytes(10, 256, 128) == 10 * 2 * (48 + 2)
    for width, group_size in itertools.product(Width, (16, 32, 64, 128, 256, 1 << 16)):
        assert width.group_size(width.group_bytes(group_size)) == group_size
    assert [group_size_for(c, 128) for c in (256, 192, 96, 80, 1408)] == [128, 64, 32, 16, 128]
    assert group_size_for(256, 32) == 32
    for columns in (24, 8, 1407):
        with pytest.raises(UserError, match=f"{columns} input columns cannot be cut"):
            group_size_for(columns, 128)


def test_a_recipe_needs_no_torch():
    code = "import sys, gemq.recipe; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
