"""Bytes from shapes alone, against the bytes of real tensors."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from gemq.calibration.activations import Activations
from gemq.calibration.windows import Windows
from gemq.checkpoint.format import PackedFormat
from gemq.checkpoint.save import dense_state
from gemq.layers.candidates import build_candidates
from gemq.layers.quantizer import Quantizer
from gemq.layers.reconstruction import assemble_layer
from gemq.models.byte_sizes import (
    candidate_bytes,
    count_smaller_groups,
    count_smaller_rotations,
    expert_bytes,
    linear_bytes,
    quantized_share,
    unquantized_bytes,
)
from gemq.models.replay import Replay
from gemq.models.structure import find_structure
from gemq.quant.widths import Width
from gemq.recipe import Recipe
from support.families import FAMILIES, MAIN_FAMILIES, TOY, ToyConfig, tiny, tiny_config, tokens

torch.set_num_threads(1)


def recipe_of(group_size: int = 32, dense_bits: int = 4) -> Recipe:
    return Recipe(group_size=group_size, dense_bits=dense_bits, widths=(1, 1.6, 2, 3, 4, 8))


def build_layers(family: str, recipe: Recipe):
    model = tiny(family)
    replay = Replay(model, find_structure(model))
    w = Windows(tokens(2, 6), torch.zeros(2, dtype=torch.int64), ("text",), (12,))
    activations = Activations.start(replay, w, 12, 0)
    rtn = Quantizer("rtn", recipe.group_size, 0.01, 0.1)
    for i in range(len(replay.structure.layers)):
        candidates, activations.hidden = build_candidates(
            replay, i, activations, rtn, recipe.candidate_widths, recipe.dense_width
        )
        yield replay.structure.layers[i], candidates


@pytest.mark.sample
@pytest.mark.parametrize("group_size", [16, 64, 128])
@pytest.mark.parametrize("family", [*FAMILIES, TOY])
def test_bytes_are_those_of_the_tensors(family, group_size):
    recipe = recipe_of(group_size)
    structure = find_structure(tiny(family))
    total = linears = 0
    for layer, candidates in build_layers(family, recipe):
        linears += sum(x.nbytes for x in candidates.linears.values())
        for width in recipe.candidate_widths if layer.experts else ():
            layer_bytes = sum(versions[width].nbytes for versions in candidates.experts.values())
            assert layer_bytes == layer.experts.count * expert_bytes(layer.experts, width, group_size)
            total += layer_bytes
            tensors = assemble_layer(candidates, layer, [(width, width)] * layer.experts.count).tensors
            first_expert = [t for n, t in tensors.items() if n.startswith(f"{layer.experts.path}.0.")]
            assert sum(t.nbytes for t in first_expert) == expert_bytes(layer.experts, width, group_size)
    assert linear_bytes(structure, recipe) == linears
    assert candidate_bytes(structure, recipe) == total + linears


@pytest.mark.parametrize("dense_bits", [4, 16])
@pytest.mark.parametrize("family", [*FAMILIES, TOY])
def test_the_rest_of_a_checkpoint(family, dense_bits):
    recipe = recipe_of(dense_bits=dense_bits)
    model = tiny(family)
    structure = find_structure(model)
    packed = PackedFormat(
        experts={
            x.experts.path: {m.name: (Width.TWO_BIT,) * x.experts.count for m in x.experts.matrices}
            for _, x in structure.moe_layers
        },
        linears={x.path: Width.FOUR_BIT for layer in structure.layers for x in layer.linears}
        if dense_bits < 16
        else {},
        group_size=32,
    )
    floats = sum(t.nbytes for t in dense_state(model, packed).values())
    assert unquantized_bytes(model, structure, recipe, {}) == floats
    stored_dtypes = {name: torch.bfloat16 for name, _ in model.named_parameters()}
    buffers = sum(t.nbytes for n, t in model.named_buffers() if n in model.state_dict())
    assert unquantized_bytes(model, structure, recipe, stored_dtypes) == (floats - buffers) // 2 + buffers
    assert linear_bytes(structure, recipe) == (0 if dense_bits == 16 else linear_bytes(structure, recipe_of()))


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_plain_sizes_need_no_weights(family):
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(tiny_config(family))
    model = tiny(family)
    structure = find_structure(skeleton)
    recipe = recipe_of()
    assert unquantized_bytes(skeleton, structure, recipe, {}) == unquantized_bytes(
        model, find_structure(model), recipe, {}
    )


def test_smaller_groups_are_counted():
    structure = find_structure(tiny("deepseek_v2"))
    # 3 layers: kv_b_proj has 16 inputs; down_proj of the dense layer and of shared experts has 96, the experts' 48
    assert count_smaller_groups(structure, recipe_of(16)) == 0
    assert count_smaller_groups(structure, recipe_of(32)) == 3 + 12
    assert count_smaller_groups(structure, recipe_of(64)) == 3 + 12 + 1 + 2
    linears = sum(len(x.linears) for x in structure.layers)
    assert count_smaller_groups(structure, recipe_of(128)) == linears + 24
    assert count_smaller_groups(structure, recipe_of(128, dense_bits=16)) == 24
    assert count_smaller_rotations(structure, recipe_of(128)) == 0
    assert count_smaller_groups(structure, Recipe(codes="trellis")) == linears
    assert count_smaller_rotations(structure, Recipe(codes="trellis")) == 24


@pytest.mark.parametrize("family", [*MAIN_FAMILIES, TOY])
def test_quantized_share(family):
    model = tiny(family)
    structure = find_structure(model)
    experts = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 3)
    total = sum(p.numel() for p in model.parameters())
    assert quantized_share(structure, recipe_of(dense_bits=16)) == experts / total
    linears = sum(model.get_submodule(x.path).weight.numel() for layer in structure.layers for x in layer.linears)
    assert quantized_share(structure, recipe_of()) == (experts + linears) / total


def test_one_expert_by_hand():
    """2 x 32 by 64 and 64 by 32 at 3 bits in groups of 32: 12 bytes of codes and 4 of grid a group."""
    config = ToyConfig()
    structure = find_structure(AutoModelForCausalLM.from_config(config))
    experts = structure.layers[0].experts
    assert expert_bytes(experts, Width.THREE_BIT, 32) == (64 * 2 + 64 * 1) * (12 + 2)
