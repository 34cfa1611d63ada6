"""Which files hold a model's weights, and damaged headers."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from gemq.errors import UserError
from gemq.runtime.safetensors_files import read_header, tensor_entries, weight_files


def write(path, **tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors or {"a": torch.zeros(2, 3)}, path)
    return path


def index(directory, weight_map, name="model.safetensors.index.json", **values):
    text = json.dumps({"metadata": {}, "weight_map": weight_map, **values})
    (directory / name).write_text(text)


def test_the_expected_file_is_taken_and_stale_ones_are_left(tmp_path):
    write(tmp_path / "zzz.safetensors")
    write(tmp_path / "model-00001-of-00002.safetensors")
    expected = write(tmp_path / "model.safetensors")
    assert weight_files(tmp_path) == [expected]


def test_shards_are_those_of_the_index_also_in_a_folder(tmp_path):
    shards = [write(tmp_path / "weights" / f"part-{i}.safetensors") for i in (1, 2)]
    write(tmp_path / "stale.safetensors")
    index(tmp_path, {"b": "weights/part-2.safetensors", "a": "weights/part-1.safetensors"})
    assert weight_files(tmp_path) == shards


def test_config_may_name_the_file(tmp_path):
    write(tmp_path / "model.safetensors")
    named_file = write(tmp_path / "other.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": "other.safetensors"}))
    assert weight_files(tmp_path) == [named_file]


@pytest.mark.parametrize(
    ("weight_map", "text"),
    [
        ({"a": "pytorch_model.bin"}, "no pickled"),
        ({"a": "../model.safetensors"}, "outside the directory"),
        ({"a": "/etc/model.safetensors"}, "outside the directory"),
        ({"a": "gone.safetensors"}, "gone.safetensors is missing"),
        ({"a": 1}, "weight_map is damaged"),
        ({}, "weight_map is damaged"),
        ([], "weight_map is damaged"),
    ],
)
def test_an_index_that_cannot_be_used_is_refused(tmp_path, weight_map, text):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    index(tmp_path, weight_map)
    with pytest.raises(UserError, match=text):
        weight_files(tmp_path)


@pytest.mark.parametrize("contents", ["", "[", "[" * 100_000, '"x"', "null"])
def test_an_index_that_is_no_json_object_is_refused(tmp_path, contents):
    (tmp_path / "model.safetensors.index.json").write_text(contents)
    with pytest.raises(UserError, match="copy the checkpoint again"):
        weight_files(tmp_path)


def test_pickled_weights_alone_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="reads no pickled files"):
        weight_files(tmp_path)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="not a regular file"):
        tensor_entries(tmp_path / "model.safetensors")


def edited(path, change):
    """The file with its header passed through ``change``, its data as they are."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [3, 3], "data_offsets": [0, 24]},
        {"dtype": "F33", "shape": [2, 3], "data_offsets": [0, 24]},
        {"dtype": ["F32"], "shape": [2, 3], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [2.0, 3], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": 6, "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]},
        {"dtype": "F32", "shape": [2, 3]},
        [],
        None,
    ],
)
def test_a_damaged_entry_is_refused(tmp_path, entry):
    file = write(tmp_path / "model.safetensors")
    edited(file, lambda header: {**header, "a": entry})
    with pytest.raises(UserError, match="copy the checkpoint again"):
        read_header(file)


def test_overlapping_entries_are_refused(tmp_path):
    file = write(tmp_path / "model.safetensors", a=torch.zeros(4), b=torch.zeros(4))
    edited(file, lambda h: {**h, "b": {**h["b"], "data_offsets": h["a"]["data_offsets"]}})
    with pytest.raises(UserError, match="does not begin where"):
        read_header(file)
