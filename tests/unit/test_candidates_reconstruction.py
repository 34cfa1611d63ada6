"""A layer at every width, a layer at its chosen widths, and both as the model and the checkpoint see them."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

import gemq
from gemq.calibration.activations import Activations, LinearHessians
from gemq.calibration.windows import Windows
from gemq.checkpoint.format import PackedFormat
from gemq.checkpoint.save import dense_state, write_checkpoint
from gemq.layers.candidates import LayerCandidates, build_candidates
from gemq.layers.linears import quantize_linears
from gemq.layers.quantizer import Quantizer
from gemq.layers.reconstruction import QuantizedLayer, assemble_layer, install_layer, reconstruct_layer
from gemq.layers.scheme import QuantizationScheme, matrix_widths
from gemq.models.experts import expert_weight
from gemq.models.replay import Replay
from gemq.models.structure import Structure, find_structure
from gemq.quant.gptq import round_to_nearest
from gemq.quant.grid import dequantize
from gemq.quant.packing import PackedMatrix
from gemq.quant.widths import ExpertWidths, Width
from support.families import FAMILIES, MAIN_FAMILIES, TOY, tiny, tokens

torch.set_num_threads(1)
WIDTHS = tuple(Width)
GROUP = 32
GPTQ = Quantizer("gptq", GROUP, 0.01, 0.1)
RTN = Quantizer("rtn", GROUP, 0.01, 0.1)


def windows(count: int = 6, length: int = 12, seed: int = 1) -> Windows:
    zeros = torch.zeros(count, dtype=torch.int64)
    return Windows(tokens(count, length, seed), zeros, ("text",), (count * length,))


def replay_of(family: str, dtype: torch.dtype = torch.float32) -> Replay:
    model = tiny(family, dtype=dtype)
    return Replay(model, find_structure(model))


def build(
    replay: Replay, w: Windows, quantizer: Quantizer = GPTQ, dense_width: Width | None = Width.FOUR_BIT, widths=WIDTHS
) -> list[LayerCandidates]:
    activations = Activations.start(replay, w, 24, 0)
    candidates = []
    for i in range(len(replay.structure.layers)):
        layer_candidates, activations.hidden = build_candidates(replay, i, activations, quantizer, widths, dense_width)
        candidates.append(layer_candidates)
    return candidates


def reconstruct(
    replay: Replay,
    w: Windows,
    widths: list[list[ExpertWidths]],
    quantizer: Quantizer = GPTQ,
    dense_width: Width | None = Width.FOUR_BIT,
):
    activations = Activations.start(replay, w, 24, 0)
    layers = []
    for i in range(len(replay.structure.layers)):
        layers.append(reconstruct_layer(replay, i, activations, quantizer, widths[i], dense_width))
        activations.advance(replay, i)
    return layers


def candidate_weight(candidates: LayerCandidates, name: str, width: Width, columns: int) -> Tensor:
    """All experts' weights of one matrix at one width: [E, rows, columns] float32."""
    return dequantize(candidates.experts[name][width].unpack())


def mixed(structure: Structure) -> list[list[ExpertWidths]]:
    """Widths for both matrices of every expert of every layer, all of them taken; empty in dense layers."""
    counts = [x.experts.count if x.experts else 0 for x in structure.layers]
    width = lambda position: WIDTHS[position % len(WIDTHS)]
    return [[(width(e + i), width(2 * e + i)) for e in range(n)] for i, n in enumerate(counts)]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# The candidates


