"""Weights that are not finite are refused by name as they are read, wherever they are."""

from __future__ import annotations

import pytest
import torch

from gemq import UserError
from gemq.evaluation.evaluate import evaluate_paths
from gemq.models.finite_check import not_finite
from gemq.models.source import Source
from support.model_folders import edit_config, edit_tensors, model_folder, quantize

pytestmark = pytest.mark.sample
torch.set_num_threads(1)
CPU = torch.device("cpu")

TENSORS = [
    "model.layers.2.mlp.experts.3.up_proj.weight",
    "model.layers.0.mlp.experts.5.down_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.mlp.gate.weight",
    "model.layers.1.post_attention_layernorm.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
]


def put(name, value):
    def change(tensors):
        tensors[name].view(-1)[-1] = value

    return change


@pytest.mark.parametrize("name", TENSORS)
def test_a_value_that_is_not_finite_is_refused_by_its_tensors_name(name, tmp_path):
    source = model_folder(tmp_path / "model")
    edit_tensors(source, put(name, float("nan") if "experts" in name else float("inf")))
    with pytest.raises(UserError, match=rf"stores {name} with values that are not finite") as caught:
        quantize(source)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=rf"stores {name} with values that are not finite"):
        evaluate_paths(str(source), seq_len=16, max_windows=1, device="cpu")


def test_layers_are_looked_at_when_they_are_first_read(tmp_path):
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    source = model_folder(tmp_path / "model")
    edit_tensors(source, put(name, float("-inf")))
    _, reader = Source(source).open(CPU, torch.float32)
    reader.read(1)
    for read in (lambda: reader.read(2), lambda: reader.read_to_device(CPU, 2), lambda: reader.read(2)):
        with pytest.raises(UserError, match=f"stores {name} with values that are not finite"):
            read()
    assert reader.read(2, {n for n in reader.names_by_layer[2] if "experts" in n})  # what is read of it is finite


def test_values_beyond_the_type_that_a_model_is_loaded_in_are_refused(tmp_path):
    """70,000 is a float32, and infinity in float16, which config.json names."""
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    source = model_folder(tmp_path / "model")
    edit_tensors(source, put(name, 70_000.0))
    Source(source).open(CPU, torch.float32)[1].read(1)
    edit_config(source, dtype="float16")
    _, reader = Source(source).open(CPU, torch.float32)
    with pytest.raises(UserError, match=r"experts\.down_proj with values that are not finite in float16, the type"):
        reader.read(1)


def test_codes_that_mean_nan_are_refused(tmp_path):
    source = model_folder(tmp_path / "model", "deepseek_v3", torch.bfloat16)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"

    def change(tensors):
        for n in [n for n in tensors if n.endswith("up_proj.weight")]:
            tensors[n] = tensors[n].to(torch.float8_e4m3fn)
            tensors[f"{n}_scale_inv"] = torch.ones(1, 1)
        tensors[name].view(torch.uint8)[0, 0] = 0x7F

    edit_tensors(source, change)
    edit_config(source, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    _, reader = Source(source).open(CPU, torch.float32)
    with pytest.raises(UserError, match=f"stores {name} with values that are not finite"):
        reader.read(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_type_is_looked_at(dtype):
    largest = torch.finfo(dtype).max
    tensors = {
        "fine": torch.tensor([largest, -largest, 0.0], dtype=dtype),
        "nan": torch.tensor([[0.0, float("nan")], [1.0, 2.0]], dtype=dtype),
        "infinite": torch.tensor([float("-inf")], dtype=dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
        "integers": torch.tensor([2**40]),
        "one": torch.tensor(1.0, dtype=dtype),
    }
    assert not_finite(tensors) == ["nan", "infinite"]
    assert not_finite(tensors, {"one": 0.5, "fine": largest}) == ["nan", "infinite", "one"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.self_attn.q_norm.weight", "activations overflow, so that its Hessians are not finite"),
        ("model.norm.weight", "computes logits that are not finite"),
    ],
)
def test_finite_weights_that_make_a_model_overflow_are_refused_in_one_line(name, message, tmp_path):
    source = model_folder(tmp_path / "model")
    edit_tensors(source, put(name, 3e38))
    with pytest.raises(UserError, match=message) as caught:
        quantize(source)
    assert "\n" not in str(caught.value)
