"""Fused layers of a decode step: tokens equal those of the family's code. Layers of other forms stay as they are."""

from __future__ import annotations

import pytest
import torch

import gemq
from gemq.calibration.generation_steps import Stepper
from gemq.decoding import fused_layers
from gemq.decoding.decoder import Decoder
from gemq.kernels import dispatch, reference
from gemq.quant.grid import dequantize
from gemq.quant.packing import PackedMatrix
from gemq.quant.widths import Width
from support.families import tiny, tokens
from support.interpreted import DEVICE  # first: skips the module where triton is missing
from support.packed_checkpoints import write_packed

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(dispatch, "mode", "triton")


def decode(decoder: Decoder, ids: torch.Tensor) -> list[list[int]]:
    return [decoder.prefill(ids).tolist(), *decoder.decode(2)]


def family_and_fused(model, ids: torch.Tensor) -> tuple[list[list[int]], list[list[int]], Decoder]:
    """Tokens before and after ``prepare``, and the decoder."""
    decoder = Decoder(model, len(ids), 64)
    expected = decode(decoder, ids)
    decoder.prepare(compile_layers=False)
    return expected, decode(decoder, ids), decoder


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_unpacked_layers(family):
    """Norms of whole projections, of heads, and none; heads that share keys and values."""
    model = tiny(family).to(DEVICE)
    expected, fused, decoder = family_and_fused(model, tokens(2, 4).to(DEVICE))
    assert fused == expected
    assert decoder.fallbacks["layers_not_fused"] == 0
    layers = list(decoder._fused._layers.values())
    assert len(layers) == len(model.model.layers)
    assert all(layer.is_fused and layer.writes_in_attention for layer in layers)
    assert len(decoder._fused._routers) == len(layers)
    assert all("forward" not in vars(module) for module in model.modules())  # nothing stays behind


def test_texts_are_written_from_the_logits_of_every_step():
    """Calibration windows and texts of an evaluation are drawn from logits, which a fused step hands over as well."""
    model = tiny("olmoe").to(DEVICE)
    ids = tokens(2, 4).to(DEVICE)
    fused, plain = (Stepper(model, 64, static=static).begin(2) for static in (True, False))
    assert fused._fused.count == len(model.model.layers)
    for step in range(4):
        torch.testing.assert_close(fused(ids[:, step : step + 1]), plain(ids[:, step : step + 1]), atol=1e-4, rtol=1e-4)


def plain_linears(x, linears):
    """As ``launch_linears``, which the interpreter runs too slowly."""
    fields = zip(linears.codes, linears.scales, linears.offsets, strict=True)
    width = next(width for width in Width if width.levels == linears.levels)
    return torch.cat([x @ dequantize(PackedMatrix(*tensors, width).unpack(), x.dtype).T for tensors in fields], 1)


def plain_shares(experts, hidden, index, weights):
    """As ``dispatch.expert_shares``: a term for each slot."""
    slots = [reference.experts_forward(experts, hidden, index[:, [k]], weights[:, [k]]) for k in range(index.shape[1])]
    return torch.stack(slots, 1).float()


def test_packed_layers(tmp_path, monkeypatch):
    """Projections share a launch, and the sum over experts is left to the residual connection."""
    if DEVICE == "cpu":
        monkeypatch.setattr(dispatch, "mode", "reference")
        monkeypatch.setattr(dispatch, "expert_shares", plain_shares)
        monkeypatch.setattr(fused_layers, "launch_linears", plain_linears)
    model = gemq.load(write_packed(tmp_path / "packed"), device=DEVICE, dtype="float32")
    decoder = Decoder(model, 2, 64)
    ids = tokens(2, 4).to(DEVICE) % 96
    expected = decode(decoder, ids)
    decoder._fuse_layers()
    assert decode(decoder, ids) == expected
    for layer in decoder._fused._layers.values():
        assert layer.is_fused
        assert layer.leaves_sum
        assert [len(group) for group in layer.linears.values()] == [3]
        assert len(layer.linear_norms) == 2


def test_a_layer_of_another_form_stays_as_it_is():
    """Here one layer scales its result. The other one is fused."""
    model = tiny("mixtral").to(DEVICE)
    odd = model.model.layers[0]

    class OddLayer(type(odd)):
        def forward(self, hidden_states, **kwargs):
            return super().forward(hidden_states, **kwargs) * 0.5

    odd.__class__ = OddLayer
    expected, fused, decoder = family_and_fused(model, tokens(1, 4).to(DEVICE))
    assert fused == expected
    assert decoder.fallbacks["layers_not_fused"] == 1
    assert decoder.reasons["layers_not_fused"] == "RuntimeError: 1 of 2 layers are of another form"
