"""A model's layers, read from its files one at a time, as Transformers converts them.

Transformers loads a model in one go: it names every stored tensor, fuses experts, dequantizes, and fills the model.
Here it is handed everything but the decoder layers' tensors; those of one layer are given to the same conversion when
the layer is asked for. The files are mapped, so that only what is asked for is read. Knows no residency and no bounds.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation, convert_and_load_state_dict_in_model
from transformers.utils import logging

from gemq.errors import UserError
from gemq.models.finite import largest_finite, not_finite
from gemq.models.fp8 import use_block_dequantize
from gemq.models.stored import FLOATS, Stored, find_targets, short_type
from gemq.models.stored_layout import Part, learned
from gemq.runtime.upload import Place, Span, spans_of, upload_to


class LayerReader:
    """Reads layers of a model, and what lies outside of them.

    given:    per layer, the names inside the model of what the files hold of it
    types:    the type in which the files hold each parameter and buffer of the model; of dequantized ones, the type
              that they are dequantized to
    loaded:   the type that Transformers' own loading would give them
    left_out: names of stored matrices that are no part of the model
    """

    def __init__(self, model: Any, files: Sequence[Path], load_config: Any, reading: Reading):
        """
        Args:
            model: as Transformers is about to fill it, on the meta device; it is copied, not changed.
            files: the model's safetensors files.
            load_config: how Transformers would load it.
            reading: what is read of it, and in which types.

        Raises:
            UserError: the files and the model do not fit each other.
        """
        self._model = copy.deepcopy(model)
        self._origin = reading.origin
        self._lock = threading.Lock()
        self._open = [safe_open(file, framework="pt") for file in files]
        self._slices: dict[str, Any] = {name: file for file in self._open for name in file.keys()}  # noqa: SIM118
        self._spans: dict[str, Span] = {name: span for file in files for name, span in spans_of(file).items()}
        use_block_dequantize(load_config.weight_mapping)
        state = dict(self._model.state_dict(keep_vars=True))
        prefix = model.base_model_prefix
        targets = find_targets(self._slices, state, load_config.weight_mapping, prefix)
        self._tensors = Stored(self._origin, self._spans, targets, state)
        depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        self.left_out = self._tensors.check(model._keys_to_ignore_on_load_unexpected or (), depth)
        self.loaded = _loaded_types(state, load_config.dtype_plan)
        self._config = load_config
        self._stored_types: dict[str, torch.dtype] = {}
        if reading.dtype is not None:
            self._stored_types = self._tensors.types()
            self._config = dataclasses.replace(load_config, dtype_plan={})
            _retype(self._model, self._stored_types)
        self._empty = dict(self._model.state_dict(keep_vars=True))
        self._prefixes = [f"{path}." for path in reading.layers]
        by_layer: list[dict[str, str]] = [{} for _ in self._prefixes]  # stored name -> name inside the model
        self._outside: list[str] = []
        for name, target in targets.items():
            index = self._layer_of(target.name)
            if index is None:
                self._outside.append(name)
            else:
                by_layer[index][name] = target.name
        self._stored = by_layer
        self._layouts: dict[Any, list[Part] | None] = {}  # of the kinds of layers that were put together already
        self.report = self._dry_run()
        absent = set(self.report.missing_keys)
        self.given: list[frozenset[str]] = [
            frozenset(n for n in self._empty if n.startswith(prefix) and n not in absent) for prefix in self._prefixes
        ]
        inside = frozenset().union(*self.given)
        self._given_outside = frozenset(n for n in self._empty if n not in inside and n not in absent)
        limited = {name: [kind, self.loaded[name]] for name, kind in self.types.items() if kind.is_floating_point}
        also = [reading.dtype] if reading.dtype is not None else []
        self._limits = {name: largest_finite(*kinds, *also) for name, kinds in limited.items()}
        self._checked: set[int] = set()  # layers whose weights are known to be finite

    def _layer_of(self, name: str) -> int | None:
        return next((i for i, prefix in enumerate(self._prefixes) if name.startswith(prefix)), None)

    def _dry_run(self) -> Any:
        """Loads tensors without contents: which are missing, and of what type each will be."""
        tensors = {}
        for name, span in self._spans.items():
            tensors[name] = torch.empty(span.shape, dtype=span.dtype, device="meta")
        report = self._convert(self._model, tensors, "meta")
        # a conversion that cannot be done without contents: its results are of the types that the model has
        unknown = self._tensors.check_shapes(report)
        report.missing_keys -= unknown
        self.types = {n: t.dtype for n, t in self._model.state_dict().items()}
        self._restore(self._empty)
        return report

    def fill_outside(self, model: PreTrainedModel) -> Any:
        """Fills everything of ``model`` but its layers. Returns Transformers' report, as of the whole model.

        Raises:
            UserError: values that are not finite.
        """
        _retype(model, self._stored_types)
        report = self._convert(model, {name: self._slices[name].get_slice(name) for name in self._outside})
        model._weight_conversions = self._model._weight_conversions  # those that the layers need, too
        self._raise_conversion_errors(report)
        filled = {name: model.get_parameter_or_buffer(name) for name in self._given_outside}
        self._check_finite(filled)
        for name, tensor in filled.items():
            if not isinstance(tensor, nn.Parameter):  # what a model computes with a buffer may depend on its type
                tensor.data = tensor.data.to(self.loaded[name])
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

        May be called from any thread.

        Args:
            index: of the layer.
            without: names to leave in the files.

        Raises:
            UserError: damaged files, or values that are not finite.
        """
        names = [name for name, target in self._stored[index].items() if target not in without]
        slices = {name: self._slices[name].get_slice(name) for name in names}
        made = self._put_together(self.given[index], slices, without)
        if made is None:  # one stored tensor holds several of the model's, of which some are asked for
            return {name: tensor for name, tensor in self.read(index).items() if name not in without}
        self._check_layer(index, made, whole=not without)
        return made

    def read_outside(self) -> dict[str, Tensor]:
        """What lies outside of the layers, likewise."""
        slices = {name: self._slices[name].get_slice(name) for name in self._outside}
        made = self._put_together(self._given_outside, slices, ())
        assert made is not None
        return made

    def read_to(self, device: torch.device, index: int) -> dict[str, Tensor]:
        """The same on ``device``, for ``plain`` layers: past the host's memory, as soon as one of the kind is known.

        The first of a kind takes room for the layer thrice, see ``known``.
        """
        stored, given = self._sorted(index)
        if layout := self._layouts.get(self._kind(index)):
            shapes = {name: (self._empty[name].shape, self.types[name]) for name in given}
            places = [Place(self._spans[stored[x.stored]], given[x.target], x.start) for x in layout]
            placed = upload_to(device).placed(shapes, places)
            self._check_layer(index, placed)
            return placed
        parts = upload_to(device).tensors({name: self._spans[name] for name in stored})
        made = self._put_together(self.given[index], parts, (), device)
        assert made is not None
        self._check_layer(index, made)
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
        self,
        names: Collection[str],
        stored: Mapping[str, Any],
        without: Collection[str],
        device: torch.device | None = None,
    ) -> dict[str, Tensor] | None:
        """What Transformers makes of stored tensors: those of ``names`` that are not in ``without``, inside the model.

        None if ``stored`` without what belongs to ``without`` is not enough for them.
        """
        with self._lock:
            try:
                report = self._convert(self._model, stored, device)
                made = {n: self._model.get_parameter_or_buffer(n).detach() for n in names if n not in without}
            finally:
                self._restore({name: self._empty[name] for name in names})
        absent = sorted(name for name, tensor in made.items() if tensor.is_meta)
        if absent and without:
            return None
        self._raise_conversion_errors(report, *absent)
        return made

    def _raise_conversion_errors(self, report: Any, *absent: str) -> None:
        for name, error in report.conversion_errors.items():
            reason = (error.strip().splitlines() or [""])[-1]
            raise UserError(f"cannot read {name} of {self._origin} ({reason}): copy the model again")
        if absent:
            raise UserError(f"cannot read {absent[0]} of {self._origin}: copy the model again")

    def _check_layer(self, index: int, made: Mapping[str, Tensor], whole: bool = True) -> None:
        """Refuses values that are not finite, when the layer is read for the first time."""
        if index not in self._checked:
            self._check_finite(made)
            if whole:
                self._checked.add(index)

    def _check_finite(self, made: Mapping[str, Tensor]) -> None:
        for target in not_finite(made, self._limits):
            for name in self._tensors.sources(target):
                stored = self._slices[name].get_tensor(name)
                if not_finite({name: stored if stored.dtype in FLOATS else stored.float()}):
                    raise UserError(
                        f"{self._origin} stores {name} with values that are not finite (NaN or infinity): copy the "
                        "model again, or ask whoever made it"
                    )
            kind = short_type(self.loaded[target])
            raise UserError(
                f"{self._origin} stores {target} with values that are not finite in {kind}, the type that the model is "
                "loaded in: give config.json a wider dtype (bfloat16 or float32)"
            )

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


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is read of a model.

    origin: the model as messages call it
    layers: paths of the layers that stay on the meta device until they are read
    dtype:  the type that weights are to be computed with: they are read in the types in which they are stored. None:
            they are read in the types that Transformers' own loading gives them
    """

    origin: str
    layers: Sequence[str] = ()
    dtype: torch.dtype | None = None


@contextmanager
def reading_from(files: Sequence[Path], reading: Reading) -> Iterator[list[LayerReader]]:
    """While open, ``from_pretrained`` fills a model from these files, whichever it was given.

    The layers of ``reading`` stay on the meta device; the list receives the reader that has them. Everything else
    (classes, types, quantized originals, buffers, tied weights) is Transformers' own loading.
    """
    readers: list[LayerReader] = []

    def fill(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *_: Any, **__: Any) -> Any:
        readers.append(LayerReader(model, files, load_config, reading))
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


def _loaded_types(state: Mapping[str, Tensor], dtype_plan: Mapping[str, torch.dtype] | None) -> dict[str, torch.dtype]:
    """The types that Transformers' own loading gives a model's tensors.

    Args:
        state: the empty model's tensors by name.
        dtype_plan: types by patterns of names, of modules that a family keeps in float32.
    """
    types = {name: tensor.dtype for name, tensor in state.items()}
    if dtype_plan:
        pattern, by_group = build_glob_alternation(list(dtype_plan))[:2]
        for name, kind in types.items():
            match = pattern.search(name)
            if match and match.lastgroup and kind.is_floating_point:
                types[name] = dtype_plan[by_group[match.lastgroup]]
    return types


def _retype(model: nn.Module, types: Mapping[str, torch.dtype]) -> None:
    """Gives tensors of an empty model other types. What is loaded into one is cast to its type."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in types and types[name] != tensor.dtype:
            tensor.data = torch.empty_like(tensor.data, dtype=types[name])
