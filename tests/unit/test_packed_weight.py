"""The weight of a packed linear reads as the dequantized one and cannot be written to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gemq.kernels.modules import PackedLinear
from gemq.quant.gptq import round_to_nearest
from gemq.quant.packing import PackedMatrix
from gemq.quant.widths import Width

torch.set_num_threads(1)


def packed(width: Width) -> PackedLinear:
    """Return a packed linear with random weights."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=False)
    quantized = round_to_nearest(linear.weight.detach()[None], (width,), 32)
    return PackedLinear.from_linear(linear, PackedMatrix.pack(quantized.select((0, 0)), width))


@pytest.mark.parametrize("width", [Width.TWO_BIT, Width.FOUR_BIT, Width.EIGHT_BIT])
def test_reads_as_the_dequantized_weight(width):
    linear = packed(width)
    exact = linear.dequantize(torch.float32)
    weight = linear.weight
    assert (weight.device, weight.dtype, tuple(weight.shape)) == (exact.device, torch.float32, (32, 64))
    x = torch.randn(3, 64)
    for result, expected in (
        (weight.data.clone(), exact),
        (weight + 1.0, exact + 1.0),
        (1.0 - weight, 1.0 - exact),
        (weight.to(torch.bfloat16), exact.bfloat16()),
        (torch.linalg.norm(weight.detach(), dim=1), exact.norm(dim=1)),
        (torch.cat([weight, weight]), torch.cat([exact, exact])),
        (nn.functional.linear(x, weight), x @ exact.T),
        (weight[3:5].T, exact[3:5].T),
    ):
        assert type(result) is torch.Tensor
        assert torch.allclose(result, expected, atol=1e-6)
    assert torch.equal(linear.dequantize(torch.float32), exact)


@pytest.mark.parametrize(
    "write",
    [
        lambda linear: linear.weight.add_(1),
        lambda linear: linear.weight.data.copy_(torch.zeros(32, 64)),
        lambda linear: linear.weight.__setitem__(0, 1.0),
        lambda linear: setattr(linear.weight, "data", torch.zeros(32, 64)),
        lambda linear: torch.add(torch.zeros(32, 64), 1.0, out=linear.weight),
        lambda linear: nn.init.normal_(linear.weight),
        lambda linear: linear.weight.data.__iadd__(1.0),
    ],
)
def test_writing_raises(write):
    linear = packed(Width.EIGHT_BIT)
    codes = linear.codes.clone()
    with pytest.raises(RuntimeError, match="gemq export --dense"):
        write(linear)
    assert torch.equal(linear.codes, codes)


@pytest.mark.parametrize("width", [Width.FOUR_BIT, Width.EIGHT_BIT])
@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_is_never_lost_by_merging(width, safe):
    """At 8 bits, codes have the shape of weights, and merging once added the adapter to the codes."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q"], init_lora_weights=False)
    model = peft.get_peft_model(nn.ModuleDict({"q": packed(width), "norm": nn.LayerNorm(4)}), config)
    layer = model.base_model.model["q"]
    x = torch.randn(3, 64)
    expected = layer(x)
    with pytest.raises(RuntimeError, match="read-only, so no adapter can be merged into it"):
        model.merge_and_unload(safe_merge=safe)
    assert torch.equal(layer(x), expected)


def test_adapters_can_read_the_weights():
    """DoRA scales by the norms of the weights. At 8 bits, it once used the norms of the codes."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q"], use_dora=True)
    linear = packed(Width.EIGHT_BIT)
    model = peft.get_peft_model(nn.ModuleDict({"q": linear, "norm": nn.LayerNorm(4)}), config)
    layer = model.base_model.model["q"]
    norms = linear.dequantize(torch.float32).norm(dim=1)
    assert torch.allclose(layer.lora_magnitude_vector["default"].weight, norms)
    x = torch.randn(3, 64)
    assert torch.allclose(layer(x), linear(x), atol=1e-5)
    layer(x).sum().backward()
    assert layer.lora_magnitude_vector["default"].weight.grad.abs().max() > 0
