"""What a config.json claims is compared with the weights beside it before a model is built."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from gemq import UserError
from gemq.models.size_limits import bounded_construction, check_source_sizes
from gemq.models.source import Source
from support.packed_checkpoints import olmoe_config


@pytest.fixture
def source(tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(olmoe_config()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def with_config(directory, **changes):
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, **changes}))
    return directory


def test_a_model_as_it_was_saved_is_fine(source):
    check_source_sizes(source)
    assert sum(p.numel() for p in Source(source).skeleton().parameters()) > 0


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_labels", "num_experts", "num_attention_heads"])
@pytest.mark.parametrize("value", [10**6, 10**9, 10**13, -(10**9)])
def test_large_counts_are_refused_before_transformers_sees_them(source, key, value):
    with pytest.raises(UserError, match=rf"has {key} = {abs(value)}, more than its weights can hold"):
        Source(with_config(source, **{key: value})).config()


@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", 60_000), ("vocab_size", 10**13), ("hidden_size", 10**9)]
)
def test_a_model_that_grows_beyond_its_weights_is_refused_while_it_is_built(source, key, value):
    with pytest.raises(UserError, match="describes a larger model than its weights"):
        Source(with_config(source, **{key: value})).skeleton()


def test_without_weights_counts_have_a_fixed_bound(source):
    (source / "model.safetensors").unlink()
    check_source_sizes(source)
    with pytest.raises(UserError, match="more than its weights can hold"):
        check_source_sizes(with_config(source, num_hidden_layers=10**6))


def test_numbers_that_are_no_counts_may_be_large(source):
    check_source_sizes(
        with_config(
            source, rope_theta=10**10, max_position_embeddings=10**7, num_parameters=10**12, train_tokens=10**13
        )
    )


def test_nested_counts_are_found(source):
    for values in ({"vision_config": {"depth": 10**7}}, {"parts": [{"num_blocks": [10**7]}]}):
        with pytest.raises(UserError, match=r"(vision_config\.depth|parts\.num_blocks) = 10000000"):
            check_source_sizes(with_config(source, **values))


def test_construction_outside_is_not_bounded(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="larger model"), bounded_construction(tmp_path):
        torch.nn.Sequential(*(torch.nn.Identity() for _ in range(2000)))
    torch.nn.Sequential(*(torch.nn.Identity() for _ in range(2000)))
