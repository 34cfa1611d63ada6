"""Experts, routers and linears found by structure: known families, one of our own, and refusals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import gemq
from gemq import UserError
from gemq.allocation.scores import loss_gradients, reverse_layer
from gemq.calibration.activations import Activations
from gemq.calibration.windows import Windows
from gemq.checkpoint.format import PackedFormat
from gemq.checkpoint.save import dense_state, write_checkpoint
from gemq.layers.candidates import build_candidates
from gemq.layers.quantizer import Quantizer
from gemq.layers.reconstruction import reconstruct_layer
from gemq.layers.scheme import matrix_widths
from gemq.models.replay import Replay
from gemq.models.structure import MIN_LINEAR_ROWS, Structure, find_structure
from gemq.quant.widths import ExpertWidths, Width
from support.families import FAMILIES, TOY, ToyBlock, ToyConfig, ToyModel, tiny, tiny_config, tokens

torch.set_num_threads(1)

# Expectations by family: experts per layer (None: dense), name of the router, linears by kind.
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
MLA = {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
EXPECTED = {
    "olmoe": ([6, 6, 6], "gate", ATTENTION, set(), set()),
    "mixtral": ([4, 4], "gate", ATTENTION, set(), set()),
    "qwen2_moe": ([6, None, 6], "gate", ATTENTION, MLP, MLP),
    "qwen3_moe": ([6, 6], "gate", ATTENTION, set(), set()),
    "deepseek_v2": ([None, 6, 6], "gate", MLA, MLP, MLP),
    "gpt_oss": ([6, 6], "router", ATTENTION, set(), set()),
}


@pytest.mark.sample
@pytest.mark.parametrize("family", EXPECTED)
def test_families(family):
    model = tiny(family)
    structure = find_structure(model)
    counts, router, attention, shared, dense = EXPECTED[family]
    assert [x.experts and x.experts.count for x in structure.layers] == counts
    assert [i for i, _ in structure.moe_layers] == [i for i, n in enumerate(counts) if n]
    routers = [x.router for x in structure.layers if x.experts]
    assert len(set(routers)) == len(routers)
    for layer in structure.layers:
        kinds: dict[str, set[str]] = {"attention": set(), "shared": set(), "dense": set()}
        for linear in layer.linears:
            module = model.get_submodule(linear.path)
            assert (linear.rows, linear.columns) == tuple(module.weight.shape)
            assert linear.path.startswith(layer.path + ".")
            kinds[linear.kind].add(linear.path.rpartition(".")[2])
        moe = layer.experts is not None
        assert kinds == {"attention": attention, "shared": shared if moe else set(), "dense": set() if moe else dense}
        if layer.experts is not None:
            assert layer.router is not None
            assert layer.router.rpartition(".") == (layer.experts.path.rpartition(".")[0], ".", router)
            for matrix in layer.experts.matrices:
                shape = model.get_parameter(f"{layer.experts.path}.{matrix.name}").shape
                rows, columns = shape[1:][::-1] if family == "gpt_oss" else shape[1:]
                assert (matrix.rows, matrix.columns) == (rows, columns)


@pytest.mark.sample
@pytest.mark.parametrize("family", [*FAMILIES, TOY])
def test_every_parameter_is_counted_once(family):
    model = tiny(family)
    structure = find_structure(model)
    assert structure.total_parameters == sum(p.numel() for p in model.parameters())  # tied weights once
    experts = sum(
        p.numel() for n, p in model.named_parameters() if re.search(r"\.(experts|pool)\.[a-z_]*(proj|bias)", n)
    )
    assert structure.parameters["experts"] == experts
    routers = [p.numel() for _, x in structure.moe_layers for p in model.get_submodule(x.router).parameters()]
    assert structure.parameters["router"] == sum(routers)
    for kind in ("attention", "shared", "dense"):
        paths = [x.path for layer in structure.layers for x in layer.linears if x.kind == kind]
        expected = sum(p.numel() for path in paths for p in model.get_submodule(path).parameters())
        assert structure.parameters[kind] == expected
    biases = sum(p.numel() for n, p in model.named_parameters() if re.search(r"\.experts\.[a-z_]*bias", n))
    assert structure.expert_weights == experts - biases


@pytest.mark.sample
@pytest.mark.parametrize("family", [*FAMILIES, TOY])
def test_same_on_the_meta_device(family):
    config = tiny_config(family)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    assert find_structure(skeleton) == find_structure(tiny(family))


def test_gates_and_odd_columns_stay_unquantized():
    assert find_structure(tiny("qwen2_moe")).unquantized_linears == tuple(
        f"model.layers.{i}.mlp.shared_expert_gate" for i in (0, 2)
    )
    config = tiny_config("deepseek_v2")
    config.kv_lora_rank = 24  # kv_b_proj then has 24 inputs, which no group size divides
    model = AutoModelForCausalLM.from_config(config)
    unquantized = find_structure(model).unquantized_linears
    assert unquantized == tuple(f"model.layers.{i}.self_attn.kv_b_proj" for i in range(3))
    assert all(model.get_submodule(path).weight.shape[0] >= MIN_LINEAR_ROWS for path in unquantized)


def test_subclasses_of_linear_stay_unquantized_and_are_reported():
    """Their forward may compute something else."""

    class Grouped(nn.Linear):
        pass

    model = tiny(TOY)
    model.stack[0].mix_attention.__class__ = Grouped
    structure = find_structure(model)
    assert structure.unquantized_linears == ("stack.0.mix_attention",)
    assert structure.layers[0].linears == ()


def test_all_large_weights_are_quantized():
    """Only embeddings, head, norms and routers are not."""
    structure = find_structure(tiny("olmoe"))
    unquantized = structure.parameters["other"] + structure.parameters["router"]
    linears = sum(x.rows * x.columns for layer in structure.layers for x in layer.linears)
    assert structure.expert_weights + linears == structure.total_parameters - unquantized


# Refusals. Each message names the module.


def refused(model: nn.Module, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        find_structure(model)
    assert "\n" not in str(caught.value)


@pytest.mark.sample
def test_dense_model_is_refused():
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    refused(AutoModelForCausalLM.from_config(config), "LlamaForCausalLM has no experts.*dense model")


def own_family_with(change) -> ToyModel:
    """Builds our own family and applies ``change`` to every layer's block."""
    model = tiny(TOY)
    for layer in model.stack:
        change(layer.block)
    return model


