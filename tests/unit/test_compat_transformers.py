"""The private interfaces of Transformers still are as ``gemq.runtime.compat`` relies on.

A failure here after an upgrade names the function to correct, and says what breaks without it.
"""

from __future__ import annotations

import dataclasses
import inspect
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.quantization_config import QuantizationConfigMixin

from gemq.models.fp8 import BlockDequantize
from gemq.runtime.compat import transformers_private
from support.compat_checks import check_complete, relies_on
from support.families import random_model, tiny, tiny_config, tokens
from support.model_folders import edit_config, edit_tensors, model_folder

pytestmark = pytest.mark.sample
for_transformers = partial(relies_on, transformers_private)
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose names on the hub differ, and whose experts are stored one by one."""
    return model_folder(tmp_path_factory.mktemp("mixtral"), "mixtral")


STORED = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
INSIDE = "model.layers.0.mlp.experts.down_proj"


def load(folder: Path, fill: Callable[[Any, Any], Any]) -> Any:
    """The model of a folder and what Transformers reports, with weights from ``fill``."""
    with transformers_private.weights_loaded_by(fill):
        return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)


def read_all(folder: Path) -> Callable[[Any, Any], Any]:
    """A function for ``load`` that fills the model with unread slices of the folder's file."""

    def fill(model: Any, load_config: Any) -> Any:
        handle = safe_open(folder / "model.safetensors", framework="pt")
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not iterable itself
        return transformers_private.convert_into(model, slices, load_config)

    return fill


def load_config_of(folder: Path) -> tuple[Any, Any]:
    """The model without contents and the ``LoadStateDictConfig`` that Transformers loads a folder with."""
    arguments = []

    def fill(model: Any, load_config: Any) -> Any:
        arguments.append((model, load_config))
        raise InterruptedError

    with pytest.raises(InterruptedError):
        load(folder, fill)
    return arguments[0]


@for_transformers("weights_loaded_by")
def test_from_pretrained_leaves_loading_to_a_function(mixtral: Path) -> None:
    original = vars(PreTrainedModel)["_load_pretrained_model"]
    assert isinstance(original, staticmethod)
    names = list(inspect.signature(original.__func__).parameters)
    assert names[:4] == ["model", "state_dict", "checkpoint_files", "load_config"]
    model, load_config = load_config_of(mixtral)
    assert all(parameter.is_meta for parameter in model.parameters())
    fields = {field.name for field in dataclasses.fields(load_config)}
    assert {"weight_mapping", "dtype_plan", "device_map"} <= fields
    assert vars(PreTrainedModel)["_load_pretrained_model"] is original


@for_transformers("convert_into")
def test_unread_slices_fill_a_model(mixtral: Path) -> None:
    model, report = load(mixtral, read_all(mixtral))
    assert not report["missing_keys"]
    expected = AutoModelForCausalLM.from_pretrained(mixtral).state_dict()
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@for_transformers("convert_into")
def test_the_report_names_what_is_missing_and_what_does_not_fit(mixtral: Path) -> None:
    model, load_config = load_config_of(mixtral)
    tensors = {}
    for name, tensor in load_file(mixtral / "model.safetensors").items():
        tensors[name] = torch.empty(tensor.shape, device="meta")
    del tensors["model.norm.weight"]
    del tensors[STORED]
    tensors["lm_head.weight"] = torch.empty(3, 5, device="meta")
    load_config = dataclasses.replace(load_config, device_map={"": "meta"}, ignore_mismatched_sizes=True)
    report = transformers_private.convert_into(model, tensors, load_config)
    assert "model.norm.weight" in report.missing_keys
    expected = (3, 5), tuple(model.lm_head.weight.shape)
    mismatched = {name: (tuple(stored), tuple(shape)) for name, stored, shape in report.mismatched_keys}
    assert mismatched["lm_head.weight"] == expected
    assert isinstance(report.conversion_errors, dict)


