"""What a packed linear shows as its weight: enough for adapters to attach, nothing to read or write."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gemq.checkpoint.packing import PackedMatrix
from gemq.kernels.packed import PackedLinear
from gemq.quant.gptq import round_to_nearest
from gemq.quant.grid import Quantized

torch.set_num_threads(1)


def packed(bits: float) -> PackedLinear:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=False)
    quantized = round_to_nearest(linear.weight.detach()[None], (bits,), 32)
    matrix = PackedMatrix.pack(Quantized(*(t[0] for t in quantized)), bits, 32)
    return PackedLinear.from_linear(linear, PackedMatrix(*(t[0] for t in matrix)), bits, 32)


@pytest.mark.parametrize("bits", [2.0, 4.0, 8.0])
def test_only_device_and_shape_can_be_asked_for(bits):
    weight = packed(bits).weight
    assert weight.device == torch.device("cpu")
    assert tuple(weight.shape) == (32, 64)
    assert not weight.is_floating_point()
    for use in (
        lambda: weight.data,
        lambda: weight.clone(),
        lambda: weight + 1.0,
        lambda: weight.to(torch.float32),
        lambda: weight.add_(1),
        lambda: torch.linalg.norm(weight),
        lambda: weight.detach(),
        lambda: setattr(weight, "data", torch.zeros(32, 64)),
    ):
        with pytest.raises(RuntimeError, match="gemq export --dense"):
            use()


@pytest.mark.parametrize("bits", [4.0, 8.0])
@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_is_never_lost_by_merging(bits, safe):
    """At 8 bits codes have the shape of weights, and took what was added to them for codes."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q"], init_lora_weights=False)
    model = peft.get_peft_model(nn.ModuleDict({"q": packed(bits), "norm": nn.LayerNorm(4)}), config)
    layer = model.base_model.model["q"]
    x = torch.randn(3, 64)
    before = layer(x)
    with pytest.raises(RuntimeError, match="cannot be read or written as numbers, nor take up an adapter"):
        model.merge_and_unload(safe_merge=safe)
    assert torch.equal(layer(x), before)


def test_adapters_that_compute_with_the_weights_are_refused():
    peft = pytest.importorskip("peft")
    with pytest.raises(RuntimeError, match="cannot be read or written as numbers"):
        peft.get_peft_model(
            nn.ModuleDict({"q": packed(8.0), "norm": nn.LayerNorm(4)}),
            peft.LoraConfig(r=4, target_modules=["q"], use_dora=True),
        )