def test_list_of_expert_modules_is_refused():
    def change(block: ToyBlock) -> None:
        del block.pool
        block.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(5))

    refused(own_family_with(change), r"stack\.0\.block\.experts \(ModuleList\).*not supported")


def test_unknown_three_dimensional_weights_are_refused():
    def other_names(block: ToyBlock) -> None:
        del block.pool

        class StrangeExperts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w1 = nn.Parameter(torch.zeros(5, 64, 64))
                self.w2 = nn.Parameter(torch.zeros(5, 64, 32))

        block.moe_weights = StrangeExperts()

    refused(own_family_with(other_names), r"stack\.0\.block\.moe_weights \(StrangeExperts\)")

    def one_more(block: ToyBlock) -> None:
        block.pool.low_rank = nn.Parameter(torch.zeros(5, 64, 8))

    refused(own_family_with(one_more), r"stack\.0\.block\.pool: unknown weights low_rank")

    def no_first(block: ToyBlock) -> None:
        block.pool.first = block.pool.gate_up_proj
        del block.pool.gate_up_proj

    refused(own_family_with(no_first), r"stack\.0\.block\.pool: it has no 3-D weight 'gate_up_proj'")


def test_unnamed_three_dimensional_weights_are_refused():
    """Routed experts with meaningless names in a single layer."""
    model = tiny(TOY)

    class Mystery(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.zeros(5, 64, 64))

    model.stack[1].block.pool = Mystery()
    refused(model, r"stack\.1\.block\.pool \(Mystery\)")


def test_ambiguous_router_is_refused():
    def change(block: ToyBlock) -> None:
        block.other_chooser = nn.Linear(64, 5)

    refused(own_family_with(change), r"routes to stack\.0\.block\.pool .*chooser.*other_chooser")

    def none(block: ToyBlock) -> None:
        block.chooser = nn.Identity()

    refused(own_family_with(none), r"routes to stack\.0\.block\.pool \(candidates: none\)")


def test_router_by_name_wins():
    def change(block: ToyBlock) -> None:
        block.router, block.chooser = block.chooser, nn.Linear(64, 5)

    assert find_structure(own_family_with(change)).layers[0].router == "stack.0.block.router"