@for_transformers("split_mapping")
def test_a_weight_mapping_consists_of_renamings_and_converters(mixtral: Path) -> None:
    mapping = load_config_of(mixtral)[1].weight_mapping
    renamings, converters = transformers_private.split_mapping(mapping)
    assert transformers_private.split_mapping(None) == ([], [])
    assert renamings
    assert len(renamings) + len(converters) == len(mapping)
    assert any("experts.*.w2.weight" in source for x in converters for source in x.source_patterns)
    assert all(isinstance(converter.operations, list) for converter in converters)
    renamed = STORED
    for renaming in renamings:
        renamed, _ = renaming.rename_source_key(renamed)
    assert renamed == STORED.replace("block_sparse_moe", "mlp")


@for_transformers("rename_stored")
def test_a_stored_name_leads_to_a_name_inside_the_model(mixtral: Path) -> None:
    model, load_config = load_config_of(mixtral)
    renamings, converters = transformers_private.split_mapping(load_config.weight_mapping)
    state = model.state_dict()
    target, pattern = transformers_private.rename_stored(STORED, renamings, converters, "model", state)
    assert target == INSIDE
    assert any(pattern in converter.source_patterns for converter in converters)
    norm = "model.norm.weight"
    assert transformers_private.rename_stored(norm, renamings, converters, "model", state) == (norm, None)
    assert transformers_private.rename_stored(norm, [], [], "model", state) == (norm, None)


@for_transformers("compile_globs")
def test_one_expression_matches_all_globs() -> None:
    globs = ["layers.*.gate", "norm"]
    pattern, glob_by_group = transformers_private.compile_globs(globs)
    for name, glob in (("model.layers.3.gate.weight", globs[0]), ("model.norm.weight", globs[1])):
        match = pattern.search(name)
        assert match is not None
        assert glob_by_group[str(match.lastgroup)] == glob
    assert pattern.search("model.layers.3.up") is None


@for_transformers("dtype_plan")
def test_a_family_keeps_modules_in_float32() -> None:
    model = tiny("olmoe")
    assert not transformers_private.dtype_plan(model, torch.bfloat16)
    model._keep_in_fp32_modules_strict = {"mlp.gate"}
    assert transformers_private.dtype_plan(model, torch.bfloat16) == {"mlp.gate": torch.float32}
    assert not transformers_private.dtype_plan(model, torch.float32)


@for_transformers("is_fp8_dequantization")
def test_fp8_is_dequantized_by_an_operation_that_can_be_replaced() -> None:
    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=None))
    for operation in (Fp8Dequantize(quantizer), BlockDequantize(quantizer)):
        assert transformers_private.is_fp8_dequantization(operation)
        assert operation.hf_quantizer is quantizer
    assert not transformers_private.is_fp8_dequantization(object())
    # models/fp8.py overrides this method, which convert must call
    parameters = list(inspect.signature(Fp8Dequantize._dequantize_one).parameters)
    assert parameters == ["self", "quantized", "scales", "output_dtype"]
    assert "_dequantize_one" in inspect.getsource(Fp8Dequantize.convert)


@for_transformers("revert_conversion")
def test_tensors_get_their_names_on_the_hub(mixtral: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixtral)
    stored = load_file(mixtral / "model.safetensors")
    reverted = transformers_private.revert_conversion(model, model.state_dict())
    assert reverted.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in reverted.items())
    gate, placeholder = "model.layers.0.mlp.gate.weight", torch.empty(0, device="meta")
    renamed = transformers_private.revert_conversion(model, {gate: placeholder})
    assert list(renamed) == [gate.replace("mlp", "block_sparse_moe")]
    assert next(iter(renamed.values())) is placeholder


@for_transformers("copy_conversions")
def test_conversions_are_copied_from_a_loaded_model(mixtral: Path) -> None:
    source, target = AutoModelForCausalLM.from_pretrained(mixtral), random_model(tiny_config("mixtral"))
    assert source._weight_conversions, "loading sets no _weight_conversions any more"
    source._weight_conversions = []  # unlike those of the family
    transformers_private.copy_conversions(source, target)
    assert INSIDE in transformers_private.revert_conversion(target, target.state_dict())


