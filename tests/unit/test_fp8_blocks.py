"""FP8 originals whose matrices end in a part of a block: rows and columns that 128 does not divide."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import gemq
from gemq import UserError
from gemq.models.fp8 import BlockDequantize
from gemq.models.source import Source
from support.model_folders import edit_config, edit_tensors, model_folder, quantize

pytestmark = pytest.mark.sample
torch.set_num_threads(1)
CPU = torch.device("cpu")
BLOCK = 128


def to_fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, a scale for each block, and what they mean, block by block as DeepSeek's script does."""
    (rows, columns), (height, width) = weight.shape, block
    codes = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
    scales, meant = torch.zeros(-(-rows // height), -(-columns // width)), torch.zeros(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block_slice = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
            scales[i, j] = weight[block_slice].float().abs().max() / 448
            codes[block_slice] = (weight[block_slice].float() / scales[i, j]).to(torch.float8_e4m3fn)
            meant[block_slice] = codes[block_slice].float() * scales[i, j]
    return codes, scales, meant


def operation(block: tuple[int, int] | None = (BLOCK, BLOCK)) -> BlockDequantize:
    return BlockDequantize(SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=block)))


@pytest.mark.parametrize("rows", [64, 128, 192, 320, 448, 576])
@pytest.mark.parametrize("columns", [96, 128, 320])
def test_any_shape_is_dequantized_by_its_blocks(rows, columns):
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 1, rows).unsqueeze(1)
    codes, scales, meant = to_fp8(weight, (BLOCK, BLOCK))
    assert torch.equal(operation()._dequantize_one(codes, scales, torch.float32), meant)
    stacked = operation()._dequantize_one(torch.stack([codes, codes]), torch.stack([scales, 2 * scales]), torch.float32)
    assert torch.equal(stacked, torch.stack([meant, 2 * meant]))


def test_scales_of_rows_of_matrices_and_of_other_blocks():
    codes = torch.randn(320, 64).to(torch.float8_e4m3fn)
    rows = torch.rand(320)
    expected = codes.float() * rows.unsqueeze(1)
    for scales in (rows, rows.unsqueeze(1)):
        assert torch.equal(operation()._dequantize_one(codes, scales, torch.float32), expected)
        assert torch.equal(operation(None)._dequantize_one(codes, scales, torch.float32), expected)
    for scales in (torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]])):
        assert torch.equal(operation()._dequantize_one(codes, scales, torch.float32), codes.float() * 0.5)
    small, scales, meant = to_fp8(torch.randn(320, 64), (1, 32))  # as experts of DeepSeek-V4 are scaled
    assert torch.equal(operation()._dequantize_one(small, scales, torch.float32), meant)
    experts = torch.stack([codes, codes])
    weights = operation()._dequantize_one(experts, torch.tensor([0.5, 2.0]), torch.float32)
    assert torch.equal(weights, experts.float() * torch.tensor([0.5, 2.0]).view(2, 1, 1))


@pytest.mark.parametrize("shape", [(6, 1), (2, 3), (7,), (0, 1)])
def test_scales_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="scales for"):
        operation()._dequantize_one(torch.zeros(320, 128, dtype=torch.float8_e4m3fn), torch.ones(shape), torch.float32)


SIZES = {"hidden_size": 128, "intermediate_size": 128, "q_lora_rank": 128, "head_dim": 32, "v_head_dim": 32}
"""Of a DeepSeek-V3 whose other matrices are whole blocks."""


@pytest.fixture
def fp8(tmp_path):
    """A DeepSeek-V3 with experts of 192 rows and kv_a_proj_with_mqa of 160 + 32, and what it means."""
    sizes = {**SIZES, "kv_lora_rank": 160, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "moe_intermediate_size": 192}
    source = model_folder(tmp_path / "model", "deepseek_v3", torch.bfloat16, **sizes)
    meant = {}

    def change(tensors):
        stored = {}
        for name, tensor in tensors.items():
            stored[name] = meant[name] = tensor
            if name.endswith(("proj.weight", "mqa.weight")) and "layers" in name:
                stored[name], stored[f"{name}_scale_inv"], exact = to_fp8(tensor, (BLOCK, BLOCK))
                meant[name] = exact.bfloat16()
        return stored

    edit_tensors(source, change)
    method = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    edit_config(source, quantization_config=method)
    return source, meant


def test_models_are_read_by_blocks_whole_and_by_layer(fp8, tmp_path):
    source, meant = fp8
    plain = tmp_path / "plain"
    model_folder(plain, "deepseek_v3", torch.bfloat16, **SIZES)
    (plain / "config.json").write_text((source / "config.json").read_text())
    edit_config(plain, "quantization_config")
    edit_tensors(plain, lambda _: meant)
    expected, _ = Source(plain).load(CPU, None)
    loaded, _ = Source(source).load(CPU, None)
    assert any("kv_a_proj_with_mqa" in name for name in meant)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in expected.state_dict().items())
    _, reader = Source(source).open(CPU, torch.float32)
    for index in range(len(reader.names_by_layer)):
        for name, tensor in reader.read(index).items():
            assert torch.equal(tensor, expected.state_dict()[name]), name
    quantize(source, bits=8, widths=(8,), dense_bits=8)
    packed = gemq.load(source.parent / "out", dtype=torch.float32)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits.log_softmax(-1) for m in (expected.float(), packed))
    assert (p.exp() * (p - q)).sum(-1).mean() < 0.03  # 8 bits; blocks of 96 rows give 0.4


DAMAGES = {
    "no scales": (
        lambda t: {n: x for n, x in t.items() if not n.endswith("experts.1.up_proj.weight_scale_inv")},
        r"stores \S+experts\.1\.up_proj\.weight as float8_e4m3fn without scales",
    ),
    "scales of a weight": (
        lambda t: {**t, "model.layers.0.self_attn.o_proj.weight": torch.ones(128, 128).bfloat16()},
        r"stores model\.layers\.0\.self_attn\.o_proj\.weight as bfloat16 though it stores scales for it",
    ),
    "too many scales": (
        lambda t: {n: torch.ones(5, 1) if "kv_a_proj_with_mqa.weight_scale" in n else x for n, x in t.items()},
        r"cannot make \S+kv_a_proj_with_mqa\.weight of \S+ from 2 stored tensors \(ValueError: 5 scales for",
    ),
    "scales of another kind": (
        lambda t: {n.replace("weight_scale_inv", "weight_scale"): x for n, x in t.items()},
        r"stores \S+ as float8_e4m3fn without scales",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_codes_whose_scales_are_not_as_they_should_be_are_refused(case, fp8):
    source, _ = fp8
    change, message = DAMAGES[case]
    edit_tensors(source, change)
    with pytest.raises(UserError, match=message) as caught:
        Source(source).open(CPU, torch.float32)
    assert "\n" not in str(caught.value)
