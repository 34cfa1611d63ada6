"""The built-in model, packed at mixed widths, generates the same tokens with Triton's kernels and with the reference.

Kernels run in Triton's interpreter; ``tests/gpu`` has the same test on a GPU. Only the first layers are used.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

import gemq
from gemq.kernels import dispatch
from gemq.recipe import Recipe
from support.cli import write_first_layers
from support.packed_cases import few_programs

pytest.importorskip("triton", reason="torch for CPUs comes without it")
from gemq.kernels.decode import launch

NEW = 2
LAYERS = 2


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("packed")
    model, out = write_first_layers(base / "model", LAYERS), base / "out"
    quick = {"effort": "low", "num_windows": 2, "seq_len": 32, "quantizer": "rtn", "reconstruct": False, "guard": False}
    recipe = Recipe.from_dict({**quick, "bits": 2.0, "calibration": [str(Path(__file__))]})
    gemq.quantize(str(model), recipe, out=out, device="cpu")
    return out


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has this test for GPUs")
def test_kernels_and_reference_write_the_same_tokens(packed, monkeypatch):
    model = gemq.load(packed, dtype=torch.float32)
    ids = torch.tensor([[40]])
    monkeypatch.setattr(launch, "tensor_core_config", partial(few_programs, block_rows=128))
    generated = []
    for mode in ("triton", "reference"):
        monkeypatch.setattr(dispatch, "mode", mode)
        new = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        generated.append(new.tolist())
    assert generated[0] == generated[1]
