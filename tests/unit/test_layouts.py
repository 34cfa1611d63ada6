"""How families lie on disk: hub names, shards, tied embeddings, FP8 and MXFP4 originals, multi-token prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

import gemq
from gemq import UserError
from gemq.models.source import Source, configured_types
from gemq.recipe import Recipe
from support.families import random_model, tiny_config, tokens
from support.plain_reader import read_files
from support.tokenizer import save_tokenizer

pytestmark = pytest.mark.sample
torch.set_num_threads(1)
CPU = torch.device("cpu")
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
"""The values of a 4-bit float with two bits of exponent and one of mantissa."""


def quantized(source: Path) -> tuple[Any, Any]:
    """The packed model of a source, read back, and what ``quantize`` said."""
    text = source.parent / "text.txt"
    text.write_text("".join(chr(33 + i * i % 93) for i in range(400)))
    recipe = Recipe(effort="low", bits=2.0, calibration=(str(text),), num_windows=4, seq_len=24, guard=False)
    result = gemq.quantize(str(source), recipe, out=source.parent / "out", device="cpu")
    return gemq.load(source.parent / "out", dtype=torch.float32), result


@pytest.mark.parametrize("layout", ["hub names in shards", "fused", "tied"])
def test_mixtral_on_disk(layout, tmp_path):
    model = random_model(tiny_config("mixtral", tie_word_embeddings=layout == "tied"))
    source = tmp_path / "model"
    if layout == "fused":
        source.mkdir()
        model.config.save_pretrained(source)
        save_file(dict(model.state_dict()), source / "model.safetensors", metadata={"format": "pt"})
    else:
        model.save_pretrained(source, max_shard_size="100KB" if "shards" in layout else "1GB")
    names = set(read_files(source))
    assert ("model.layers.0.block_sparse_moe.experts.3.w2.weight" in names) == (layout != "fused")
    assert ("model.layers.0.mlp.experts.gate_up_proj" in names) == (layout == "fused")
    assert (source / "model.safetensors.index.json").exists() == ("shards" in layout)
    assert ("lm_head.weight" in names) == (layout != "tied")
    read, _ = Source(source).load(CPU, None)
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.get_parameter(name), tensor), name


def to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales by block of 128 x 128, and what they mean in float32."""
    blocks = weight.float().unflatten(0, (-1, 128)).unflatten(2, (-1, 128))  # [R, 128, C, 128]
    scales = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    meant = codes.float() * scales[:, None, :, None]
    return codes.reshape(weight.shape), scales, meant.reshape(weight.shape)


@pytest.fixture
def fp8(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A DeepSeek-V3 as published: linears in layers in FP8 by blocks, gates and embeddings in bfloat16."""
    config = tiny_config(
        "deepseek_v3",
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=128,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        head_dim=32,
        v_head_dim=32,
    )
    source = tmp_path / "model"
    random_model(config, dtype=torch.bfloat16).save_pretrained(source)
    save_tokenizer(source)
    stored, meant = {}, {}
    for name, tensor in read_files(source).items():
        stored[name] = meant[name] = tensor
        if name.endswith("proj.weight") and not any(n % 128 for n in tensor.shape):
            stored[name], stored[f"{name}_scale_inv"], meant[name] = to_fp8(tensor)
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((source / "config.json").read_text())
    described["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (source / "config.json").write_text(json.dumps(described))
    return source, meant


def test_fp8_originals_are_dequantized_on_reading(fp8):
    source, meant = fp8
    model, stored = Source(source).load(CPU, None)
    expected = AutoModelForCausalLM.from_pretrained(source, quantization_config=FineGrainedFP8Config(dequantize=True))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    layer = "model.layers.1.mlp"
    gate_up = torch.stack(
        [torch.cat([meant[f"{layer}.experts.{e}.{p}_proj.weight"] for p in ("gate", "up")]) for e in range(4)]
    )
    assert torch.equal(model.get_parameter(f"{layer}.experts.gate_up_proj"), gate_up.bfloat16())
    name = f"{layer}.shared_experts.down_proj.weight"
    assert torch.equal(model.get_parameter(name), meant[name].bfloat16())
    # since Transformers 5.24 routers stay in float32
    wide = {n for n, t in read_files(source).items() if t.dtype == torch.float32 and not n.endswith("_scale_inv")}
    assert {name for name, dtype in stored.items() if dtype == torch.float32} == wide & stored.keys()
    assert set(stored.values()) <= {torch.bfloat16, torch.float32}
    assert configured_types(Source(source).skeleton()).keys() == stored.keys()


def test_fp8_originals_go_the_whole_way(fp8):
    loaded, result = quantized(fp8[0])
    assert not any("scale_inv" in name for name in read_files(result.out))
    assert "fp8" not in (result.out / "config.json").read_text()
    assert loaded(tokens()).logits.isfinite().all()
    assert result.fallbacks["matrices_left_out"] == 0


@pytest.fixture
def mxfp4(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A gpt-oss as published: experts in blocks of 32 four-bit floats, two a byte, with a power of two each."""
    config = tiny_config("gpt_oss", intermediate_size=64)
    source = tmp_path / "model"
    model = random_model(config, dtype=torch.bfloat16)
    model.save_pretrained(source)
    save_tokenizer(source)
    stored, meant = read_files(source), {}
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in stored if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        count, columns, rows = stored.pop(name).shape
        blocks = torch.randint(0, 256, (count, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 125, (count, rows, columns // 32), generator=generator, dtype=torch.uint8)
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
        values = torch.tensor(E2M1)[torch.stack([blocks & 15, blocks >> 4], -1).int()].flatten(-2)
        exact = values * torch.exp2(scales.float() - 127).unsqueeze(-1)
        meant[name] = exact.flatten(-2).transpose(1, 2)
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((source / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (source / "config.json").write_text(json.dumps(described))
    return source, meant


def test_mxfp4_originals_are_dequantized_on_reading(mxfp4):
    source, meant = mxfp4
    model, stored = Source(source).load(CPU, None)
    expected = AutoModelForCausalLM.from_pretrained(source, quantization_config=Mxfp4Config(dequantize=True))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert len(meant) == 4
    for name, tensor in meant.items():
        assert torch.equal(model.get_parameter(name), tensor.bfloat16()), name
    assert set(stored.values()) == {torch.bfloat16}


def test_mxfp4_originals_go_the_whole_way(mxfp4):
    loaded, result = quantized(mxfp4[0])
    assert not any(name.endswith(("_blocks", "_scales")) for name in read_files(result.out))
    assert loaded(tokens()).logits.isfinite().all()


def test_other_quantizations_are_refused(fp8):
    source, _ = fp8
    described = json.loads((source / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (source / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"quantized already \(awq\): give the full-precision model"):
        Source(source).config()


@pytest.mark.parametrize("layer", [3, 61])
def test_layers_for_predicting_several_tokens_are_reported(layer, tmp_path):
    """Transformers is silent on those of layer 61, by name, and says others are unexpected. Either way they count."""
    source = tmp_path / "model"
    random_model(tiny_config("deepseek_v3")).save_pretrained(source)
    save_tokenizer(source)
    stored = read_files(source)
    extra = {"eh_proj.weight": torch.ones(64, 128), "enorm.weight": torch.ones(64), "embed.weight": torch.ones(320, 64)}
    stored.update({f"model.layers.{layer}.{name}": tensor for name, tensor in extra.items()})
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    _, result = quantized(source)
    assert result.fallbacks["matrices_left_out"] == 2