@pytest.mark.parametrize(("inner", "hidden", "name"), [(24, 64, "down_proj"), (32, 40, "gate_up_proj")])
def test_columns_that_no_group_divides_are_refused(inner, hidden, name):
    config = ToyConfig(inner=inner, hidden_size=hidden)
    refused(AutoModelForCausalLM.from_config(config), rf"stack\.0\.block\.pool\.{name}.*multiple of 16")


def test_two_experts_modules_in_a_layer_are_refused():
    model = tiny(TOY)
    model.stack[1].second = ToyBlock(ToyConfig())
    refused(model, r"layer stack\.1 has several experts modules")


def test_experts_outside_the_layers_are_refused():
    model = tiny(TOY)
    model.extra = ToyBlock(ToyConfig())
    refused(model, r"outside one list of decoder layers")


# A family of our own, from quantization to loading.


@pytest.mark.sample
def test_own_family_end_to_end(tmp_path):
    model = tiny(TOY)
    source = tmp_path / "source"
    model.save_pretrained(source)
    structure = find_structure(model)
    assert [x.router for x in structure.layers] == [f"stack.{i}.block.chooser" for i in range(3)]
    replay = Replay(model, structure)
    replay.verify(tokens())
    windows = Windows(tokens(6, 12), torch.zeros(6, dtype=torch.int64), ("text",), (72,))
    quantizer = Quantizer("gptq", 32, 0.01, 0.1)
    activations = Activations.start(replay, windows, 24, 0)
    inputs = []
    for i in range(3):
        inputs.append(activations.hidden.copy())
        candidates, activations.hidden = build_candidates(
            replay, i, activations, quantizer, (Width.ONE_BIT, Width.TWO_BIT, Width.FOUR_BIT), Width.FOUR_BIT
        )
        assert candidates.counts.sum() == 6 * 12 * 2
        assert set(candidates.linears) == {f"stack.{i}.mix_attention"}
    gradients = loss_gradients(replay, activations, "sampled", 0)
    for i in (2, 1, 0):
        activations.hidden = inputs.pop()
        for _, call, gradient in reverse_layer(replay, i, activations, gradients):
            assert call is not None
            assert gradient is not None
            assert gradient.abs().sum() > 0
    numbers = [(1, 1), (2, 4), (4, 4), (2, 1), (1, 2)]
    widths: list[ExpertWidths] = [(Width(gate_up), Width(down)) for gate_up, down in numbers]
    shards = []
    activations = Activations.start(replay, windows, 24, 0)
    for i in range(3):
        shards.append(reconstruct_layer(replay, i, activations, quantizer, widths, Width.FOUR_BIT).tensors)
        activations.advance(replay, i)
    packed = packed_format(structure, widths)
    write_checkpoint(
        tmp_path / "packed",
        config=model.config,
        packed_format=packed,
        shards=[*shards, dense_state(model, packed)],
        source=source,
    )
    loaded = gemq.load(tmp_path / "packed", dtype=torch.float32)
    with torch.no_grad():
        # reconstruction left the same weights in the model; float32 sums take another order
        torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-4)


def packed_format(structure: Structure, widths: list[ExpertWidths]) -> PackedFormat:
    return PackedFormat(
        experts={x.experts.path: matrix_widths(x, widths) for _, x in structure.moe_layers},
        linears={linear.path: Width.FOUR_BIT for layer in structure.layers for linear in layer.linears},
        group_size=32,
    )


@pytest.mark.sample
def test_no_family_names_in_the_source():
    """Families are recognised by structure: no model_type of Transformers is a literal in the package."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    moe_like = {name for name in CONFIG_MAPPING_NAMES if re.search(r"\d|_|moe|mixtral|olmo|deepseek|jamba", name)}
    assert {"olmoe", "mixtral", "qwen2_moe", "deepseek_v2"} <= moe_like
    for file in Path(gemq.__file__).parent.rglob("*.py"):
        text = file.read_text()
        assert not re.search(r"model_type\W*(==|!=|in\b|not in\b)", text), file
        literals = set(re.findall(r"[\"']([a-z0-9_]+)[\"']", text))
        assert not literals & moe_like, (file, literals & moe_like)
