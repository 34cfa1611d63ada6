"""Equalization: the same function to the bit, and the same packed model for every rescaling of a model."""

from __future__ import annotations

import pytest
import torch

import gemq
from gemq import UserError
from gemq.models.equalization import Equalization, NormFold, RowFold, Scaling, equalize_
from gemq.quant.grid import below_scales
from support.equalization import equalized_model, rescaled
from support.families import tiny, tokens
from support.model_folders import edit_tensors, model_folder, quantize

torch.set_num_threads(1)


def layer_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "norm": torch.rand(32, generator=generator) + 0.5,
        "gate_up": torch.randn(3, 32, 32, generator=generator) / 30,
        "down": torch.randn(3, 32, 16, generator=generator) / 30,
        "router": torch.randn(3, 32, generator=generator),
    }


FOLDS = (
    RowFold("gate_up", "down", None, torch.arange(16, 32)),
    NormFold("norm", None, False, ("gate_up", "router"), (), ("gate_up",)),
    RowFold("gate_up", "down", None, torch.arange(16, 32), uniform=True),
)


def apply_powers(tensors: dict[str, torch.Tensor]) -> None:
    """Outlier channels, outlier neurons and an outlier expert."""
    tensors["norm"][5] *= 2.0**9
    tensors["gate_up"][:, :, 5] *= 2.0**-9
    tensors["router"][:, 5] *= 2.0**-9
    tensors["gate_up"][1, 20] *= 2.0**7
    tensors["down"][1, :, 4] *= 2.0**-7
    tensors["gate_up"][2, 16:] *= 2.0**-20
    tensors["down"][2] *= 2.0**20


def test_rescaled_layers_become_the_same_layer():
    original, variant = layer_tensors(), layer_tensors()
    apply_powers(variant)
    for tensors in (original, variant):
        equalize_(FOLDS, tensors, {})
    for name, tensor in original.items():
        assert torch.equal(variant[name], tensor), name


def test_trained_weights_stay_near_their_values():
    """Learning rates of norms and routers suit norms near one, and scales represent weights of the usual size."""
    tensors = layer_tensors()
    apply_powers(tensors)
    equalize_(FOLDS, tensors, {})
    assert 0.5 < tensors["norm"].median() < 2
    for name in ("gate_up", "down"):
        assert 2.0**-7 < tensors[name].square().mean().sqrt() < 2.0**-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scalings_are_undone_exactly(dtype):
    weight = (torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype)
    scaling = Scaling("w", torch.arange(-4, 4).to(torch.int8))
    assert torch.equal(scaling.inverse().apply(scaling.apply(weight)), weight)
    assert scaling.apply(weight).dtype == dtype


def test_a_norm_that_adds_one_is_folded_only_if_its_type_represents_the_result():
    scaling = Scaling("norm", torch.tensor([-2, 3], dtype=torch.int8), one_plus=True)
    assert scaling.is_exact(torch.tensor([0.5, -0.25]), torch.bfloat16)
    assert torch.equal(scaling.apply(torch.tensor([0.5, -0.25])), torch.tensor([-0.625, 5.0]))
    assert not scaling.is_exact(torch.tensor([0.1, 0.1]), torch.bfloat16)
    tensors = {"norm": torch.tensor([0.1, 0.1]).bfloat16(), "linear": torch.tensor([[1.0, 64.0]])}
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    assert not equalize_([NormFold("norm", None, True, ("linear",), (), ("linear",))], tensors, {})
    assert torch.equal(tensors["linear"], expected["linear"])