@for_transformers("forget_quantizer")
def test_a_model_without_quantizer_is_saved_as_the_family_does(mixtral: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixtral)
    model.hf_quantizer = SimpleNamespace(
        is_serializable=lambda *_, **__: False, quantization_config=SimpleNamespace(quant_method="none")
    )
    model._weight_conversions = []
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
    transformers_private.forget_quantizer(model)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(mixtral / "model.safetensors").keys()


@for_transformers("mark_initialized")
@pytest.mark.parametrize("marks_module", [True, False])
def test_marked_modules_and_tensors_are_not_initialized(marks_module: bool) -> None:
    model = tiny("olmoe")
    for is_marked in (False, True):
        head = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
        nn.init.constant_(head.weight, 7.0)
        if is_marked:
            transformers_private.mark_initialized(head if marks_module else head.weight)
        model.lm_head = head
        model.initialize_weights()
        assert bool((head.weight == 7).all()) == is_marked


@for_transformers("ignored_patterns")
def test_a_family_ignores_stored_names(mixtral: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(mixtral, folder)
    edit_tensors(folder, lambda tensors: {**tensors, "multi_token.weight": torch.ones(2, 2)})
    plain = type(tiny("mixtral"))
    ignoring = type("Ignoring", (plain,), {"_keys_to_ignore_on_load_unexpected": [r"multi_token"]})
    unexpected = {}
    for cls in (plain, ignoring):
        model, report = cls.from_pretrained(folder, output_loading_info=True)
        unexpected[cls] = "multi_token.weight" in report["unexpected_keys"]
        assert ("multi_token" in transformers_private.ignored_patterns(model)) == (cls is ignoring)
    assert unexpected == {plain: True, ignoring: False}


@for_transformers("tied_weights")
def test_tied_weights_have_names() -> None:
    assert transformers_private.tied_weights(tiny("olmoe")) == {}
    tied = transformers_private.tied_weights(random_model(tiny_config("olmoe", tie_word_embeddings=True)))
    assert tied == {"lm_head.weight": "model.embed_tokens.weight"}


@for_transformers("model_classes")
def test_an_auto_class_lists_its_model_classes() -> None:
    olmoe = tiny_config("olmoe")
    assert transformers_private.model_classes(AutoModelForCausalLM, olmoe) == {"OlmoeForCausalLM"}
    assert transformers_private.model_classes(AutoModelForMultimodalLM, olmoe) == set()
    assert transformers_private.model_classes(AutoModelForCausalLM, SimpleNamespace()) == set()


@for_transformers("generation_config_of_model")
def test_defaults_of_generation_are_read_from_config_json(tmp_path: Path) -> None:
    tiny_config("olmoe").save_pretrained(tmp_path)
    edit_config(tmp_path, eos_token_id=77)
    config = transformers_private.generation_config_of_model(tmp_path)
    assert config.eos_token_id == 77
    assert config._from_model_config


class NoConfig(QuantizationConfigMixin):
    """A quantization method that does nothing."""


@for_transformers("register_quantizer")
def test_a_quantization_method_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer

    for name in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        monkeypatch.setattr(auto, name, dict(getattr(auto, name)))
    quantizer = type("NoQuantizer", (HfQuantizer,), {})
    for _ in range(2):
        transformers_private.register_quantizer("gemq_test", NoConfig, quantizer)
    assert auto.AUTO_QUANTIZER_MAPPING["gemq_test"] is quantizer
    config = auto.AutoQuantizationConfig.from_dict({"quant_method": "gemq_test"})
    assert isinstance(config, NoConfig)


METHOD_MODULE = """
from gemq.runtime.compat.transformers_private import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
register_quantizer("gemq_test", type("Config", (QuantizationConfigMixin,), {}), type("Quantizer", (HfQuantizer,), {}))
"""


@for_transformers("register_deferred")
def test_a_quantization_method_is_imported_with_its_first_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers.quantizers import auto

    for name in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        monkeypatch.setattr(auto, name, dict(getattr(auto, name)))
    (tmp_path / "gemq_test_method.py").write_text(METHOD_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    transformers_private.register_deferred("gemq_test", "gemq_test_method")
    values = {"quant_method": "gemq_test"}
    assert auto.AutoHfQuantizer.supports_quant_method(values)
    assert "gemq_test" not in auto.AUTO_QUANTIZER_MAPPING
    config = auto.AutoHfQuantizer.merge_quantization_configs(values, None)
    assert type(config).__name__ == "Config"
    assert auto.AUTO_QUANTIZER_MAPPING["gemq_test"].__name__ == "Quantizer"


@for_transformers("has_adapter")
def test_adapters_of_a_model_are_noticed() -> None:
    peft = pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)
    model = tiny("olmoe")
    assert not transformers_private.has_adapter(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert transformers_private.has_adapter(model)


@for_transformers("attention_implementation")
@for_transformers("select_attention")
def test_another_attention_runs_inside_the_context() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls = []

    def attend(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    transformers.AttentionInterface.register("gemq_test", attend)
    model = tiny("olmoe")
    original = transformers_private.attention_implementation(model.config)
    assert original in ("sdpa", "eager")
    with transformers_private.select_attention(model.config, "gemq_test"):
        assert transformers_private.attention_implementation(model.config) == "gemq_test"
        model(tokens())
    assert len(calls) == model.config.num_hidden_layers
    model(tokens())
    assert len(calls) == model.config.num_hidden_layers
    assert transformers_private.attention_implementation(model.config) == original
    assert transformers_private.attention_implementation(SimpleNamespace()) is None


@for_transformers("register_experts")
@for_transformers("select_experts")
def test_another_experts_implementation_runs_inside_the_context() -> None:
    calls = []

    def run(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        calls.append((hidden.shape, top_k_index.shape, top_k_weights.shape))
        return torch.zeros_like(hidden)

    for _ in range(2):
        transformers_private.register_experts("gemq_test", run)
    model, ids = tiny("olmoe"), tokens()
    expected = model(ids).logits
    model.set_experts_implementation("gemq_test")
    with transformers_private.select_experts(model.config, "eager"):
        assert torch.equal(model(ids).logits, expected)
    assert not calls
    assert not torch.equal(model(ids).logits, expected)
    config = model.config
    pairs = ids.numel(), config.num_experts_per_tok
    assert calls == [((ids.numel(), config.hidden_size), pairs, pairs)] * config.num_hidden_layers


def experts_of(family: str) -> Any:
    """The first experts module of a tiny model."""
    return next(module for module in tiny(family).modules() if hasattr(module, "is_transposed"))


@for_transformers("expert_activation")
def test_experts_modules_have_a_gate_or_an_activation() -> None:
    x = torch.randn(3, 64)
    gated, plain = experts_of("olmoe"), experts_of("nemotron_h")
    gate, up = x.chunk(2, -1)
    assert torch.equal(transformers_private.expert_activation(gated)(x), gated.act_fn(gate) * up)
    assert not plain.has_gate
    assert torch.equal(transformers_private.expert_activation(plain)(x), plain.act_fn(x))
    assert {"has_gate", "has_bias", "is_transposed", "is_concatenated", "act_fn"} <= set(dir(gated))


@for_transformers("set_default_gate")
def test_only_modules_without_a_gate_get_one() -> None:
    gated, gateless = experts_of("olmoe"), SimpleNamespace(has_gate=True)
    for module in (gated, gateless):
        transformers_private.set_default_gate(module, torch.neg)
    assert transformers_private.expert_activation(gated) is not torch.neg
    assert transformers_private.expert_activation(gateless) is torch.neg


@for_transformers("supports_static_cache")
def test_families_declare_support_for_static_caches() -> None:
    assert transformers_private.supports_static_cache(tiny("olmoe"))
    assert not PreTrainedModel._can_compile_fullgraph


def test_every_function_has_a_test() -> None:
    check_complete(transformers_private)
