"""Private interfaces of Transformers. "Since 5.17" means: in the oldest supported version, perhaps before it.

Must not import Transformers when it is imported. Transformers itself may be half imported then, and a changed interface
should break only what uses it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import GenerationConfig


@contextmanager
def weights_loaded_by(fill: Callable[[Any, Any], Any]) -> Iterator[None]:
    """Makes ``from_pretrained`` call ``fill`` in place of its own loading of weights, while the context is active.

    Relies on: the static method ``PreTrainedModel._load_pretrained_model(model, state_dict, files, load_config, ...)``,
    which returns a report and an index of offloaded tensors. Since 5.17.
    If it changes: no source model can be read.

    Args:
        fill: takes a model without contents and the ``LoadStateDictConfig``. Fills the model and returns the report, a
            ``LoadStateDictInfo``
    """
    from transformers import PreTrainedModel

    def load(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *_: Any, **__: Any) -> Any:
        return fill(model, load_config), None

    original: Any = vars(PreTrainedModel)["_load_pretrained_model"]
    PreTrainedModel._load_pretrained_model = staticmethod(load)  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = original  # type: ignore[method-assign]


def convert_into(model: Any, tensors: Mapping[str, Any], load_config: Any) -> Any:
    """Converts stored tensors, read or unread, and puts them into a model. Returns the report.

    Relies on: ``convert_and_load_state_dict_in_model``, which takes slices of safetensors files and meta tensors. Of
    the report ``missing_keys``, ``mismatched_keys`` and ``conversion_errors`` are used, and of ``load_config``
    ``weight_mapping``, ``dtype_plan`` and ``device_map``. Since 5.17.
    If it changes: no source model can be read.

    Args:
        model: may be on the meta device
        tensors: by stored name
        load_config: a ``LoadStateDictConfig``
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model

    report, _ = convert_and_load_state_dict_in_model(model=model, state_dict=dict(tensors), load_config=load_config)
    return report


def split_mapping(weight_mapping: Iterable[Any] | None) -> tuple[list[Any], list[Any]]:
    """Returns the renamings and the converters of a model's weight mapping.

    Relies on: the classes ``WeightRenaming`` and ``WeightConverter``, and their ``source_patterns``, ``operations`` and
    ``rename_source_key``. Since 5.17.
    If they change: checks of a source model's files refuse tensors that are needed.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    mapping = list(weight_mapping or ())
    renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
    return renamings, [x for x in mapping if isinstance(x, WeightConverter)]


def rename_stored(
    name: str, renamings: list[Any], converters: list[Any], prefix: str, placeholders: dict[str, Tensor]
) -> tuple[str, str | None]:
    """Returns the name inside the model of a stored tensor, and the source pattern of its converter if it has one.

    Relies on: ``rename_source_key``. Since 5.17.
    If it changes: checks of a source model's files refuse tensors that are needed.

    Args:
        name: stored name
        renamings: of the model's weight mapping
        converters: of the model's weight mapping
        prefix: the model's ``base_model_prefix``
        placeholders: the model's tensors by name
    """
    from transformers.core_model_loading import rename_source_key

    return rename_source_key(name, renamings, converters, base_model_prefix=prefix, meta_state_dict=placeholders)


def compile_globs(globs: Iterable[str]) -> tuple[re.Pattern[str], dict[str, str]]:
    """Returns one regular expression for all globs, and the glob of each of its groups.

    Relies on: ``build_glob_alternation``, which Transformers applies to dtype plans. Since 5.17.
    If it changes: modules that a family keeps in float32 lose precision.
    """
    from transformers.core_model_loading import build_glob_alternation

    pattern, glob_by_group = build_glob_alternation(list(globs))[:2]
    return pattern, glob_by_group


def dtype_plan(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Returns the types of modules that a family keeps in float32 when a model is loaded in ``dtype``, by glob.

    Relies on: ``PreTrainedModel._get_dtype_plan``. Since 5.17.
    If it changes: no packed checkpoint can be loaded.
    """
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    return plan


def is_fp8_dequantization(operation: object) -> bool:
    """Returns whether an operation of a weight converter makes weights from FP8 codes and scales.

    Relies on: ``Fp8Dequantize``. ``models/fp8.py`` derives from it. Since 5.17.
    If it changes: no FP8 source model can be read.
    """
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return isinstance(operation, Fp8Dequantize)


