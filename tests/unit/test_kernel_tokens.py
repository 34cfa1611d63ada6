"""The built-in model, packed at mixed widths, writes the same tokens through Triton's kernels as through the reference.

In the interpreter, so without a GPU; ``tests/gpu`` has the same on one.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from packed_cases import few_programs

import gemq
from gemq import kernels
from gemq.assets import builtin_model
from gemq.recipe import Recipe

pytest.importorskip("triton", reason="torch for CPUs comes without it")
from gemq.kernels import launch

NEW = 2


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    quick = {"effort": "low", "windows": 2, "window": 32, "quantizer": "rtn", "refine": False, "guard": False}
    recipe = Recipe.from_dict({**quick, "bits": 2.0, "calib": [str(Path(__file__))]})
    gemq.quantize(str(builtin_model()), recipe, out=out, device="cpu")
    return out


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has it on a GPU")
def test_kernels_and_reference_write_the_same_tokens(packed, monkeypatch):
    model = gemq.load(packed, dtype=torch.float32)
    ids = torch.tensor([[40]])
    monkeypatch.setattr(launch, "config_for", partial(few_programs, block_rows=128))
    written = []
    for mode in ("triton", "reference"):
        monkeypatch.setattr(kernels, "mode", mode)
        new = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        written.append(new.tolist())
    assert written[0] == written[1]
