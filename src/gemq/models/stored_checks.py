"""Checks from names, types and shapes alone that a model takes everything that its files store.

Transformers drops tensors that it has no place for, casts codes to weights without their scales, and keeps one of two
tensors for the same place. Here each of these raises a UserError that names the tensor. Reads no weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gemq.errors import UserError
from gemq.runtime.compat import transformers_private
from gemq.runtime.upload import Span

if TYPE_CHECKING:
    from transformers import WeightConverter

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types in which weights are stored as they are. Floats of 8 bits are codes, which need scales."""

COMPUTED_BUFFER = re.compile(r"(^|[._])(inv_freq|cos_cached|sin_cached|position_ids|num_batches_tracked|masked_bias)$")
"""Buffers that older versions of Transformers stored. Models compute them."""

ATTENTION_MASK = re.compile(r"(^|\.)attn(ention)?\.bias$")
"""Stored attention masks, [1, 1, length, length]. The bias of a linear has one dimension."""

CACHE_SCALE = re.compile(r"(^|[._])[kvq](_proj)?([._](output|cache))?_scale$")
"""A number with which a server quantizes its cache of keys and values. It does not concern weights."""

ACTIVATION_SCALE = re.compile(r"\.(input|activation)_scale(_inv)?$")
"""Scales of activations of an FP8 model. They are not needed once its weights are dequantized."""

MULTI_TOKEN_MODULE = re.compile(r"(^|\.)(mtp|nextn)")
"""Modules that predict several tokens per step. Transformers' models do not have them."""

MULTI_TOKEN_PARTS = {"eh_proj", "enorm", "hnorm", "shared_head"}
"""Parts of such a module where it is stored as one more decoder layer."""

SCALE = re.compile(r"(scales?(_inv|_\d+)?|qscale_\w+|qweight|qzeros|g_idx|weight_packed|weight_shape|absmax|_blocks)$")
"""Names that quantized formats give to codes and scales."""

EXPERT_MATRIX = re.compile(r"(.*\bexperts\.)(\d+)(\..*)")
"""A matrix of one expert: prefix, number of the expert, suffix."""

LAYER_PATH = re.compile(r"(.*\b(?:layers|blocks|h)\.(\d+))\.")
"""A name inside a decoder layer: path of the layer, and its number."""


class Target(NamedTuple):
    """Where a stored tensor goes.

    Attributes:
        name: the (first) tensor inside the model that it is a source of; not in the model if it has no place for it
        converter: makes that tensor from one or more stored ones; None if the stored one is only renamed
        renamed: the stored name after renaming, before conversion
    """

    name: str
    converter: WeightConverter | None
    renamed: str

    @property
    def is_dequantized(self) -> bool:
        """Whether the converter makes weights from codes and scales."""
        return any("Dequantize" in type(x).__name__ for x in getattr(self.converter, "operations", ()))

    @property
    def is_fp8(self) -> bool:
        """Whether the stored tensor holds FP8 codes or their scales."""
        operations = getattr(self.converter, "operations", ())
        return any(transformers_private.is_fp8_dequantization(operation) for operation in operations)


def find_targets(
    names: Iterable[str], placeholders: dict[str, Tensor], weight_mapping: Iterable[Any] | None, prefix: str
) -> dict[str, Target]:
    """Finds the target of each stored name, as Transformers' own loading does.

    Args:
        names: stored names
        placeholders: the model's tensors by name
        weight_mapping: the model's renamings and converters
        prefix: the model's ``base_model_prefix``
    """
    renamings, converters = transformers_private.split_mapping(weight_mapping)
    by_pattern: dict[str, WeightConverter] = {}
    for converter in converters:
        by_pattern.update(dict.fromkeys(converter.source_patterns, converter))
    targets = {}
    for name in names:
        target, pattern = transformers_private.rename_stored(name, renamings, converters, prefix, placeholders)
        if target not in placeholders and name in placeholders:
            target, pattern = transformers_private.rename_stored(name, [], [], prefix, placeholders)
        renamed = name
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        targets[name] = Target(target, None if pattern is None else by_pattern[pattern], renamed)
    return targets