def test_weights_of_zero_stay_zero():
    tensors = layer_tensors()
    tensors["down"][1] = 0
    tensors["gate_up"][2] = 0
    tensors["gate_up"][:, :, 3] = 0
    equalize_(FOLDS, tensors, {})
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v2", "llama4_text", "gpt_oss", "nemotron_h"])
def test_an_equalized_model_computes_the_same_to_the_bit(family, tmp_path):
    folder = model_folder(tmp_path / "model", family)
    with equalized_model(folder) as (_, folds):
        variant = rescaled(tiny(family), folds)
    variant.save_pretrained(tmp_path / "variant")
    with torch.no_grad(), equalized_model(folder) as (original, _):
        expected = original(input_ids=tokens(), use_cache=False).logits
        weights = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    with torch.no_grad(), equalized_model(tmp_path / "variant") as (equalized, _):
        assert torch.equal(equalized(input_ids=tokens(), use_cache=False).logits, expected)
        for name, tensor in equalized.state_dict().items():
            assert torch.equal(tensor, weights[name]), name


TRAINED = {"candidate_epochs": 1, "reconstruction_epochs": 1, "distill_epochs": 1, "val_fraction": 0.3}


@pytest.mark.parametrize("keys", [{}, TRAINED], ids=["low", "trained"])
def test_a_rescaled_model_gives_the_same_packed_model(keys, tmp_path):
    logits = []
    for name in ("plain", "rescaled"):
        folder = tmp_path / name / "model"
        model_folder(folder)
        if name == "rescaled":
            with equalized_model(folder) as (_, folds):
                rescaled(tiny("olmoe"), folds).save_pretrained(folder)
        quantize(folder, **keys)
        packed = gemq.load(folder.parent / "out", dtype=torch.float32)
        with torch.no_grad():
            logits.append(packed(input_ids=tokens(2, 20)).logits)
    assert torch.equal(*logits)


def test_inputs_that_cannot_be_equalized_are_counted(tmp_path):
    """gpt-oss adds one to the up rows, so that nothing can scale the inputs of its down matrices."""
    result = quantize(model_folder(tmp_path / "model", "gpt_oss"))
    assert result.fallbacks["inputs_not_equalized"] == 2
    for family in ("olmoe", "deepseek_v2"):
        with equalized_model(model_folder(tmp_path / family, family)) as (_, folds):
            assert [layer.not_equalized for layer in folds] == [0] * len(folds)


def test_small_matrices_are_counted_and_large_ones_refused(tmp_path):
    source = model_folder(tmp_path / "model")

    def shrink(tensors):
        tensors["model.layers.1.self_attn.q_proj.weight"] *= 2.0**-22
        tensors["model.layers.2.self_attn.q_proj.weight"] *= 0  # nothing is lost of it

    def grow(tensors):
        tensors["model.layers.1.self_attn.q_proj.weight"] *= 2.0**20

    edit_tensors(source, shrink)
    assert quantize(source).fallbacks["matrices_too_small_for_scales"] == 1
    large = model_folder(tmp_path / "more" / "model")
    edit_tensors(large, grow)
    with pytest.raises(UserError, match=r"^model\.layers\.1\.self_attn\.q_proj has weights that are too large"):
        quantize(large)


def test_matrices_below_the_range_of_scales():
    weight = torch.ones(4, 2, 16)
    weight[1] *= 2.0**-18
    weight[2] *= 0
    weight[3, 0] *= 2.0**-30
    assert below_scales(weight) == 1


def test_scalings_are_read_from_a_file_as_they_were():
    """A resumed job and an export scale a layer as its candidates were, without reading it as a whole."""
    first, second = (Equalization(["layers.0."], {}) for _ in range(2))
    for equalization in (first, second):
        equalization.set_folds(0, FOLDS)
    tensors = {f"layers.0.{name}": tensor for name, tensor in layer_tensors().items()}
    apply_powers({name.removeprefix("layers.0."): tensor for name, tensor in tensors.items()})
    norm_only = {"layers.0.norm": tensors["layers.0.norm"].clone()}
    first.equalize_(0, tensors)
    assert not second.is_known(0)
    second.read_tensors(0, first.to_tensors(0))
    assert second.is_known(0)
    assert torch.equal(second.folded(0, norm_only)["layers.0.norm"], tensors["layers.0.norm"])