@pytest.mark.sample
@pytest.mark.parametrize("family", [*FAMILIES, TOY])
def test_ladder_holds_every_matrix_at_every_width(family):
    replay = replay_of(family)
    for candidates, layer in zip(build(replay, windows()), replay.structure.layers, strict=True):
        assert set(candidates.linears) == {x.path for x in layer.linears}
        assert candidates.counts.sum() == (72 * 2 if layer.experts else 0)
        if layer.experts is None:
            assert not candidates.experts
            continue
        module = replay.model.get_submodule(layer.experts.path)
        for matrix in layer.experts.matrices:
            weight = expert_weight(module, matrix.name)
            errors = []
            for width in WIDTHS:
                candidate = candidate_weight(candidates, matrix.name, width, matrix.columns)
                assert candidate.shape == weight.shape
                errors.append(((candidate - weight).norm() / weight.norm()).item())
            assert errors == sorted(errors, reverse=True)
            assert errors[0] < 1  # GPTQ gives up weights (0.6 by rounding at 1 bit) for outputs: see test_gptq
            assert errors[-1] < 0.02


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_round_trip_through_a_file(family):
    replay = replay_of(family)
    for candidates, layer in zip(build(replay, windows()), replay.structure.layers, strict=True):
        candidates.retries, candidates.not_improved = 3, 2
        back = LayerCandidates.from_tensors(load(save(candidates.to_tensors())), layer, WIDTHS, Width.FOUR_BIT)
        assert same(back.to_tensors(), candidates.to_tensors())
        assert (back.retries, back.not_improved) == (3, 2)
        assert back.linears.keys() == candidates.linears.keys()
        assert {n: list(r) for n, r in back.experts.items()} == {n: list(r) for n, r in candidates.experts.items()}


def test_ladder_leaves_the_model_alone():
    replay = replay_of("qwen2_moe")
    original = copy.deepcopy(replay.model.state_dict())
    build(replay, windows())
    assert same(original, replay.model.state_dict())


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
def test_widths_do_not_influence_each_other(family):
    """Candidates of fewer widths are a part of those of more: the same codes to the bit."""
    replay = replay_of(family)
    all_widths, two_widths = build(replay, windows()), build(replay, windows(), widths=(Width.TERNARY, Width.THREE_BIT))
    for a, b in zip(all_widths, two_widths, strict=True):
        tensors = a.to_tensors()
        assert all(torch.equal(tensors[name], t) for name, t in b.to_tensors().items())


def test_unquantized_linears():
    replay = replay_of("qwen2_moe")
    assert all(not x.linears for x in build(replay, windows(), dense_width=None))
    for layer in reconstruct(replay, windows(), mixed(replay.structure), dense_width=None):
        assert not [name for name in layer.tensors if ".experts." not in name]


def test_rounding_needs_no_calibration():
    replay = replay_of("olmoe")
    candidates, other_candidates = build(replay, windows(), RTN), build(replay, windows(2, 5, seed=9), RTN)
    for a, b in zip(candidates, other_candidates, strict=True):
        tensors, other_tensors = a.to_tensors(), b.to_tensors()
        del tensors["counts"], other_tensors["counts"]
        assert same(tensors, other_tensors)
    layer = replay.structure.layers[0]
    weight = expert_weight(replay.model.get_submodule(layer.experts.path), "gate_up_proj")
    expected = round_to_nearest(weight, WIDTHS, GROUP).select(2)
    assert torch.equal(candidate_weight(candidates[0], "gate_up_proj", 2, 64), dequantize(expected))


@pytest.mark.parametrize("family", MAIN_FAMILIES)
@pytest.mark.parametrize("length", [1, 2])
def test_one_or_two_tokens_are_enough_to_stay_finite(family, length):
    """Most experts see no token; the result is coarse, never NaN."""
    replay = replay_of(family)
    w = windows(1, length)
    for candidates in build(replay, w):
        assert candidates.counts.sum() in (0, 2 * length)
        assert all(torch.isfinite(t).all() for t in candidates.to_tensors().values() if t.is_floating_point())
    for layer in reconstruct(replay, w, mixed(replay.structure)):
        assert all(torch.isfinite(t).all() for t in layer.to_tensors().values() if t.is_floating_point())
    assert all(torch.isfinite(p).all() for p in replay.model.parameters())


def test_a_linear_that_no_token_reached_is_rounded():
    replay = replay_of("olmoe")
    linear = replay.structure.layers[0].linears[0]
    quantized = quantize_linears(replay, [linear], LinearHessians(), GPTQ, Width.FOUR_BIT)
    weight = replay.model.get_submodule(linear.path).weight.detach().unsqueeze(0)
    expected = round_to_nearest(weight, (Width.FOUR_BIT,), GROUP)
    packed = PackedMatrix.pack(expected.select(0), Width.FOUR_BIT)
    assert same(quantized.packed[linear.path].named("q"), packed.named("q"))


# Assembling


