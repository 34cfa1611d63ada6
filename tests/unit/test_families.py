"""A few families the whole way, one for everything that sets families apart. ``make conformance`` takes them all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from support.families import KINDS, REFUSED_KINDS
from support.family_check import check, families

torch.set_num_threads(1)


@pytest.mark.parametrize("model_type", KINDS)
def test_goes_the_whole_way(model_type, tmp_path: Path):
    assert check(model_type, tmp_path).status == "works"


@pytest.mark.parametrize("model_type", REFUSED_KINDS)
def test_is_refused_before_anything_is_written(model_type, tmp_path: Path):
    outcome = check(model_type, tmp_path)
    assert outcome.status == "refused"
    assert re.search(REFUSED_KINDS[model_type], outcome.reason)


def test_every_decorated_family_is_on_the_list():
    types_by_family = families()
    assert {"mixtral", "gpt_oss", "llama4", "dbrx", "qwen3_vl_moe", "switch_transformers"} <= types_by_family.keys()
    assert len(types_by_family) > 55
    assert types_by_family["llama4"] == ["llama4", "llama4_text"]
