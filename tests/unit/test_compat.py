"""The private interfaces of PyTorch and Transformers still are as ``gemq.runtime.compat`` relies on.

A failure here after an upgrade names the function to correct, and says what breaks without it.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from model_folders import edit_config, edit_tensors, model_folder
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.quantization_config import QuantizationConfigMixin

from families import random_model, tiny, tiny_config, tokens
from gemq.kernels.modules import PackedExperts
from gemq.models.fp8 import BlockDequantize
from gemq.runtime.compat import torch_private, transformers_private

pytestmark = pytest.mark.sample
torch.set_num_threads(1)
SOURCES = Path(torch_private.__file__).parents[2]
CHECKED: set[str] = set()
"""Names that a test of this module is for."""


def relies_on(module: ModuleType, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a failed test say which function of ``module`` is to be corrected, and what breaks without it."""
    CHECKED.add(f"{module.__name__}.{name}")

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                test(*args, **kwargs)
            except (Exception, pytest.fail.Exception) as error:
                versions = f"PyTorch {torch.__version__}, Transformers {transformers.__version__}"
                advice = f"correct {name} in src/gemq/runtime/compat/{module.__name__.rpartition('.')[2]}.py"
                function = getattr(module, name)
                text = inspect.getdoc(function) if inspect.isfunction(function) else ""
                raise AssertionError(f"a private interface differs in {versions}: {advice}\n\n{text}") from error

        return run

    return decorate