def test_assembling_picks_rows():
    replay = replay_of("deepseek_v2")
    widths = mixed(replay.structure)
    for candidates, layer, chosen in zip(build(replay, windows()), replay.structure.layers, widths, strict=True):
        tensors = assemble_layer(candidates, layer, chosen).tensors
        count = layer.experts.count * 2 if layer.experts else 0
        assert len(tensors) == 3 * (len(layer.linears) + count)
        for path, packed in candidates.linears.items():
            assert torch.equal(tensors[f"{path}.codes"], packed.codes[0])
        for e, expert_widths in enumerate(chosen):
            for name, width in zip(("gate_up_proj", "down_proj"), expert_widths, strict=True):
                for field in PackedMatrix.FIELDS:
                    expected = getattr(candidates.experts[name][width], field)[e]
                    assert torch.equal(tensors[f"{layer.experts.path}.{e}.{name}.{field}"], expected)


# Refining


@pytest.mark.parametrize("quantizer", [GPTQ, RTN], ids=["gptq", "rtn"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", TOY])
def test_refine_equals_assembly_where_activations_are_equal(family, quantizer):
    """In the first layer with the rest unquantized nothing upstream differs: the same codes to the bit."""
    quantizer = dataclasses.replace(quantizer, compensates=False)
    replay = replay_of(family)
    candidates, widths = build(replay, windows(), quantizer, dense_width=None)[0], mixed(replay.structure)
    expected = assemble_layer(candidates, replay.structure.layers[0], widths[0]).tensors
    assert same(reconstruct(replay, windows(), widths, quantizer, dense_width=None)[0].tensors, expected)


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_refine_equals_the_ladder_in_the_first_attention(family):
    """Quantized attention then changes what the experts behind it see, so that their codes differ."""
    replay = replay_of(family)
    candidates, widths = build(replay, windows())[0], mixed(replay.structure)
    layer = replay.structure.layers[0]
    expected = assemble_layer(candidates, layer, widths[0]).tensors
    tensors = reconstruct(replay, windows(), widths)[0].tensors
    assert tensors.keys() == expected.keys()
    attention = [n for n in tensors if any(n.startswith(x.path + ".") for x in layer.linears if x.kind == "attention")]
    assert attention
    assert all(torch.equal(tensors[n], expected[n]) for n in attention)
    assert any(not torch.equal(tensors[n], expected[n]) for n in tensors if n not in attention)


def test_refine_of_one_expert_does_not_depend_on_the_others_widths():
    """Except for the mean Hessian, which is that of quantized experts where down projections make up for them."""
    quantizer = dataclasses.replace(GPTQ, shrinkage=0.0)
    replay, other_replay = replay_of("olmoe"), replay_of("olmoe")
    widths = [[(Width.TWO_BIT, Width.TWO_BIT)] * 6 for _ in range(3)]
    changed = [[(Width.FOUR_BIT, Width.THREE_BIT), *widths[0][1:]], *widths[1:]]
    tensors = reconstruct(replay, windows(), widths, quantizer, dense_width=None)[0].tensors
    changed_tensors = reconstruct(other_replay, windows(), changed, quantizer, dense_width=None)[0].tensors
    path = replay.structure.layers[0].experts.path
    for name, tensor in tensors.items():
        assert torch.equal(tensor, changed_tensors[name]) == (not name.startswith(f"{path}.0."))


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "granitemoe"])
def test_down_projections_make_up_for_coarse_gate_and_up(family):
    """On tokens that calibration did not see. Experts with more neurons than inputs take several passes."""
    errors = []
    expected = None
    for compensates in (False, True):
        replay = replay_of(family)
        unseen = Activations.start(replay, windows(20, 12, seed=5), 240, 0)
        call, hidden = unseen.calls[0][0], unseen.hidden[0]
        if expected is None:
            expected = replay.run(0, hidden, call)
        widths = [(Width.TWO_BIT, Width.FOUR_BIT)] * replay.structure.layers[0].experts.count
        quantizer = dataclasses.replace(GPTQ, compensates=compensates)
        activations = Activations.start(replay, windows(500, 12), 600, 0)
        reconstruct_layer(replay, 0, activations, quantizer, widths, None)
        errors.append((replay.run(0, hidden, call) - expected).square().mean().item())
    assert errors[1] < 0.95 * errors[0]


