"""Which small files of a model go into the output, and that links publish nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import gemq
from gemq import UserError
from gemq.checkpoint.dense_export import write_dense_checkpoint
from gemq.checkpoint.small_files import small_files
from support.model_folders import model_folder, quantize

pytestmark = pytest.mark.sample
torch.set_num_threads(1)


ENTRIES = """
config.json tokenizer.json vocab.txt LICENSE LICENSE.md NOTICE modeling_x.py chat_template.jinja tokenizer.model
model.safetensors model.safetensors.index.json hf_quant_config.json adapter_config.json .hidden.json photo.png
additional_chat_templates/rag.jinja additional_chat_templates/notes.md figures/a.json
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with files of every kind."""
    folder = tmp_path / "model"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "figures").mkdir()
    for name in ENTRIES.split():
        (folder / name).write_text(name)
    return folder


COPIED = {
    "tokenizer.json", "vocab.txt", "LICENSE", "LICENSE.md", "NOTICE", "modeling_x.py", "chat_template.jinja",
    "tokenizer.model", "additional_chat_templates/rag.jinja",
}  # fmt: skip


def test_what_is_copied(folder):
    assert small_files(folder) == {name: folder / name for name in COPIED}


@pytest.mark.parametrize(
    "name", ["extra.json", "NOTICE", "additional_chat_templates", "additional_chat_templates/x.jinja"]
)
@pytest.mark.parametrize("target", ["secret", "absent", "itself"])
def test_links_that_lead_out_are_refused(name, target, folder, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "token.json").write_text("hf_secret")
    path = folder / name
    if path.is_dir():
        path.rename(tmp_path / "away")
    path.unlink(missing_ok=True)
    points_to = {"secret": secret / "token.json", "absent": tmp_path / "absent", "itself": path}[target]
    path.symlink_to(secret if name == "additional_chat_templates" and target == "secret" else points_to)
    with pytest.raises(UserError, match=r"is a link that leads out of") as caught:
        small_files(folder)
    assert str(path) in str(caught.value)


def test_links_inside_the_folder_and_weights_elsewhere_are_fine(folder, tmp_path):
    (folder / "extra.json").symlink_to("tokenizer.json")
    (tmp_path / "weights").write_text("w")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "weights")
    (folder / "photo.png").unlink()
    (folder / "photo.png").symlink_to("/etc/passwd")
    assert small_files(folder).keys() == COPIED | {"extra.json"}
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert small_files(link).keys() == COPIED | {"extra.json"}


def to_cache(folder: Path, cache: Path) -> Path:
    """The same files as the hub's cache keeps them: a snapshot of links to blobs."""
    snapshot = cache / "models--org--name" / "snapshots" / "0123"
    blobs = cache / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    return snapshot


def test_a_snapshot_of_the_hub_cache_goes_the_whole_way(tmp_path):
    snapshot = to_cache(model_folder(tmp_path / "model"), tmp_path / "cache")
    assert (snapshot / "model.safetensors").is_symlink()
    quantize(snapshot)
    out = snapshot.parent / "out"
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in out.iterdir()}
    assert not any(file.is_symlink() for file in out.iterdir())
    gemq.load(out)
    (snapshot / "extra.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match=r"extra\.json is a link that leads out of"):
        small_files(snapshot)


def test_a_job_is_refused_before_it_computes_and_a_twin_before_it_writes(tmp_path):
    source = model_folder(tmp_path / "model")
    (tmp_path / "secret").write_text("hf_secret")
    (source / "extra.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"extra\.json is a link that leads out of"):
        quantize(source)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()
    (source / "extra.json").unlink()
    quantize(source)
    (tmp_path / "out" / "extra.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"extra\.json is a link that leads out of"):
        write_dense_checkpoint(tmp_path / "out", tmp_path / "twin")
    assert not (tmp_path / "twin").exists()
