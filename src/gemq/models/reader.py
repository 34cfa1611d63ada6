"""A model's layers, read from its files one at a time, as Transformers converts them.

Transformers loads a model in one go: it names every stored tensor, fuses experts, dequantizes, and fills the model.
Here it is handed everything but the decoder layers' tensors; those of one layer are given to the same conversion when
the layer is asked for. The files are mapped, so that only what is asked for is read. Knows no residency and no bounds.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.utils import logging

from gemq.errors import UserError
from gemq.models.layout import Part, learned
from gemq.models.structure import Structure
from gemq.resources.upload import Place, Span, spans_of, upload_to


class LayerReader:
    """Reads layers of a model.

    given: per layer, the names inside the model of what the files hold of it
    types: the type in which each parameter and buffer of the model is stored
    """

    def __init__(self, model: Any, files: list[str], load_config: Any, structure: Structure):
        """model: as Transformers is about to fill it, on the meta device; it is copied, not changed"""
        self._model = copy.deepcopy(model)
        self._config = load_config
        self._lock = threading.Lock()
        self._open = [safe_open(file, framework="pt") for file in files]
        self._slices: dict[str, Any] = {name: file for file in self._open for name in file.keys()}  # noqa: SIM118
        self._spans: dict[str, Span] = {name: span for file in files for name, span in spans_of(Path(file)).items()}
        self._empty = dict(self._model.state_dict(keep_vars=True))
        self._prefixes = [f"{layer.path}." for layer in structure.layers]
        by_layer: list[dict[str, str]] = [{} for _ in structure.layers]  # stored name -> name inside the model
        self._outside: list[str] = []
        for name, target in self._targets().items():
            index = self._layer_of(target)
            if index is None:
                self._outside.append(name)
            else:
                by_layer[index][name] = target
        self._stored = by_layer
        self._layouts: dict[Any, list[Part] | None] = {}  # of the kinds of layers that were put together already
        self.report = self._dry_run()
        absent = set(self.report.missing_keys)
        wrong = {name for name, *_ in self.report.mismatched_keys}
        self.given: list[frozenset[str]] = [
            frozenset(n for n in self._empty if n.startswith(prefix) and n not in absent | wrong)
            for prefix in self._prefixes
        ]

    def _layer_of(self, name: str) -> int | None:
        return next((i for i, prefix in enumerate(self._prefixes) if name.startswith(prefix)), None)

    def _targets(self) -> dict[str, str]:
        """Stored name -> (first) name inside the model, as Transformers' own loading finds it."""
        mapping = self._config.weight_mapping or []
        renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
        converters = [x for x in mapping if isinstance(x, WeightConverter)]
        prefix = self._model.base_model_prefix
        found = {}
        for name in self._slices:
            target, _ = rename_source_key(name, renamings, converters, prefix, self._empty)
            if target not in self._empty and name in self._empty:
                target, _ = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=self._empty)
            found[name] = target
        return found

    def _dry_run(self) -> Any:
        """Loads tensors without contents: which are missing or too many, and of what type each will be."""
        tensors = {}
        for name, span in self._spans.items():
            tensors[name] = torch.empty(span.shape, dtype=span.dtype, device="meta")
        report = self._convert(self._model, tensors, "meta")
        # a conversion that cannot be done without contents: its results are of the types that the model has
        unknown = set(report.missing_keys) if report.conversion_errors else set()
        report.missing_keys -= {n for n in unknown if self._layer_of(n) is not None}
        self.types = {n: t.dtype for n, t in self._model.state_dict().items()}
        self._restore(self._empty)
        report.conversion_errors.clear()
        return report

    def fill_outside(self, model: PreTrainedModel) -> Any:
        """Fills everything of ``model`` but its layers. Returns Transformers' report, as of the whole model."""
        report = self._convert(model, {name: self._slices[name].get_slice(name) for name in self._outside})
        model._weight_conversions = self._model._weight_conversions  # those that the layers need, too
        report.unexpected_keys |= self.report.unexpected_keys
        report.mismatched_keys |= self.report.mismatched_keys
        for names in self.given:
            report.missing_keys -= names
            for name in names:
                model.get_parameter_or_buffer(name)._is_hf_initialized = True  # never to be made up
        return report

    @cached_property
    def plain(self) -> bool:
        """Whether the files hold layers in the model's one type: then converting them only puts tensors together."""
        names = [name for stored in self._stored for name in stored]
        stored = {self._spans[name].dtype for name in names}
        return len(stored) == 1 and stored == {self.types[name] for given in self.given for name in given}

    def read(self, index: int, without: Collection[str] = ()) -> dict[str, Tensor]:
        """A layer's tensors by name inside the model, on the CPU, in the types in which they are stored.

        without: names to leave in the files. May be called from any thread. Raises UserError for damaged files.
        """
        names = [name for name, target in self._stored[index].items() if target not in without]
        return self._put_together(index, {name: self._slices[name].get_slice(name) for name in names}, without)

    def read_to(self, device: torch.device, index: int) -> dict[str, Tensor]:
        """The same on ``device``, for ``plain`` layers: past the host's memory, as soon as one of the kind is known.

        The first of a kind takes room for the layer thrice, see ``known``.
        """
        stored, given = self._sorted(index)
        if layout := self._layouts.get(self._kind(index)):
            shapes = {name: (self._empty[name].shape, self.types[name]) for name in given}
            places = [Place(self._spans[stored[x.stored]], given[x.target], x.start) for x in layout]
            return upload_to(device).placed(shapes, places)
        parts = upload_to(device).tensors({name: self._spans[name] for name in stored})
        made = self._put_together(index, parts, (), device)
        self.learn(index, made, parts)
        return made

    def learn(self, index: int, made: Mapping[str, Tensor], parts: Mapping[str, Tensor] | None = None) -> None:
        """Lets ``read_to`` know the kind of a layer from what was ``made`` of its stored tensors.

        parts: these, where they are at hand
        """
        kind = self._kind(index)
        if kind in self._layouts:
            return
        stored, given = self._sorted(index)
        if parts is None:
            parts = {name: self._slices[name].get_tensor(name) for name in stored}
        place = {name: number for number, name in enumerate(given)}
        targets = [place.get(self._stored[index][name], -1) for name in stored]  # -1: nothing that the model has
        self._layouts[kind] = learned([parts[name] for name in stored], targets, [made[name] for name in given])

    def known(self, index: int) -> bool:
        """Whether ``read_to`` needs room for the layer alone."""
        return bool(self._layouts.get(self._kind(index)))

    def _sorted(self, index: int) -> tuple[list[str], list[str]]:
        """Names of a layer's tensors, as they are stored and inside the model, in an order that layers share."""
        return sorted(self._stored[index], key=self._without_number(index)), sorted(self.given[index])

    def _kind(self, index: int) -> Any:
        """Equal for layers that are stored alike."""
        short = self._without_number(index)
        stored, given = self._sorted(index)
        return (
            tuple((short(name), self._spans[name].shape, short(self._stored[index][name])) for name in stored),
            tuple(map(short, given)),
        )

    def _without_number(self, index: int) -> Callable[[str], str]:
        number = self._prefixes[index].split(".")[-2]
        return lambda name: name.replace(f".{number}.", ".*.", 1)

    def _put_together(
        self, index: int, stored: Mapping[str, Any], without: Collection[str], device: torch.device | None = None
    ) -> dict[str, Tensor]:
        """What Transformers makes of a layer's stored tensors, or of what stands for them in the files."""
        wanted = self.given[index] - set(without)
        with self._lock:
            try:
                report = self._convert(self._model, stored, device)
                found = {name: self._model.get_parameter_or_buffer(name).detach() for name in wanted}
            finally:
                self._restore({n: self._empty[n] for n in self.given[index]})
        absent = sorted(name for name, tensor in found.items() if tensor.is_meta)
        if absent and without:  # one stored tensor holds several of the model's, of which some are wanted
            return {name: tensor for name, tensor in self.read(index).items() if name in wanted}
        if report.conversion_errors or absent:
            what = next(iter(report.conversion_errors.values()), "").strip().splitlines()[-1:] or absent
            raise UserError(f"cannot read layer {self._prefixes[index][:-1]} ({what[0]}): copy the checkpoint again")
        return found

    def _convert(self, model: Any, tensors: Mapping[str, Any], device: torch.device | str | None = None) -> Any:
        config = self._config if device is None else dataclasses.replace(self._config, device_map={"": device})
        with _without_bars():
            report, _ = convert_and_load_state_dict_in_model(model=model, state_dict=dict(tensors), load_config=config)
        return report

    def _restore(self, empty: dict[str, Any]) -> None:
        """Puts tensors without contents back in their places."""
        for name, tensor in empty.items():
            path, _, leaf = name.rpartition(".")
            module = self._model.get_submodule(path)
            (module._parameters if leaf in module._parameters else module._buffers)[leaf] = tensor


@contextmanager
def reading_layers(structure: Structure) -> Iterator[list[LayerReader]]:
    """While open, ``from_pretrained`` leaves the decoder layers on the meta device.

    The list receives the reader that has them. Everything else (classes, types, quantized originals, buffers, tied
    weights) stays Transformers' own doing.
    """
    readers: list[LayerReader] = []

    def fill(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *_: Any, **__: Any) -> Any:
        files = [str(Path(file)) for file in checkpoint_files]
        readers.append(LayerReader(model, files, load_config, structure))
        return readers[-1].fill_outside(model), None

    original: Callable[..., Any] = vars(PreTrainedModel)["_load_pretrained_model"]
    PreTrainedModel._load_pretrained_model = staticmethod(fill)  # type: ignore[method-assign]
    try:
        yield readers
    finally:
        PreTrainedModel._load_pretrained_model = original  # type: ignore[method-assign]


@contextmanager
def _without_bars() -> Iterator[None]:
    """Transformers shows a bar for each load; a layer is none."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