def test_refine_leaves_the_quantized_weights_in_the_model():
    replay = replay_of("qwen2_moe")
    widths = mixed(replay.structure)
    layers = reconstruct(replay, windows(), widths)
    twin = replay_of("qwen2_moe")
    for layer, reconstructed, chosen in zip(twin.structure.layers, layers, widths, strict=True):
        install_layer(twin.model, layer, reconstructed, QuantizationScheme(chosen, Width.FOUR_BIT))
    assert same(replay.model.state_dict(), twin.model.state_dict())


def test_refine_again_gives_the_same_bytes():
    widths = mixed(replay_of("mixtral").structure)
    layers, repeated = (reconstruct(replay_of("mixtral"), windows(), widths) for _ in range(2))
    assert all(same(a.to_tensors(), b.to_tensors()) for a, b in zip(layers, repeated, strict=True))


def test_refined_layer_round_trip():
    tensors = {"a.codes": torch.ones(2, dtype=torch.uint8)}
    reconstructed = QuantizedLayer(dict(tensors), {"model.norm.weight": torch.rand(3)}, 5, 0.25, 0.125)
    back = QuantizedLayer.from_tensors(load(save(reconstructed.to_tensors())))
    assert same(back.tensors, tensors)
    assert same(back.tuned, reconstructed.tuned)
    assert (back.retries, back.error_before, back.error_after) == (5, 0.25, 0.125)


# What is installed, and what a checkpoint computes


@pytest.mark.sample
@pytest.mark.parametrize("family", [*FAMILIES, TOY])
def test_installed_weights_are_what_the_codes_mean(family):
    replay = replay_of(family)
    widths = mixed(replay.structure)
    candidates = build(replay, windows())
    originals = copy.deepcopy(replay.model.state_dict())
    touched = set()
    for layer_candidates, layer, chosen in zip(candidates, replay.structure.layers, widths, strict=True):
        scheme = QuantizationScheme(chosen, Width.FOUR_BIT)
        install_layer(replay.model, layer, assemble_layer(layer_candidates, layer, chosen), scheme)
        for linear in layer.linears:
            expected = dequantize(layer_candidates.linears[linear.path].unpack())[0]
            assert torch.equal(replay.model.get_submodule(linear.path).weight, expected)
            touched.add(f"{linear.path}.weight")
        for m, matrix in enumerate(layer.experts.matrices if layer.experts else ()):
            weight = expert_weight(replay.model.get_submodule(layer.experts.path), matrix.name)
            for e, expert_widths in enumerate(chosen):
                candidate = candidate_weight(layer_candidates, matrix.name, expert_widths[m], matrix.columns)
                assert torch.equal(weight[e], candidate[e])
            touched.add(f"{layer.experts.path}.{matrix.name}")
    for name, tensor in replay.model.state_dict().items():
        assert torch.equal(tensor, originals[name]) == (name not in touched)


@pytest.mark.sample
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", [*MAIN_FAMILIES, "gpt_oss"])
def test_loaded_checkpoint_computes_what_the_refined_model_computes(family, dtype, tmp_path):
    replay = replay_of(family, dtype)
    widths = mixed(replay.structure)
    layers = reconstruct(replay, windows(), widths)
    structure = replay.structure
    packed = PackedFormat(
        experts={x.experts.path: matrix_widths(x, widths[i]) for i, x in structure.moe_layers},
        linears={x.path: Width.FOUR_BIT for layer in structure.layers for x in layer.linears},
        group_size=GROUP,
    )
    write_checkpoint(
        tmp_path / "packed",
        config=replay.model.config,
        packed_format=packed,
        shards=[*(x.tensors for x in layers), dense_state(replay.model, packed)],
        source=None,
    )
    loaded = gemq.load(tmp_path / "packed", dtype=dtype)
    ids = tokens(2, 14, seed=7)
    assert_alike(logits(loaded, ids), logits(replay.model, ids), family)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def assert_alike(output: Tensor, expected: Tensor, family: str) -> None:
    assert output.dtype == expected.dtype
    if family == "gpt_oss":
        # its eager experts multiply x @ W with W stored transposed: same numbers, another order of sums
        step = torch.finfo(output.dtype).eps
        torch.testing.assert_close(output, expected, rtol=8 * step, atol=8 * step * expected.abs().max().item())
    else:
        assert torch.equal(output, expected)
