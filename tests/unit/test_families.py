"""A few families the whole way, one for everything that sets families apart. ``make conformance`` takes them all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from support.family_check import check, families

torch.set_num_threads(1)

WORK = {
    "gpt_oss": "transposed, biased, interleaved experts",
    "llama4_text": "experts that are given every token's row, no interface of Transformers",
    "longcat_flash": "experts that return their input, two attentions a layer",
    "glm_moe_dsa": "layers that hand chosen positions on to the next",
    "inkling_text": "shared experts stacked in one weight",
    "granitemoehybrid": "state-space layers",
    "qwen3_vl_moe": "a language model that sees: eyes are kept",
}
REFUSED = {
    "jetmoe": r"layers\.0\.mlp\.input_linear \(JetMoeParallelExperts\)",
    "switch_transformers": "no encoder-decoders",
    "diffusion_gemma": "is an encoder-decoder model",
}


@pytest.mark.parametrize("model_type", WORK)
def test_goes_the_whole_way(model_type, tmp_path: Path):
    assert check(model_type, tmp_path).status == "works"


@pytest.mark.parametrize("model_type", REFUSED)
def test_is_refused_before_anything_is_written(model_type, tmp_path: Path):
    outcome = check(model_type, tmp_path)
    assert outcome.status == "refused"
    assert re.search(REFUSED[model_type], outcome.reason)


def test_every_decorated_family_is_on_the_list():
    types_by_family = families()
    assert {"mixtral", "gpt_oss", "llama4", "dbrx", "qwen3_vl_moe", "switch_transformers"} <= types_by_family.keys()
    assert len(types_by_family) > 55
    assert types_by_family["llama4"] == ["llama4", "llama4_text"]
