"""Loaded packed models are pickled, copied and sent to other processes like full-precision ones."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch

import gemq
from support.packed_checkpoints import write_packed

IDS = torch.arange(3, 23).reshape(1, 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return gemq.load(write_packed(tmp_path_factory.mktemp("packed") / "olmoe"))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [by_pickle, by_torch, copy.deepcopy])
def test_a_copy_computes_the_same(model, copied):
    model_copy = copied(model)
    experts = model_copy.model.layers[0].mlp.experts
    assert type(experts) is type(model.model.layers[0].mlp.experts)
    assert experts.down_proj.codes.data_ptr() != model.model.layers[0].mlp.experts.down_proj.codes.data_ptr()
    assert torch.equal(logits(model_copy), logits(model))


def test_another_process_unpickles_it(model, tmp_path):
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = f"""
import pickle, torch
torch.set_num_threads(1)
model = pickle.load(open({str(tmp_path / "model.pickle")!r}, "rb"))
with torch.no_grad():
    print(model(torch.arange(3, 23).reshape(1, 20)).logits.float().sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == logits(model).float().sum().item()
