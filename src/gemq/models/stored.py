"""Whether a model takes everything that its files store, judged from names, types and shapes alone.

Transformers drops tensors that it has no place for, casts codes to weights without their scales, and keeps one of two
tensors that have the same place. Here each of these ends in a UserError that names the tensor. Reads no weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from gemq.errors import UserError
from gemq.runtime.upload import Span

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types in which weights are stored as they are. Floats of 8 bits are codes, which mean nothing without scales."""

COMPUTED = re.compile(r"(^|[._])(inv_freq|cos_cached|sin_cached|position_ids|num_batches_tracked|masked_bias)$")
"""Buffers that older versions of Transformers stored and that models compute themselves."""

MASK = re.compile(r"(^|\.)attn(ention)?\.bias$")
"""Stored attention masks, [1, 1, length, length]. The bias of a linear has one dimension."""

CACHE_SCALE = re.compile(r"(^|[._])[kvq](_proj)?([._](output|cache))?_scale$")
"""One number with which a server quantizes its cache of keys and values. It does not concern weights."""

ACTIVATION_SCALE = re.compile(r"\.(input|activation)_scale(_inv)?$")
"""Scales of activations of an FP8 model. Once its weights are dequantized, its activations are not quantized."""

FURTHER_TOKENS = re.compile(r"(^|\.)(mtp|nextn)")
"""Modules that predict several tokens at once. Transformers' models do not have them."""

FURTHER_TOKENS_PARTS = {"eh_proj", "enorm", "hnorm", "shared_head"}
"""A decoder layer behind the model's last one that has one of these parts is such a module, too."""

SCALE = re.compile(r"(scales?(_inv|_\d+)?|qscale_\w+|qweight|qzeros|g_idx|weight_packed|weight_shape|absmax|_blocks)$")
"""Names that quantized formats give to codes and scales."""

EXPERT = re.compile(r"(.*\bexperts\.)(\d+)(\..*)")

LAYER = re.compile(r"(.*\b(?:layers|blocks|h)\.(\d+))\.")


class Target(NamedTuple):
    """Where a stored tensor goes.

    name:      the (first) tensor inside the model that it is a source of; absent there if the model has no place for it
    converter: makes that tensor from one or more stored ones; None if the stored one is only renamed
    renamed:   the stored name after renaming, before conversion
    """

    name: str
    converter: WeightConverter | None
    renamed: str

    @property
    def dequantized(self) -> bool:
        """Whether the converter makes weights from codes and scales."""
        return any("Dequantize" in type(x).__name__ for x in getattr(self.converter, "operations", ()))

    @property
    def is_fp8(self) -> bool:
        """Whether these are codes of FP8, or its scales."""
        return any(isinstance(x, Fp8Dequantize) for x in getattr(self.converter, "operations", ()))


def find_targets(
    names: Iterable[str], empty: dict[str, Tensor], weight_mapping: Iterable[Any] | None, prefix: str
) -> dict[str, Target]:
    """The target of each stored name, found as Transformers' own loading finds it.

    Args:
        names: stored names.
        empty: the model's tensors by name.
        weight_mapping: the model's renamings and converters.
        prefix: the model's ``base_model_prefix``.
    """
    renamings = [x for x in weight_mapping or () if isinstance(x, WeightRenaming)]
    converters = [x for x in weight_mapping or () if isinstance(x, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    targets = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, prefix, empty)
        if target not in empty and name in empty:
            target, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=empty)
        renamed = name
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        targets[name] = Target(target, None if pattern is None else by_pattern[pattern], renamed)
    return targets


