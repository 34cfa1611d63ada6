"""Weights beyond what scales reach: balanced where that is exact, else said or refused."""

from __future__ import annotations

import pytest
import torch

import gemq
from gemq import UserError
from gemq.models.balance import MAX_LARGEST_WEIGHT, MIN_LARGEST_WEIGHT, balance
from gemq.models.experts_adapter import adopt_experts
from gemq.models.structure import find_structure
from gemq.quant.grid import below_scales, largest_weights
from support.families import tiny, tokens
from support.model_folders import edit_tensors, model_folder, quantize

pytestmark = pytest.mark.sample
torch.set_num_threads(1)
CPU = torch.device("cpu")


def experts_of(family: str):
    model = tiny(family)
    adopt_experts(model)
    experts = next(layer.experts for _, layer in find_structure(model).moe_layers)
    return model, model.get_submodule(experts.path)


def change_experts(power: int, *experts: int):
    """Changes that leave the function as it is: up 2^-power, down 2^power times as large, of all or some experts."""

    def change(tensors):
        for name, tensor in tensors.items():
            if ".experts." in name and (not experts or int(name.split(".experts.")[1].split(".")[0]) in experts):
                tensors[name] = tensor * 2.0 ** (-power if "up_proj" in name else power if "down_proj" in name else 0)

    return change


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v2", "llama4_text"])
def test_balanced_experts_compute_the_same_to_the_bit(family):
    model, module = experts_of(family)
    with torch.no_grad():
        dim = -1 if module.is_transposed else -2
        size = module.gate_up_proj.shape[dim] // 2
        module.gate_up_proj[1].narrow(dim if dim == -1 else 0, size, size).mul_(2.0**-20)
        module.down_proj[1].mul_(2.0**20)
        module.gate_up_proj[2].narrow(dim if dim == -1 else 0, size, size).mul_(2.0**15)
        gate_up, down = module.gate_up_proj.clone(), module.down_proj.clone()
        expected = model(input_ids=tokens(), use_cache=False).logits
        assert balance(module, module.gate_up_proj, module.down_proj)
        assert torch.equal(model(input_ids=tokens(), use_cache=False).logits, expected)
        changed = (module.gate_up_proj != gate_up).flatten(1).any(1)
        assert changed.tolist() == [False, True, True, *[False] * (len(gate_up) - 3)]
        assert torch.equal(module.down_proj[0], down[0])
        for weights in (module.gate_up_proj, module.down_proj):
            assert (largest_weights(weights) > MIN_LARGEST_WEIGHT).all()
            assert (largest_weights(weights[1:2]) < MAX_LARGEST_WEIGHT).all()
        assert not balance(module, module.gate_up_proj[:2], module.down_proj[:2])


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h"])
def test_experts_whose_function_would_change_are_left_alone(family):
    """Biases and clamps of gpt-oss, no gate in Nemotron-H."""
    _, module = experts_of(family)
    gate_up = (module.gate_up_proj if module.has_gate else module.up_proj).data.mul_(2.0**-20)
    down = module.down_proj.data.mul_(2.0**20)
    original = gate_up.clone(), down.clone()
    assert not balance(module, gate_up, down)
    assert torch.equal(gate_up, original[0])
    assert torch.equal(down, original[1])


def test_experts_without_weights_are_left_alone():
    _, module = experts_of("olmoe")
    module.gate_up_proj.data[1] = 0
    module.down_proj.data[2] = 0
    assert not balance(module, module.gate_up_proj.data, module.down_proj.data)


@pytest.mark.parametrize(("power", "experts"), [(20, ()), (-24, (1, 4))])
def test_the_same_function_gives_the_same_packed_model(power, experts, tmp_path):
    """Grids are the same in every octave. Without balance, weights beyond the range are clipped."""
    logits = []
    for name in ("plain", "changed"):
        source = model_folder(tmp_path / name / "model")
        if name == "changed":
            edit_tensors(source, change_experts(power, *experts))
        result = quantize(source, bits=8, widths=(8,), dense_bits=8)
        assert result.fallbacks["matrices_too_small_for_scales"] == 0
        packed = gemq.load(source.parent / "out", dtype=torch.float32)
        with torch.no_grad():
            logits.append(packed(input_ids=tokens(2, 20)).logits)
    assert torch.allclose(*logits, rtol=1e-4, atol=1e-4)


def test_small_matrices_are_counted_and_large_ones_refused(tmp_path):
    source = model_folder(tmp_path / "model")

    def shrink(tensors):
        tensors["model.layers.1.self_attn.v_proj.weight"] *= 2.0**-22
        tensors["model.layers.2.self_attn.v_proj.weight"] *= 0  # nothing is lost of it

    def grow(tensors):
        tensors["model.layers.1.self_attn.o_proj.weight"] *= 2.0**20

    edit_tensors(source, shrink)
    assert quantize(source).fallbacks["matrices_too_small_for_scales"] == 1
    large = model_folder(tmp_path / "more" / "model")
    edit_tensors(large, grow)
    with pytest.raises(UserError, match=r"^model\.layers\.1\.self_attn\.o_proj has weights that are too large"):
        quantize(large)


def test_matrices_below_the_range_of_scales():
    weight = torch.ones(4, 2, 16)
    weight[1] *= 2.0**-18
    weight[2] *= 0
    weight[3, 0] *= 2.0**-30
    assert below_scales(weight) == 1