def revert_conversion(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a model's tensors under their names on the hub, with experts split as the family does there.

    Relies on: ``revert_weight_conversion``. A tensor that is only renamed stays the same object. Since 5.17.
    If it changes: checkpoints are written under names of the model, which other programs do not find.

    Args:
        model: its class and ``_weight_conversions`` decide the conversion; may be on the meta device
        tensors: by name inside the model
    """
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(tensors))


def copy_conversions(source: Any, target: Any) -> None:
    """Makes ``save_pretrained`` of ``target`` revert the conversions that ``source`` was loaded with.

    Relies on: ``PreTrainedModel._weight_conversions``, which loading sets. Since 5.17.
    If it changes: a model that was read in layers is saved under names of the model.
    """
    target._weight_conversions = source._weight_conversions


def forget_quantizer(model: Any) -> None:
    """Makes a dequantized model an ordinary one, so that it is not quantized again when it is saved.

    Relies on: ``hf_quantizer`` and ``_weight_conversions``, which includes dequantization. With None, saving uses the
    family's own conversions. Since 5.17.
    If they change: dense checkpoints of quantized source models are not readable.
    """
    model.hf_quantizer = None
    model._weight_conversions = None


def mark_initialized(target: Any) -> None:
    """Marks a module or tensor as initialized, so that Transformers does not initialize it.

    Relies on: the attribute ``_is_hf_initialized``. Since 5.17.
    If it changes: loading overwrites weights with random values, or fails on packed experts.
    """
    target._is_hf_initialized = True


def ignored_patterns(model: Any) -> Collection[str]:
    """Returns regular expressions of stored names that a family ignores.

    Relies on: ``PreTrainedModel._keys_to_ignore_on_load_unexpected``, None or a collection. Since 5.17.
    If it changes: source models that store modules for prediction of several tokens are refused.
    """
    return model._keys_to_ignore_on_load_unexpected or ()


def tied_weights(model: Any) -> dict[str, str]:
    """Returns the names of tied parameters, and for each the name of the parameter that it equals.

    Relies on: ``PreTrainedModel.all_tied_weights_keys``, which the constructor sets. Since 5.17.
    If it changes: tied weights are stored and counted twice.
    """
    tied: dict[str, str] = model.all_tied_weights_keys
    return tied


def model_classes(auto: Any, config: Any) -> set[str]:
    """Returns the names of the model classes that an Auto class has for a configuration.

    Relies on: ``_model_mapping`` of Auto classes, whose values are a class or several. Since 5.17.
    If it changes: no model can be loaded.
    """
    if type(config) not in auto._model_mapping:
        return set()
    classes = auto._model_mapping[type(config)]
    if not isinstance(classes, list | tuple):
        classes = (classes,)
    return {model_class.__name__ for model_class in classes}


def generation_config_of_model(directory: Path) -> GenerationConfig:
    """Reads the defaults of generation from config.json, as ``from_pretrained`` does without generation_config.json.

    Relies on: the argument ``_from_model_config`` of ``GenerationConfig.from_pretrained``. Since 5.17.
    If it changes: source models without generation_config.json cannot be read.
    """
    from transformers import GenerationConfig

    options: dict[str, Any] = {"config_file_name": "config.json", "_from_model_config": True}
    return GenerationConfig.from_pretrained(directory, **options)


def register_quantizer(method: str, config_class: type[Any], quantizer_class: type[Any]) -> None:
    """Registers a quantization method with Transformers. Further calls have no effect.

    Relies on: ``AUTO_QUANTIZER_MAPPING``, in which ``transformers.quantizers.auto`` looks up methods. The decorators
    that fill it raise ValueError at a second call. Since 5.17.
    If it changes: no packed checkpoint can be loaded.
    """
    from transformers.quantizers import auto

    if method not in auto.AUTO_QUANTIZER_MAPPING:
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(method, None)  # the placeholder of register_deferred
        auto.register_quantization_config(method)(config_class)
        auto.register_quantizer(method)(quantizer_class)


def register_deferred(method: str, module: str) -> None:
    """Registers a quantization method whose module is imported when the first checkpoint of it is loaded.

    Relies on: ``AUTO_QUANTIZATION_CONFIG_MAPPING`` of ``transformers.quantizers.auto``, which is asked first whether a
    method is known, then for a class whose ``from_dict`` takes ``quantization_config``. Only then is the quantizer
    looked up. Since 5.17.
    If it changes: ``from_pretrained`` loads no packed checkpoint before ``gemq.load`` or ``gemq.checkpoint.load`` was
    used, and says so.

    Args:
        method: name of the quantization method
        module: calls ``register_quantizer`` when it is imported
    """
    from transformers.quantizers import auto

    class Deferred:
        """Stands for the configuration class until a checkpoint is loaded."""

        @classmethod
        def from_dict(cls, values: Mapping[str, Any], **kwargs: Any) -> Any:
            """Returns the configuration, from the class that the module registers."""
            importlib.import_module(module)
            config_class: Any = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method]
            return config_class.from_dict(values, **kwargs)

    mapping: dict[str, Any] = getattr(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", {})
    mapping.setdefault(method, Deferred)


def has_adapter(model: Any) -> bool:
    """Returns whether adapters were added to a model by Transformers. Then only they are saved.

    Relies on: ``_hf_peft_config_loaded``. Since 5.17.
    If it changes: ``save_pretrained`` of adapters warns of absent checksums.
    """
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def attention_implementation(config: Any) -> str | None:
    """Returns the name of the attention that a model runs. None if it has no choice.

    Relies on: ``_attn_implementation``. Since 5.17.
    If it changes: decode falls back to a growing cache, and plans miss the memory of ``eager`` attention.
    """
    name: str | None = getattr(config, "_attn_implementation", None)
    return name


@contextmanager
def select_attention(config: Any, name: str) -> Iterator[None]:
    """Makes the model with this ``config`` run another attention while the context is active.

    Relies on: ``_attn_implementation``, which attention modules read at each call. Since 5.17.
    If it changes: decode runs another attention than the kernel of gemq.
    """
    original = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = original


@contextmanager
def select_experts(config: Any, name: str) -> Iterator[None]:
    """Makes the experts modules with this ``config`` run another implementation while the context is active.

    Relies on: ``_experts_implementation``, which experts modules read at each call. Since 5.17.
    If it changes: the check of the experts' arithmetic compares gemq's computation with itself.

    Args:
        config: of the model
        name: a registered implementation. ``eager`` is the forward of the family's class
    """
    original = config._experts_implementation
    config._experts_implementation = name
    try:
        yield
    finally:
        config._experts_implementation = original


def register_experts(name: str, function: Callable[..., Tensor]) -> None:
    """Registers an implementation of experts for ``set_experts_implementation``. Further calls have no effect.

    Relies on: ``transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS``, whose functions take an experts module, hidden
    states, indices and weights of the chosen experts. Since 5.17.
    If it changes: no source model can be read.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if name not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(name, function)


def expert_activation(module: Any) -> Callable[[Tensor], Tensor]:
    """Returns the function that an experts module applies between its matrices: [P, 2 I] -> [P, I] where it has a gate.

    Relies on: ``_apply_gate``, ``act_fn`` and ``has_gate`` of experts modules. Since 5.17.
    If they change: no model of several experts can be quantized or run.
    """
    function: Callable[[Tensor], Tensor] = module._apply_gate if module.has_gate else module.act_fn
    return function


def set_default_gate(module: Any, gate: Callable[[Tensor], Tensor]) -> None:
    """Gives an experts module a gate, [P, 2 I] -> [P, I], unless its class has one.

    Relies on: ``_apply_gate`` of experts modules. Since 5.17.
    If it changes: families without the experts interface cannot be quantized.
    """
    if not hasattr(module, "_apply_gate"):
        module._apply_gate = gate


def supports_static_cache(model: Any) -> bool:
    """Returns whether a family declares that it runs with a cache of fixed size.

    Relies on: ``PreTrainedModel._can_compile_fullgraph``. Since 5.17.
    If it changes: decode falls back to a growing cache.
    """
    return bool(model._can_compile_fullgraph)
