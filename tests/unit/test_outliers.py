"""A variant with outliers has other weights and the logits of its model, for each family that it knows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gemq.errors import UserError
from outliers import Outliers, has_equal_logits, write_variant
from support.model_folders import edit_tensors, model_folder

ALL_KINDS = Outliers(channels=5, neurons=3, values=6, channel_exponents=(4, -6, 8), value_exponents=(5, -3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_a_variant_has_other_weights_and_equal_logits(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model, out = model_folder(tmp_path / "model", family, dtype), tmp_path / "variant"
    write_variant(model, out, ALL_KINDS)  # compares the logits
    original, changed = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    names = {name.split(".")[-2] for name in original if not torch.equal(original[name], changed[name])}
    assert original.keys() == changed.keys()
    assert names >= {"input_layernorm", "post_attention_layernorm", "gate", "o_proj"}
    assert names >= {"up_proj", "gate_proj", "down_proj"} or names >= {"w1", "w2", "w3"}
    assert names.isdisjoint({"embed_tokens", "norm", "lm_head"})
    assert {file.name for file in model.iterdir()} == {file.name for file in out.iterdir()}


def test_each_seed_has_its_outliers_and_each_expert_its_neurons(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    weights = []
    for index, seed in enumerate((0, 0, 1)):
        write_variant(model, tmp_path / str(index), Outliers(seed=seed), check=False)
        weights.append(load_file(tmp_path / str(index) / "model.safetensors"))
    first, same, different = (tensors["model.layers.1.input_layernorm.weight"] for tensors in weights)
    assert torch.equal(first, same)
    assert not torch.equal(first, different)
    original = load_file(model / "model.safetensors")
    norm = "model.layers.1.input_layernorm.weight"
    factors = (weights[0][norm] / original[norm]).sort(descending=True).values
    assert factors.tolist() == [256, 256, 64, 64, 32, 32, 16, 16] + [1] * (len(factors) - 8)

    def neurons(expert: int) -> list[int]:
        # The columns of down say which neurons are outliers: rows of up are scaled by channel as well.
        name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        return (weights[0][name] != original[name]).any(0).nonzero().flatten().tolist()

    assert len(neurons(0)) == len(neurons(1)) == 2
    assert neurons(0) != neurons(1)


def test_what_cannot_keep_its_function_is_refused(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model", dtype=torch.float16)
    with pytest.raises(UserError, match=r"exactly in torch\.float16"):
        write_variant(model, tmp_path / "out", Outliers(channel_exponents=(20,)))
    unknown = Path(shutil.copytree(model, tmp_path / "unknown"))
    edit_tensors(unknown, lambda t: {n.replace("v_proj", "wv"): tensor for n, tensor in t.items()})
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.wv\.weight is unknown"):
        write_variant(unknown, tmp_path / "out", Outliers())
    assert not (tmp_path / "out").exists()


def test_other_logits_are_noticed(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    changed = Path(shutil.copytree(model, tmp_path / "changed"))
    up = "model.layers.0.mlp.experts.0.up_proj.weight"
    edit_tensors(changed, lambda tensors: tensors | {up: tensors[up] * (1 + 2**-20)})
    assert has_equal_logits(model, model)
    assert not has_equal_logits(model, changed)
