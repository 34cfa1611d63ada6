"""Reads a model's layers from its files one at a time, as Transformers converts them.

Transformers loads a model in one go: it names every stored tensor, fuses experts, dequantizes, and fills the model.
Here it loads everything but the decoder layers. The same conversion is applied to a layer's tensors when the layer is
read. The files are mapped, so only the requested tensors are read. Must not import the layer cache or memory limits.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from gemq.errors import UserError
from gemq.models.finite_check import largest_finite, not_finite
from gemq.models.fp8 import use_block_dequantize
from gemq.models.stored_checks import (
    FLOATS,
    StoredTensors,
    Target,
    find_targets,
    retype,
    short_type,
    transformers_types,
)
from gemq.models.stored_layout import LayerNames, SourceSpan, find_layout
from gemq.runtime.compat import torch_private, transformers_private
from gemq.runtime.upload import Fragment, Span, read_spans, upload_to


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """What is read of a model.

    Attributes:
        origin: name of the model in messages
        layers: paths of the layers that stay on the meta device until they are read
        dtype: compute type of the weights, which are then read in the types in which they are stored. None: they are
            read in the types that Transformers' own loading gives them
    """

    origin: str
    layers: Sequence[str] = ()
    dtype: torch.dtype | None = None


class LayerReader:
    """Reads layers of a model, and everything outside of them.

    Attributes:
        names_by_layer: per layer, the names inside the model of the tensors that the files hold
        types: the type in which the files hold each parameter and buffer; of dequantized ones, the type after that
        loaded_types: the type that Transformers' own loading gives them
        left_out: names of stored matrices that are no part of the model
        report: of Transformers, after it loaded all tensors without contents
    """

    def __init__(self, model: Any, files: Sequence[Path], load_config: Any, options: ReadOptions):
        """
        Args:
            model: the model as Transformers is about to fill it, on the meta device; it is copied, not changed
            files: the model's safetensors files
            load_config: how Transformers would load it
            options: what is read, and in which types

        Raises:
            UserError: the files and the model do not fit each other
        """
        self._model = copy.deepcopy(model)
        self._origin = options.origin
        self._lock = threading.Lock()
        handles = [safe_open(file, framework="pt") for file in files]
        self._handles: dict[str, Any] = {}  # open file by stored name
        self._spans: dict[str, Span] = {}
        for handle, file in zip(handles, files, strict=True):
            self._handles.update(dict.fromkeys(handle.keys(), handle))
            self._spans.update(read_spans(file))
        use_block_dequantize(load_config.weight_mapping)
        state = dict(self._model.state_dict(keep_vars=True))
        targets = find_targets(self._handles, state, load_config.weight_mapping, model.base_model_prefix)
        self._stored = StoredTensors(self._origin, self._spans, targets, state)
        depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        self.left_out = self._stored.check(transformers_private.ignored_patterns(model), depth)
        self.loaded_types = transformers_types(state, load_config.dtype_plan)
        self._config = load_config
        self._stored_types: dict[str, torch.dtype] = {}
        if options.dtype is not None:
            self._stored_types = self._stored.types()
            self._config = dataclasses.replace(load_config, dtype_plan={})
            retype(self._model, self._stored_types)
        self._placeholders = dict(self._model.state_dict(keep_vars=True))
        self._layers = [LayerNames(f"{path}.") for path in options.layers]
        self._outside = LayerNames("")
        self._assign_targets(targets)
        self._layouts: dict[Any, list[SourceSpan] | None] = {}  # by kind of layer; None: more than a concatenation
        self.report = self._dry_run()
        self._assign_available()
        self.names_by_layer = [layer.available for layer in self._layers]
        self._limits = self._finite_limits(options.dtype)
        self._finite_layers: set[int] = set()  # layers whose weights are known to be finite

    def _assign_targets(self, targets: Mapping[str, Target]) -> None:
        """Assigns stored names to layers."""
        for name, target in targets.items():
            layers = (layer for layer in self._layers if target.name.startswith(layer.prefix))
            next(layers, self._outside).targets[name] = target.name

    def _dry_run(self) -> Any:
        """Loads tensors without contents. Finds out which are missing, and the type of each."""
        tensors = {}
        for name, span in self._spans.items():
            tensors[name] = torch.empty(span.shape, dtype=span.dtype, device="meta")
        report = self._convert(self._model, tensors, "meta")
        # some conversions need contents: their results have the types that the model has
        report.missing_keys -= self._stored.check_shapes(report)
        self.types = {name: tensor.dtype for name, tensor in self._model.state_dict().items()}
        self._restore_placeholders(self._placeholders)
        return report

    def _assign_available(self) -> None:
        """Assigns names inside the model to layers, except those that the files lack."""
        remaining = frozenset(self._placeholders) - self.report.missing_keys
        for layer in self._layers:
            layer.available = frozenset(name for name in remaining if name.startswith(layer.prefix))
            remaining -= layer.available
        self._outside.available = remaining

    def _finite_limits(self, dtype: torch.dtype | None) -> dict[str, float]:
        """Returns the largest value of each tensor that is finite in all types that it takes."""
        limits = {}
        for name, stored_type in self.types.items():
            if stored_type.is_floating_point:
                kinds = [stored_type, self.loaded_types[name]]
                if dtype is not None:
                    kinds.append(dtype)
                limits[name] = largest_finite(*kinds)
        return limits

    def fill_outside(self, model: PreTrainedModel) -> Any:
        """Fills everything of ``model`` but its layers.

        Returns:
            Transformers' report, as if the whole model was loaded.

        Raises:
            UserError: values that are not finite
        """
        retype(model, self._stored_types)
        report = self._convert(model, self._slices(self._outside.targets))
        transformers_private.copy_conversions(self._model, model)  # includes those of the layers
        self._raise_conversion_errors(report)
        filled = {name: model.get_parameter_or_buffer(name) for name in self._outside.available}
        self._check_finite(filled)
        for name, tensor in filled.items():
            if not isinstance(tensor, nn.Parameter):  # what a model computes with a buffer may depend on its type
                tensor.data = tensor.data.to(self.loaded_types[name])
        for names in self.names_by_layer:
            report.missing_keys -= names
            for name in names:
                transformers_private.mark_initialized(model.get_parameter_or_buffer(name))
        return report

    @cached_property
    def has_uniform_type(self) -> bool:
        """Whether layers are stored in one type, in which they are also read. Conversion then only moves tensors."""
        stored_types: set[torch.dtype] = set()
        types: set[torch.dtype] = set()
        for layer in self._layers:
            stored_types.update(self._spans[name].dtype for name in layer.targets)
            types.update(self.types[name] for name in layer.available)
        return len(stored_types) == 1 and stored_types == types

    def read(self, index: int, excluded: Collection[str] = ()) -> dict[str, Tensor]:
        """Reads a layer to the CPU. Can be called from any thread.

        Args:
            index: of the layer
            excluded: names inside the model that are not read

        Returns:
            The layer's tensors by name inside the model, in the types in which they are stored.

        Raises:
            UserError: damaged files, or values that are not finite
        """
        layer = self._layers[index]
        stored_names = [name for name, target in layer.targets.items() if target not in excluded]
        tensors = self._assemble(layer.available, self._slices(stored_names), excluded)
        if tensors is None:  # a stored tensor holds excluded and other tensors of the model
            return {name: tensor for name, tensor in self.read(index).items() if name not in excluded}
        self._check_layer(index, tensors, is_complete=not excluded)
        return tensors

    def read_outside(self) -> dict[str, Tensor]:
        """Reads everything outside of the layers to the CPU, by name inside the model."""
        tensors = self._assemble(self._outside.available, self._slices(self._outside.targets), ())
        assert tensors is not None
        return tensors

    def read_to_device(self, device: torch.device, index: int) -> dict[str, Tensor]:
        """Reads a layer to ``device``. Requires ``has_uniform_type``.

        Bypasses host memory if ``knows_layout``. Otherwise it takes device memory for three times the layer.
        """
        layer = self._layers[index]
        stored_names, names = layer.in_order()
        if layout := self._layouts.get(layer.kind(self._spans)):
            shapes = {name: (self._placeholders[name].shape, self.types[name]) for name in names}
            spans = []
            for item in layout:
                spans.append(Fragment(self._spans[stored_names[item.stored]], names[item.target], item.start))
            tensors = upload_to(device).assemble(shapes, spans)
            self._check_layer(index, tensors)
            return tensors
        stored = upload_to(device).tensors({name: self._spans[name] for name in stored_names})
        converted = self._assemble(layer.available, stored, (), device)
        assert converted is not None
        self._check_layer(index, converted)
        self.learn_layout(index, converted, stored)
        return converted

    def learn_layout(
        self, index: int, converted: Mapping[str, Tensor], stored: Mapping[str, Tensor] | None = None
    ) -> None:
        """Learns the layout of a kind of layers, for ``read_to_device``.

        Args:
            index: of a layer of the kind
            converted: its tensors by name inside the model
            stored: its tensors by stored name; None: they are read
        """
        layer = self._layers[index]
        kind = layer.kind(self._spans)
        if kind in self._layouts:
            return
        stored_names, names = layer.in_order()
        if stored is None:
            stored = {name: self._handles[name].get_tensor(name) for name in stored_names}
        index_of = {name: number for number, name in enumerate(names)}
        targets = [index_of.get(layer.targets[name], -1) for name in stored_names]  # -1: not in it
        self._layouts[kind] = find_layout(
            [stored[name] for name in stored_names], targets, [converted[name] for name in names]
        )

    def knows_layout(self, index: int) -> bool:
        """Returns whether the layout of the layer's kind was learned."""
        return bool(self._layouts.get(self._layers[index].kind(self._spans)))

    def _slices(self, stored_names: Collection[str]) -> dict[str, Any]:
        """Returns unread tensors by stored name."""
        return {name: self._handles[name].get_slice(name) for name in stored_names}

    def _assemble(
        self,
        names: Collection[str],
        stored: Mapping[str, Any],
        excluded: Collection[str],
        device: torch.device | None = None,
    ) -> dict[str, Tensor] | None:
        """Converts stored tensors.

        Args:
            names: tensors to fill, by name inside the model
            stored: tensors by stored name, read or unread
            excluded: those of ``names`` that are not returned
            device: of the result; None: the CPU

        Returns:
            Tensors by name inside the model. None if ``stored``, which lacks the sources of ``excluded``, is not
            enough for them.
        """
        with self._lock:
            try:
                report = self._convert(self._model, stored, device)
                tensors = {}
                for name in names:
                    if name not in excluded:
                        tensors[name] = self._model.get_parameter_or_buffer(name).detach()
            finally:
                self._restore_placeholders({name: self._placeholders[name] for name in names})
        missing = sorted(name for name, tensor in tensors.items() if tensor.is_meta)
        if missing and excluded:
            return None
        self._raise_conversion_errors(report)
        if missing:
            raise UserError(f"cannot read {missing[0]} of {self._origin}: copy the model again")
        return tensors

    def _raise_conversion_errors(self, report: Any) -> None:
        """Raises a UserError for the first error of a conversion."""
        for name, error in report.conversion_errors.items():
            reason = (error.strip().splitlines() or [""])[-1]
            raise UserError(f"cannot read {name} of {self._origin} ({reason}): copy the model again")

    def _check_layer(self, index: int, tensors: Mapping[str, Tensor], is_complete: bool = True) -> None:
        """Refuses values that are not finite, unless the complete layer was checked before."""
        if index not in self._finite_layers:
            self._check_finite(tensors)
            if is_complete:
                self._finite_layers.add(index)

    def _check_finite(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises a UserError for values that are not finite, with the name of the stored tensor."""
        for target in not_finite(tensors, self._limits):
            for name in self._stored.sources(target):
                stored = self._handles[name].get_tensor(name)
                if not_finite({name: stored if stored.dtype in FLOATS else stored.float()}):
                    raise UserError(
                        f"{self._origin} stores {name} with values that are not finite (NaN or infinity): copy the "
                        "model again, or ask whoever made it"
                    )
            kind = short_type(self.loaded_types[target])
            raise UserError(
                f"{self._origin} stores {target} with values that are not finite in {kind}, the type that the model is "
                "loaded in: give config.json a wider dtype (bfloat16 or float32)"
            )

    def _convert(self, model: Any, tensors: Mapping[str, Any], device: torch.device | str | None = None) -> Any:
        """Runs Transformers' conversion of stored tensors into a model. Returns its report."""
        config = self._config if device is None else dataclasses.replace(self._config, device_map={"": device})
        with _without_progress_bars():
            return transformers_private.convert_into(model, tensors, config)

    def _restore_placeholders(self, placeholders: dict[str, Any]) -> None:
        """Puts tensors without contents back into the model."""
        for name, tensor in placeholders.items():
            path, _, key = name.rpartition(".")
            torch_private.tensor_dict(self._model.get_submodule(path), key)[key] = tensor


@contextmanager
def loading_from(files: Sequence[Path], options: ReadOptions) -> Iterator[list[LayerReader]]:
    """Makes ``from_pretrained`` fill models from these files, whichever files it is given.

    Everything else (classes, types, quantized originals, buffers, tied weights) is Transformers' own loading.

    Args:
        files: the model's safetensors files
        options: whose layers stay on the meta device

    Yields:
        A list that receives the reader of the layers.
    """
    readers: list[LayerReader] = []

    def fill(model: Any, load_config: Any) -> Any:
        readers.append(LayerReader(model, files, load_config, options))
        return readers[-1].fill_outside(model)

    with transformers_private.weights_loaded_by(fill):
        yield readers


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Hides the bar that Transformers shows for each load: layers are loaded one at a time."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
