"""vLLM's own loader must read the same files as all other readers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from gemq import UserError
from gemq.integrations.vllm.files import check_served_files
from gemq.runtime.safetensors_files import weight_files


def write(directory, *names):
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True)
        save_file({name: torch.zeros(2)}, directory / name)


def write_index(directory, *names):
    values = {"metadata": {}, "weight_map": {name: name for name in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(values))


def test_the_files_of_a_checkpoint_are_served(tmp_path):
    write(tmp_path, "model.safetensors")
    check_served_files(tmp_path, weight_files(tmp_path))


def test_files_that_the_index_does_not_name_are_not_served(tmp_path):
    write(tmp_path, "a.safetensors", "b.safetensors", "stale.safetensors")
    write_index(tmp_path, "a.safetensors", "b.safetensors")
    check_served_files(tmp_path, weight_files(tmp_path))


@pytest.mark.parametrize("stray", ["zzz.safetensors", "model-00001-of-00002.safetensors", "consolidated.safetensors"])
def test_a_stray_file_is_refused(tmp_path, stray):
    write(tmp_path, "model.safetensors", stray)
    with pytest.raises(UserError, match=f"holds {stray}, which vLLM would read"):
        check_served_files(tmp_path, weight_files(tmp_path))


def test_what_vllm_prefers_to_the_index_is_refused(tmp_path):
    write(tmp_path, "a.safetensors", "consolidated.00.safetensors")
    write_index(tmp_path, "a.safetensors")
    with pytest.raises(UserError, match=r"holds consolidated\.00"):
        check_served_files(tmp_path, weight_files(tmp_path))


def test_a_stale_index_beside_the_weights_is_refused(tmp_path):
    write(tmp_path, "model.safetensors", "a.safetensors")
    write_index(tmp_path, "a.safetensors")
    with pytest.raises(UserError, match=r"holds a\.safetensors"):
        check_served_files(tmp_path, weight_files(tmp_path))


def test_shards_in_a_folder_are_refused(tmp_path):
    write(tmp_path, "weights/a.safetensors")
    write_index(tmp_path, "weights/a.safetensors")
    with pytest.raises(UserError, match=r"would not read weights/a\.safetensors"):
        check_served_files(tmp_path, weight_files(tmp_path))