def for_torch(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``relies_on`` for an interface of PyTorch."""
    return relies_on(torch_private, name)


def for_transformers(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``relies_on`` for an interface of Transformers."""
    return relies_on(transformers_private, name)


# PyTorch


class RecordingTensor(Tensor):
    """Counts the calls of its ``__torch_function__``."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        RecordingTensor.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@for_torch("disabled_torch_function")
def test_operations_on_a_subclass_return_plain_tensors() -> None:
    plain = type("Plain", (Tensor,), {"__torch_function__": torch_private.disabled_torch_function})
    x = torch.ones(2).as_subclass(plain)
    assert type(x) is plain
    assert type(x + 1) is Tensor
    assert type(x.detach()) is Tensor
    assert torch_private.disabled_torch_function is nn.Parameter.__torch_function__


@for_torch("without_torch_function")
def test_a_subclass_is_a_plain_tensor_inside_the_context() -> None:
    x = torch.ones(2).as_subclass(RecordingTensor)
    RecordingTensor.calls = 0
    with torch_private.without_torch_function():
        assert torch.equal(x + 1, torch.full((2,), 2.0))
    assert RecordingTensor.calls == 0
    x + 1
    assert RecordingTensor.calls > 0


@for_torch("map_instances")
def test_only_instances_in_nested_values_are_mapped() -> None:
    tree = ((torch.ones(1), 2), {"a": [torch.zeros(1), "b", None]})
    (first, number), named = torch_private.map_instances(Tensor, lambda x: x + 1, tree)
    assert (first.item(), number, named["a"][0].item(), named["a"][1:]) == (2.0, 2, 1.0, ["b", None])


@for_torch("write_count")
def test_writes_to_a_tensor_and_its_views_are_counted() -> None:
    x = torch.zeros(4)
    counts = [torch_private.write_count(x)]
    for write in (lambda: x.add_(1), lambda: x[:2].fill_(3), lambda: x.copy_(torch.ones(4))):
        write()
        counts.append(torch_private.write_count(x))
    assert counts == sorted(set(counts))
    x.sum()
    assert torch_private.write_count(x) == counts[-1]
    with torch.inference_mode():
        inference = torch.zeros(1)
    with pytest.raises(RuntimeError):
        torch_private.write_count(inference)


@for_torch("tensor_dict")
def test_tensors_of_a_module_can_be_replaced_in_its_dictionaries() -> None:
    module = nn.BatchNorm1d(3)
    plain = torch.full((3,), 2.0)
    torch_private.tensor_dict(module, "weight")["weight"] = plain
    torch_private.tensor_dict(module, "running_mean")["running_mean"] = plain
    assert module.weight is plain
    assert module.running_mean is plain
    assert dict(module.named_buffers())["running_mean"] is plain
    assert "weight" in module.state_dict()
    assert not torch_private.tensor_dict(module, "weight").keys() & {"running_mean"}


@for_torch("set_allocator_settings")
def test_the_allocator_takes_expandable_segments() -> None:
    torch_private.set_allocator_settings("expandable_segments:False")


@for_torch("close_graph_pool")
def test_the_pool_of_a_graph_is_closed_by_device_and_id() -> None:
    """A call needs a GPU: see tests/gpu/test_capture_failure.py."""
    declarations = ast.parse((Path(torch.__file__).parent / "_C/__init__.pyi").read_text())
    functions = {node.name: node for node in declarations.body if isinstance(node, ast.FunctionDef)}
    arguments = [argument.arg for argument in functions["_cuda_endAllocateToPool"].args.args]
    assert arguments == ["device", "mempool_id"]


@for_torch("pack_int4")
@for_torch("int4_matmul")
def test_a_product_with_nibbles_is_that_of_their_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns, group_size = 32, 64, 32
    nibbles = torch.randint(0, 16, (rows, columns), dtype=torch.int32, generator=generator)
    grid = torch.rand(columns // group_size, rows, 2, generator=generator).bfloat16()
    scales, midpoints = grid.float().repeat_interleave(group_size, 0).permute(2, 1, 0)
    weights = (nibbles - 8) * scales + midpoints
    x = torch.randn(3, columns, generator=generator).bfloat16()
    y = torch_private.int4_matmul(x, torch_private.pack_int4(nibbles), group_size, grid)
    assert y.dtype == torch.bfloat16
    expected = x.float() @ weights.T
    assert (y - expected).norm() < 0.01 * expected.norm()


@for_torch("compile_backend")
def test_a_backend_is_returned_by_name() -> None:
    graph = torch.fx.symbolic_trace(lambda x: x + 1)
    compiled = torch_private.compile_backend("eager")(graph, [torch.zeros(1)])
    assert compiled(torch.zeros(1)).item() == 1


@for_torch("dynamo_settings")
def test_settings_of_dynamo_hold_inside_the_context() -> None:
    config = torch._dynamo.config
    names = ("recompile_limit", "accumulated_recompile_limit", "force_parameter_static_shapes")
    before = [getattr(config, name) for name in names]
    with torch_private.dynamo_settings(12_345):
        assert [getattr(config, name) for name in names] == [12_345, 12_345, False]
    assert [getattr(config, name) for name in names] == before


@for_torch("mark_dynamic")
def test_marked_sizes_share_one_compilation() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: x * 2, backend=backend, fullgraph=True, dynamic=False)
    for size in (5, 6, 7):
        x = torch.ones(size)
        torch_private.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), torch.full((size,), 2.0))
    assert len(graphs) == 1


@for_torch("compile_with_inductor")
def test_inductor_takes_options_and_decompositions() -> None:
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    assert hasattr(config, "combo_kernels")
    assert {"config_patches", "decompositions"} <= inspect.signature(compile_fx).parameters.keys()
    if shutil.which("g++") is None:
        pytest.skip("Inductor needs a compiler")
    shapes = []

    def decompose(a: Tensor, b: Tensor) -> Any:
        shapes.append((tuple(a.shape), tuple(b.shape)))
        return (a.unsqueeze(2) * b.unsqueeze(0)).sum(1) if len(shapes) == 1 else NotImplemented

    def backend(graph: Any, inputs: Any) -> Any:
        options = {"combo_kernels": True}
        return torch_private.compile_with_inductor(graph, inputs, options, {torch.ops.aten.mm.default: decompose})

    x = torch.randn(3, 4)
    compiled = torch.compile(lambda x: (x @ x.T) @ x, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), (x @ x.T) @ x)
    assert ((3, 4), (4, 3)) in shapes
    assert ((3, 3), (3, 4)) in shapes


def test_packed_experts_save_and_load_by_the_hooks_of_modules() -> None:
    for name in ("_save_to_state_dict", "_load_from_state_dict"):
        parameters = [list(inspect.signature(getattr(c, name)).parameters) for c in (PackedExperts, nn.Module)]
        assert parameters[0] == parameters[1], f"correct PackedExperts.{name} in src/gemq/kernels/modules.py"


# Transformers


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
    assert json.loads(config.to_json_string()).keys() & {"eos_token_id"}


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
    gated, other = experts_of("olmoe"), SimpleNamespace(has_gate=True)
    for module in (gated, other):
        transformers_private.set_default_gate(module, torch.neg)
    assert transformers_private.expert_activation(gated) is not torch.neg
    assert transformers_private.expert_activation(other) is torch.neg


@for_transformers("default_gate")
def test_the_default_gate_multiplies_both_halves() -> None:
    x = torch.randn(3, 64)
    gate, up = x.chunk(2, -1)
    module = SimpleNamespace(act_fn=torch.tanh)
    assert torch.equal(transformers_private.default_gate()(module, x), gate.tanh() * up)


@for_transformers("supports_static_cache")
def test_families_declare_support_for_static_caches() -> None:
    assert transformers_private.supports_static_cache(tiny("olmoe"))
    assert not PreTrainedModel._can_compile_fullgraph


# gemq itself


def test_every_private_interface_has_a_test() -> None:
    for module in (torch_private, transformers_private):
        for name, value in vars(module).items():
            is_defined_here = getattr(value, "__module__", None) == module.__name__
            if inspect.isfunction(value) and is_defined_here and not name.startswith("_"):
                assert f"{module.__name__}.{name}" in CHECKED, f"{name} has no test here"
                assert "Relies on: " in str(value.__doc__), name
                assert "change" in str(value.__doc__), name


ALLOWED = {
    *("_fields", "_asdict"),  # documented, of NamedTuple
    "_exit",  # documented, of os
}
"""Names with an underscore that may be used outside of ``gemq.runtime.compat`` though gemq does not define them."""

PRIVATE_MODULES = ("transformers.core_model_loading", "transformers.integrations.moe", "transformers.quantizers.auto")
"""Undocumented modules, besides those with an underscore in their names."""


def _private_names(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """Line and name of each private attribute and module that a file uses, and whether it is one of ``self``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            yield node.lineno, node.attr, ast.unparse(node.value) in ("self", "cls", "super()")
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            is_private = node.module in PRIVATE_MODULES or any(part.startswith("_") for part in parts[1:])
            if parts[0] in ("torch", "transformers") and is_private:
                yield node.lineno, node.module, False


def _defined_names(tree: ast.Module) -> set[str]:
    """Names of functions, classes, variables and attributes of ``self`` that a file defines."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


def test_private_interfaces_are_used_in_compat_only() -> None:
    trees = {path: ast.parse(path.read_text()) for path in SOURCES.rglob("*.py")}
    in_compat = [trees.pop(path) for path in list(trees) if path.parent.name == "compat"]
    private = {name for tree in in_compat for _, name, _ in _private_names(tree)}
    public = ALLOWED.union(*map(_defined_names, trees.values()))
    uses = []
    for path, tree in trees.items():
        for line, name, is_of_self in _private_names(tree):
            if name not in public or (name in private and not is_of_self):
                uses.append(f"{path.relative_to(SOURCES)}:{line} {name}")
    assert not uses, f"move these to gemq/runtime/compat: {uses}"
