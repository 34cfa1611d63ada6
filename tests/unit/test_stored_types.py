"""Types: what is not quantized is stored again as it was stored, and loaded in the types that Transformers gives it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import gemq
from gemq import UserError
from gemq.checkpoint.load import GemqQuantizer
from gemq.models.source import Source
from gemq.pipeline.plan import plan
from gemq.recipe import Recipe
from support.families import FAMILIES, random_model, tiny_config
from support.family_check import families
from support.model_folders import edit_config, edit_tensors, model_folder, quantize
from support.plain_reader import read_files
from support.tokenizer import save_tokenizer

torch.set_num_threads(1)
CPU = torch.device("cpu")


def unpacked(source: Path, out: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Tensors that both have by the same name."""
    source_tensors, out_tensors = read_files(source), read_files(out)
    return {name: (source_tensors[name], out_tensors[name]) for name in source_tensors.keys() & out_tensors.keys()}


@pytest.mark.sample
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_what_is_not_quantized_is_stored_to_the_bit(stored, compute, tmp_path):
    """Whatever type the job computes with, embeddings, norms, head and routers included."""
    source = model_folder(tmp_path / "model", dtype=stored)
    quantize(source, dtype=compute, equalize=False)  # which scales norms and routers
    pairs = unpacked(source, tmp_path / "out")
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= pairs.keys()
    assert "model.layers.1.mlp.gate.weight" in pairs
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs.values())


@pytest.mark.sample
def test_types_may_differ_from_each_other_and_from_what_config_json_says(tmp_path):
    """Routers and norms in float32 beside weights in bfloat16: config.json names one type for all."""
    source = model_folder(tmp_path / "model", dtype=torch.bfloat16)
    exact = ("gate.weight", "norm.weight", "lm_head.weight")

    def widen(tensors):
        for name in [n for n in tensors if n.endswith(exact)]:
            tensors[name] = tensors[name].float() * (1 + 1e-4)

    edit_tensors(source, widen)
    edit_config(source, dtype="bfloat16")
    quantize(source, dtype="bfloat16", equalize=False)
    pairs = unpacked(source, tmp_path / "out")
    assert {a.dtype for a, _ in pairs.values()} == {torch.float32, torch.bfloat16}
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs.values())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    _, reader = Source(source).open(CPU, torch.float32)
    read = reader.read(0)["model.layers.0.mlp.gate.weight"]
    assert torch.equal(read, read_files(source)["model.layers.0.mlp.gate.weight"])


@pytest.mark.sample
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_read_without_a_type_is_as_transformers_loads_it(family, tmp_path):
    source = model_folder(tmp_path / "model", family, torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(source)
    loaded, _ = Source(source).load(CPU, None)
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].dtype == tensor.dtype, name
    assert loaded.generation_config.to_dict() == expected.generation_config.to_dict()
    assert loaded.name_or_path == str(source)


FLOAT32_FAMILIES = sorted(
    kind
    for kinds in families().values()
    for kind in kinds
    if kind
    in {"bailing_hybrid", "deepseek_v3", "deepseek_v4", "flint", "glm5_next", "hy_v4"}
    | {"inkling_text", "mistral_large4", "muse_spark_text", "nemotron_h", "qwen3_next"}
)
"""Families that keep different parameters in float32, as far as this Transformers has them."""


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.bfloat16) for family in FLOAT32_FAMILIES), (FLOAT32_FAMILIES[0], torch.float16)],
)
def test_parameters_that_a_family_keeps_in_float32_stay_so(family, dtype, tmp_path):
    """Compared with the twin, which Transformers loads alone: types of all parameters, values of those not packed."""
    source, twin = tmp_path / "model", tmp_path / "twin"
    random_model(tiny_config(family)).save_pretrained(source)
    save_tokenizer(source)
    quantize(source)
    gemq.load(tmp_path / "out")
    from gemq.checkpoint.dense_export import write_dense_checkpoint

    write_dense_checkpoint(tmp_path / "out", twin, torch.float32)
    expected = Source(twin).load(CPU, None)[0].__class__.from_pretrained(twin, dtype=dtype)
    loaded = gemq.load(tmp_path / "out", dtype=dtype)
    assert isinstance(loaded.hf_quantizer, GemqQuantizer)
    parameters = dict(loaded.named_parameters())
    for name, parameter in expected.named_parameters():
        if name in parameters and parameters[name].shape == parameter.shape:
            assert parameters[name].dtype == parameter.dtype, name
            assert torch.equal(parameters[name], parameter), name


@pytest.mark.sample
def test_a_size_is_checked_with_the_types_of_the_files_before_anything_is_computed(tmp_path):
    """Embeddings in float32, where config.json says bfloat16, take twice the bytes that the configuration promises."""
    source = model_folder(tmp_path / "model", vocab_size=4096)
    edit_config(source, dtype="bfloat16")
    plan(source, Recipe(effort="low", size=1_500_000, seq_len=24), device="cpu")
    with pytest.raises(UserError, match=r"--size .* is too small"):
        quantize(source, bits=None, size=1_500_000)
    assert not (tmp_path / "out.work").exists()