class StoredTensors:
    """The tensors that a model's files store, and their targets."""

    def __init__(
        self, origin: str, spans: Mapping[str, Span], targets: Mapping[str, Target], placeholders: Mapping[str, Tensor]
    ):
        """
        Args:
            origin: name of the model in messages
            spans: type, shape and file position of each stored tensor
            targets: target of each stored tensor
            placeholders: the model's tensors by name, in the types that Transformers gives them
        """
        self._origin, self._spans, self._targets, self._placeholders = origin, spans, targets, placeholders
        self._renamed = {target.renamed for target in targets.values()}
        self._sources: dict[str, list[str]] = {}  # name inside the model -> stored names
        for name, target in targets.items():
            if target.name in placeholders:
                self._sources.setdefault(target.name, []).append(name)

    def types(self) -> dict[str, torch.dtype]:
        """Returns the type in which the files store each tensor of the model, except dequantized ones."""
        types = {}
        for target, names in self._sources.items():
            if any(self._targets[name].is_dequantized and self._is_code(name) for name in names):
                continue
            types[target] = self._spans[names[0]].dtype
            for name in names[1:]:
                types[target] = torch.promote_types(types[target], self._spans[name].dtype)
        return types

    def check(self, ignored: Iterable[str], depth: int | None) -> list[str]:
        """Refuses tensors that the model would not take as they are meant.

        Args:
            ignored: regular expressions of stored names that the family ignores
            depth: number of decoder layers according to config.json, if it has one

        Returns:
            Names of stored matrices that the model does not take: modules that predict several tokens, and ``ignored``.

        Raises:
            UserError: names the tensor
        """
        for name, target in self._targets.items():
            if target.name in self._placeholders:
                self._check_type(name, target)
        unexpected = self._check_used(ignored, depth)
        self._check_unique()
        return unexpected

    def _is_code(self, name: str) -> bool:
        """Returns whether a stored tensor holds codes, not weights."""
        return self._spans[name].dtype not in FLOATS

    def _check_type(self, name: str, target: Target) -> None:
        """Refuses a type that does not fit the target: codes without scales, or scales without codes."""
        kind, expected = self._spans[name].dtype, self._placeholders[target.name].dtype
        stores = f"{self._origin} stores {name} as {short_type(kind)}"
        if target.is_fp8 and not SCALE.search(target.renamed):
            has_scale = f"{target.renamed}_scale_inv" in self._renamed
            if has_scale != self._is_code(name):
                problem = "though it stores scales for it" if has_scale else "without scales"
                raise UserError(f"{stores} {problem}: copy the model again")
        elif target.is_dequantized:
            return  # the conversion checks codes and scales itself
        elif expected.is_floating_point and kind not in FLOATS:
            raise UserError(
                f"{stores}, and config.json has no quantization_config that says what that means: give the model in "
                "16 or 32 bits"
            )
        elif kind.is_floating_point and not expected.is_floating_point:
            raise UserError(f"{stores} where the model has {short_type(expected)}: copy the model again")

    def _check_used(self, ignored: Iterable[str], depth: int | None) -> list[str]:
        """Refuses tensors without a place in the model, unless they are ignored or harmless.

        Returns:
            Names of ignored matrices.
        """
        patterns = [MULTI_TOKEN_MODULE, *map(re.compile, ignored)]
        unused = sorted(name for name, target in self._targets.items() if target.name not in self._placeholders)
        multi_token_layers = {_layer_of(name)[0] for name in unused if MULTI_TOKEN_PARTS & set(name.split("."))}
        has_dequantized = any(target.is_dequantized for target in self._targets.values())
        unexpected, unknown = [], []
        for name in unused:
            layer, _ = _layer_of(name)
            names = (name, self._targets[name].name)
            is_ignored = any(pattern.search(n) for pattern in patterns for n in names)
            if is_ignored or (layer and layer in multi_token_layers):
                unexpected.append(name)
            elif not _is_harmless(name, self._spans[name].shape, has_dequantized):
                unknown.append(name)
        if unknown:
            raise UserError(self._no_place_message(unknown, depth))
        return [name for name in unexpected if len(self._spans[name].shape) > 1]

    def _no_place_message(self, names: list[str], depth: int | None) -> str:
        """Returns the error message for stored tensors that the model has no place for."""
        example = next((name for name in names if SCALE.search(name)), names[0])
        if SCALE.search(example):
            reason = (
                "these are parts of a quantized model, and config.json has no quantization_config for them: "
                "give the model in 16 or 32 bits"
            )
        elif depth is not None and _layer_of(example)[1] >= depth:
            reason = f"config.json says that it has {depth} layers: correct config.json, or copy the model again"
        else:
            reason = "config.json may lack an option (such as attention_bias): correct it, or copy the model again"
        return f"{self._origin} stores {len(names)} tensors that the model has no place for, first {example}; {reason}"

    def _check_unique(self) -> None:
        """Refuses two tensors for one place: experts both fused and separate, or two names for one tensor."""
        for target, names in self._sources.items():
            first_converter = self._targets[names[0]].converter
            by_renamed: dict[str, str] = {}
            for name in names:
                converter = self._targets[name].converter
                rival = by_renamed.setdefault(self._targets[name].renamed, name)
                if converter is None or converter is not first_converter:
                    rival = names[0]
                if rival != name:
                    raise UserError(
                        f"{self._origin} stores {target} twice, as {rival} and as {name}: delete one from the files"
                    )

    def check_shapes(self, report: Any) -> set[str]:
        """Refuses shapes that the model does not have, and tensors that cannot be converted.

        Args:
            report: of Transformers, after it has loaded the tensors without contents

        Returns:
            Names inside the model of tensors whose conversion needs contents.

        Raises:
            UserError: names the tensor
        """
        need_contents = set()
        for name, error in report.conversion_errors.items():
            sources = sorted(self.sources(name))
            if missing := self._missing_matrix(sources):
                raise UserError(f"{self._origin} lacks {missing}: copy the model again")
            if any(self._targets[s].is_dequantized and not self._targets[s].is_fp8 for s in sources):
                need_contents.add(name)
                continue
            reason = next((x for x in reversed(error.splitlines()) if "Error: " in x and "Ckpt" not in x), error)
            raise UserError(
                f"cannot make {name} of {self._origin} from {len(sources)} stored tensors ({reason.strip()[:200]}): "
                "copy the model again"
            )
        for name, stored, expected in sorted(report.mismatched_keys, key=str):
            raise UserError(
                f"{self._origin} stores {name} as {list(stored)}, and by config.json it is {list(expected)}: "
                "correct config.json, or copy the model again"
            )
        return need_contents

    def sources(self, target: str) -> list[str]:
        """Returns the names of the stored tensors that a tensor inside the model is made from."""
        return self._sources.get(target, [])

    def _missing_matrix(self, sources: list[str]) -> str | None:
        """Returns the name of the first expert's matrix that the stored sources of fused experts lack."""
        matches = [EXPERT_MATRIX.match(name) for name in sources]
        stored = {match.groups() for match in matches if match}
        experts = sorted({expert for _, expert, _ in stored}, key=int)
        for prefix, suffix in sorted({(prefix, suffix) for prefix, _, suffix in stored}):
            for expert in experts:
                if (prefix, expert, suffix) not in stored:
                    return f"{prefix}{expert}{suffix}"
        return None