class Stored:
    """The tensors that a model's files store, and their targets."""

    def __init__(
        self, origin: str, spans: Mapping[str, Span], targets: Mapping[str, Target], empty: Mapping[str, Tensor]
    ):
        """
        Args:
            origin: how messages call the model.
            spans: type, shape and place of each stored tensor.
            targets: where each of them goes.
            empty: the model's tensors by name, in the types that Transformers gives them.
        """
        self._origin, self._spans, self._targets, self._empty = origin, spans, targets, empty
        self._renamed = {target.renamed for target in targets.values()}
        self._sources: dict[str, list[str]] = {}  # name inside the model -> stored names
        for name, target in targets.items():
            if target.name in empty:
                self._sources.setdefault(target.name, []).append(name)

    def types(self) -> dict[str, torch.dtype]:
        """The type in which the files store each tensor of the model, without those that are dequantized."""
        found = {}
        for target, names in self._sources.items():
            if not any(self._targets[name].dequantized and self._is_code(name) for name in names):
                found[target] = self._spans[names[0]].dtype
                for name in names[1:]:
                    found[target] = torch.promote_types(found[target], self._spans[name].dtype)
        return found

    def check(self, ignored: Iterable[str], layers: int | None) -> list[str]:
        """Refuses what the model would not take as it is meant.

        Args:
            ignored: regular expressions of stored names that the family leaves out.
            layers: the number of decoder layers by config.json, if it says that.

        Returns:
            Names of stored matrices that are left out: modules for predicting several tokens, and those ``ignored``.

        Raises:
            UserError: names the tensor.
        """
        for name, target in self._targets.items():
            if target.name in self._empty:
                self._check_type(name, target)
        left_out = self._check_used(ignored, layers)
        self._check_once()
        return left_out

    def _is_code(self, name: str) -> bool:
        return self._spans[name].dtype not in FLOATS

    def _check_type(self, name: str, target: Target) -> None:
        kind, expected = self._spans[name].dtype, self._empty[target.name].dtype
        stores = f"{self._origin} stores {name} as {short_type(kind)}"
        if target.is_fp8 and not SCALE.search(target.renamed):
            has_scale = f"{target.renamed}_scale_inv" in self._renamed
            if has_scale != self._is_code(name):
                problem = "though it stores scales for it" if has_scale else "without scales"
                raise UserError(f"{stores} {problem}: copy the model again")
        elif target.dequantized:
            return  # the conversion itself checks what belongs together
        elif expected.is_floating_point and kind not in FLOATS:
            raise UserError(
                f"{stores}, and config.json has no quantization_config that says what that means: give the model in "
                "16 or 32 bits"
            )
        elif kind.is_floating_point and not expected.is_floating_point:
            raise UserError(f"{stores} where the model has {short_type(expected)}: copy the model again")

    def _check_used(self, ignored: Iterable[str], layers: int | None) -> list[str]:
        patterns = [FURTHER_TOKENS, *map(re.compile, ignored)]
        unused = sorted(name for name, target in self._targets.items() if target.name not in self._empty)
        predictors = {_layer(name)[0] for name in unused if FURTHER_TOKENS_PARTS & set(name.split("."))}
        dequantized = any(target.dequantized for target in self._targets.values())
        left_out, unknown = [], []
        for name in unused:
            path, _ = _layer(name)
            names = (name, self._targets[name].name)
            if any(p.search(n) for p in patterns for n in names) or (path and path in predictors):
                left_out.append(name)
            elif not _is_harmless(name, self._spans[name].shape, dequantized):
                unknown.append(name)
        if unknown:
            raise UserError(self._no_place(unknown, layers))
        return [name for name in left_out if len(self._spans[name].shape) > 1]

    def _no_place(self, names: list[str], layers: int | None) -> str:
        first = next((name for name in names if SCALE.search(name)), names[0])
        if SCALE.search(first):
            why = (
                "these are parts of a quantized model, and config.json has no quantization_config for them: "
                "give the model in 16 or 32 bits"
            )
        elif layers is not None and _layer(first)[1] >= layers:
            why = f"config.json says that it has {layers} layers: correct config.json, or copy the model again"
        else:
            why = "config.json may lack an option (such as attention_bias): correct it, or copy the model again"
        return f"{self._origin} stores {len(names)} tensors that the model has no place for, first {first}; {why}"

    def _check_once(self) -> None:
        """Refuses two tensors for one place: experts fused and one by one, or two names for one tensor."""
        for target, names in self._sources.items():
            converters = [self._targets[name].converter for name in names]
            by_renamed: dict[str, str] = {}
            for name, converter in zip(names, converters, strict=True):
                other = by_renamed.setdefault(self._targets[name].renamed, name)
                if converter is None or converter is not converters[0]:
                    other = names[0]
                if other != name:
                    raise UserError(
                        f"{self._origin} stores {target} twice, as {other} and as {name}: delete one from the files"
                    )

    def check_shapes(self, report: Any) -> set[str]:
        """Refuses shapes that the model does not have, and tensors that cannot be put together.

        Args:
            report: of Transformers, after it has loaded the tensors without their contents.

        Returns:
            Names inside the model of what can only be put together from contents.

        Raises:
            UserError: names the tensor.
        """
        unknown = set()
        for name, error in report.conversion_errors.items():
            sources = sorted(self.sources(name))
            if absent := self._absent(sources):
                raise UserError(f"{self._origin} lacks {absent}: copy the model again")
            if any(self._targets[s].dequantized and not self._targets[s].is_fp8 for s in sources):
                unknown.add(name)
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
        return unknown

    def sources(self, target: str) -> list[str]:
        """Names of the stored tensors that a tensor inside the model is made from."""
        return self._sources.get(target, [])

    def _absent(self, sources: list[str]) -> str | None:
        """The first expert's matrix that is not among the stored names of fused experts."""
        found = [match.groups() for name in sources if (match := EXPERT.match(name))]
        stored, indices = set(found), sorted({index for _, index, _ in found}, key=int)
        for start, end in sorted({(start, end) for start, _, end in found}):
            for index in indices:
                if (start, index, end) not in stored:
                    return f"{start}{index}{end}"
        return None


def _layer(name: str) -> tuple[str, int]:
    """Path and number of the layer that a stored name lies in; ("", -1) outside of layers."""
    match = LAYER.match(name)
    return (match.group(1), int(match.group(2))) if match else ("", -1)


def _is_harmless(name: str, shape: tuple[int, ...], dequantized: bool) -> bool:
    """Whether a tensor that the model has no place for changes nothing that the model computes."""
    if COMPUTED.search(name) or (MASK.search(name) and len(shape) == 4 and shape[:2] == (1, 1)):
        return True
    return bool((CACHE_SCALE.search(name) and math.prod(shape) == 1) or (dequantized and ACTIVATION_SCALE.search(name)))


def short_type(dtype: torch.dtype) -> str:
    """A type as users write it, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