def _layer_of(name: str) -> tuple[str, int]:
    """Returns path and number of the layer that a stored name lies in; ("", -1) outside of layers."""
    match = LAYER_PATH.match(name)
    return (match.group(1), int(match.group(2))) if match else ("", -1)


def _is_harmless(name: str, shape: tuple[int, ...], has_dequantized: bool) -> bool:
    """Returns whether a tensor without a place in the model does not affect what the model computes."""
    if COMPUTED_BUFFER.search(name):
        return True
    if ATTENTION_MASK.search(name) and len(shape) == 4 and shape[:2] == (1, 1):
        return True
    if CACHE_SCALE.search(name) and math.prod(shape) == 1:
        return True
    return has_dequantized and bool(ACTIVATION_SCALE.search(name))


def short_type(dtype: torch.dtype) -> str:
    """Returns a type as users write it, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def transformers_types(
    state: Mapping[str, Tensor], dtype_plan: Mapping[str, torch.dtype] | None
) -> dict[str, torch.dtype]:
    """Returns the types that Transformers' own loading gives a model's tensors.

    Args:
        state: the empty model's tensors by name
        dtype_plan: types by patterns of names, of modules that a family keeps in float32
    """
    types = {name: tensor.dtype for name, tensor in state.items()}
    if dtype_plan:
        pattern, by_group = transformers_private.compile_globs(dtype_plan)
        for name, kind in types.items():
            match = pattern.search(name)
            if match and match.lastgroup and kind.is_floating_point:
                types[name] = dtype_plan[by_group[match.lastgroup]]
    return types


def retype(model: nn.Module, types: Mapping[str, torch.dtype]) -> None:
    """Changes the types of an empty model's tensors. Loaded values are cast to these types."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in types and types[name] != tensor.dtype:
            tensor.data = torch.empty_like(tensor.data, dtype=types[name])
