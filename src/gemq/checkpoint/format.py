"""The packed format: ``quantization_config`` in config.json, and the tensors that follow from it.

Implements version 2 of ``docs/checkpoint-format.md``. Must not import torch or Transformers, so that JSON and
safetensors headers are enough to plan, inspect and verify a checkpoint.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gemq.errors import UserError
from gemq.quant.widths import SMALLEST_GROUP, Width, group_size_for
from gemq.runtime.safetensors_files import TensorSpec, read_json

QUANT_METHOD = "gemq"
FORMAT_VERSION = 2
CONFIG_KEY = "gemq_checksums"
"""Key of the checksums in config.json. It is not in ``quantization_config``, which Transformers copies to other
checkpoints."""

GEMQ_KEYS = {"format_version", "experts", "linears"}
"""Keys of ``quantization_config`` that, together, no other method has."""

ABOUT_KEYS = ("bits", "producer", "modules_to_not_convert")
"""Keys of ``quantization_config`` that only describe the checkpoint. Readers ignore them, and they may be missing."""

PACKED_FIELDS = ("codes", "scales", "offsets")
"""Suffixes of the three tensors of a packed matrix."""

PROJECTIONS = ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"})
"""Matrices of an experts module, for families with and without a gate."""

LARGEST_GROUP = 1 << 16
FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}
_MODULE_PATH = re.compile(r"\w+(\.\w+)*", re.ASCII)
_LAYER_PATH = re.compile(r".*?\.\d+(?=\.)")

Shapes = Mapping[str, tuple[int, int]]
"""(rows, columns) of each packed matrix kind: ``{experts path}.{projection}`` or ``{linear path}``."""


class PackedTensor(NamedTuple):
    """A packed matrix.

    Attributes:
        name: of its tensors, without the suffix
        kind: key of its shape in ``Shapes``
        width: of its codes
    """

    name: str
    kind: str
    width: Width


@dataclass(frozen=True)
class PackedFormat:
    """Which matrices are packed, and at which widths. Paths are module paths in the Transformers model.

    Attributes:
        experts: experts path -> ``gate_up_proj`` (or ``up_proj``) and ``down_proj`` -> width of each expert
        linears: path of a dense linear -> width
        group_size: requested group size; that of a matrix is ``group_size_for(columns, group_size)``
        fingerprint: hash of everything that the checkpoint was made from (model, calibration, recipe)
    """

    experts: Mapping[str, Mapping[str, tuple[Width, ...]]] = field(default_factory=dict)
    linears: Mapping[str, Width] = field(default_factory=dict)
    group_size: int = 128
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if self.group_size < SMALLEST_GROUP or self.group_size & (self.group_size - 1):
            raise UserError(f"group_size {self.group_size} is not a power of two from {SMALLEST_GROUP} up: try 128")
        if self.group_size > LARGEST_GROUP:
            raise UserError(f"group_size {self.group_size} is larger than {LARGEST_GROUP}: try 128")
        for path, projections in self.experts.items():
            if set(projections) not in PROJECTIONS:
                raise _damaged(f"{path} lists projections {', '.join(sorted(projections)) or 'none'}")
            counts = {len(widths) for widths in projections.values()}
            if len(counts) != 1 or 0 in counts:
                raise _damaged(f"the projections of {path} list {' and '.join(map(str, sorted(counts)))} experts")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PackedFormat:
        """Reads the ``quantization_config`` of config.json.

        Layers are sorted in the model's order. The file sorts them by name, layer 10 before layer 2.

        Raises:
            UserError: the values are damaged or of another version.
        """
        if values.get("quant_method") != QUANT_METHOD:
            raise UserError(
                f"quant_method is {values.get('quant_method')!r}, not {QUANT_METHOD!r}: "
                "choose a checkpoint that gemq wrote"
            )
        if values.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"checkpoint format version {values.get('format_version')!r} is not {FORMAT_VERSION}, which "
                "this gemq reads: upgrade gemq, or quantize the model again"
            )
        _check_types(values)
        experts: dict[str, dict[str, tuple[Width, ...]]] = {}
        for path, projections in sorted(values["experts"].items(), key=_natural_order):
            experts[path] = {}
            for projection, widths in projections.items():
                experts[path][projection] = tuple(_width(width, path) for width in widths)
        linears: dict[str, Width] = {}
        for path, width in sorted(values["linears"].items(), key=_natural_order):
            linears[path] = _width(width, path)
        return cls(experts, linears, values["group_size"], values.get("fingerprint", ""))

    def to_dict(self) -> dict[str, Any]:
        """Returns the ``quantization_config`` for config.json."""
        experts = {}
        for path, projections in self.experts.items():
            experts[path] = {
                projection: [width.value for width in widths] for projection, widths in projections.items()
            }
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "group_size": self.group_size,
            "fingerprint": self.fingerprint,
            "experts": experts,
            "linears": {path: width.value for path, width in self.linears.items()},
        }

    def matrices(self) -> Iterator[PackedTensor]:
        """Yields all packed matrices in a fixed order."""
        for path, projections in self.experts.items():
            for projection, widths in projections.items():
                for expert, width in enumerate(widths):
                    yield PackedTensor(f"{path}.{expert}.{projection}", f"{path}.{projection}", width)
        for path, width in self.linears.items():
            yield PackedTensor(path, path, width)

    def tensor_names(self) -> Iterator[str]:
        """Yields the names of all packed tensors."""
        return (f"{matrix.name}.{suffix}" for matrix in self.matrices() for suffix in PACKED_FIELDS)

    def replaced_names(self) -> set[str]:
        """Returns the names, in the model, of the full-precision parameters that the packed tensors replace."""
        names = {f"{path}.weight" for path in self.linears}
        for path, projections in self.experts.items():
            names.update(f"{path}.{projection}" for projection in projections)
        return names

    def expected(self, shapes: Shapes) -> dict[str, TensorSpec]:
        """Returns dtype and shape of all packed tensors by name."""
        specs = {}
        for matrix in self.matrices():
            rows, columns = shapes[matrix.kind]
            group_size = group_size_for(columns, self.group_size)
            groups = columns // group_size
            specs[f"{matrix.name}.codes"] = TensorSpec("U8", (rows, groups * matrix.width.group_bytes(group_size)))
            specs[f"{matrix.name}.scales"] = TensorSpec("U8", (rows, groups))
            specs[f"{matrix.name}.offsets"] = TensorSpec("U8", (rows, groups))
        return specs

    def total_bytes(self, shapes: Shapes) -> int:
        """Returns the bytes of all packed tensors."""
        return sum(spec.bytes for spec in self.expected(shapes).values())


def _check_types(values: Mapping[str, Any]) -> None:
    """Raises UserError if a value of a ``quantization_config`` has the wrong type."""
    experts = values.get("experts")
    linears = values.get("linears")
    # type(), since a bool is an int as well
    if (
        not isinstance(experts, Mapping)
        or not isinstance(linears, Mapping)
        or type(values.get("group_size")) is not int
    ):
        raise _damaged("experts, linears or group_size is missing or of the wrong kind")
    if not isinstance(values.get("fingerprint", ""), str):
        raise _damaged("fingerprint is not text")
    for projections in experts.values():
        if not isinstance(projections, Mapping) or not all(isinstance(w, list) for w in projections.values()):
            raise _damaged("experts does not map projections to lists of widths")
    for path in (*experts, *linears):
        if not _MODULE_PATH.fullmatch(path):
            raise _damaged(f"{path!r} is not the path of a module")


def read_packed_config(checkpoint: Path) -> dict[str, Any]:
    """Reads the config.json of a packed checkpoint. Raises UserError if it is unreadable or not gemq's."""
    if not os.path.lexists(checkpoint / "config.json"):
        raise UserError(f"{checkpoint} has no readable config.json: give a directory that gemq wrote")
    config = read_json(checkpoint / "config.json", unique_keys=True)
    if _is_packed_config(config):
        return config
    if _has_gemq_keys(config):
        raise UserError(
            f"config.json of {checkpoint} has settings of gemq, but its quant_method is not {QUANT_METHOD!r}: copy the "
            "checkpoint again, or undo the edit of config.json"
        )
    raise UserError(f"{checkpoint} is not a gemq checkpoint: give a directory that gemq quantize or export wrote")


def read_quantization_config(checkpoint: Path) -> dict[str, Any]:
    """Reads the ``quantization_config`` of a packed checkpoint. Raises UserError if it is not gemq's."""
    values: dict[str, Any] = read_packed_config(checkpoint)["quantization_config"]
    return values


def is_packed(path: Path) -> bool:
    """Whether a directory holds a packed checkpoint, according to its config.json.

    True also if only ``quant_method`` is damaged, so that readers reject the checkpoint as what it is.
    """
    try:
        config = read_json(path / "config.json")
    except UserError:
        return False
    return _is_packed_config(config) or _has_gemq_keys(config)


def _is_packed_config(config: Any) -> bool:
    """Whether the contents of a config.json name gemq as the quantization method."""
    values = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(values, dict) and values.get("quant_method") == QUANT_METHOD


def _has_gemq_keys(config: Any) -> bool:
    """Whether the contents of a config.json have keys that only gemq writes."""
    if not isinstance(config, dict):
        return False
    values = config.get("quantization_config")
    return CONFIG_KEY in config or (isinstance(values, dict) and values.keys() >= GEMQ_KEYS)


def verify_packed(expected: Mapping[str, TensorSpec], stored: Mapping[str, TensorSpec]) -> None:
    """Compares the tensors that config.json implies with those in the files.

    Raises:
        UserError: a tensor differs. The message names the first one.
    """
    errors = []
    for name, spec in expected.items():
        if name not in stored:
            errors.append(f"{name} is missing")
        elif stored[name] != spec:
            errors.append(f"{name} is {_describe(stored[name])} instead of {_describe(spec)}")
    for name in stored:
        if name.endswith(".codes") and name not in expected:
            errors.append(f"{name} is not listed in config.json")
    if errors:
        raise UserError(
            f"{len(errors)} packed tensors do not match config.json, first: {errors[0]}: "
            "copy the checkpoint again, or undo the edit of config.json"
        )


class UnpackedTensor(NamedTuple):
    """What the model expects of a tensor that is not packed. Tied weights are not required."""

    shape: tuple[int, ...]
    is_floating_point: bool
    is_required: bool = True


def verify_unpacked(
    expected: Mapping[str, UnpackedTensor], packed: Mapping[str, TensorSpec], stored: Mapping[str, TensorSpec]
) -> None:
    """Compares the tensors that are not packed with what the model expects.

    Args:
        expected: by name in the files
        packed: the packed tensors, which are ignored
        stored: all tensors in the files

    Raises:
        UserError: a tensor is missing, has the wrong shape or dtype, or does not belong to the model.
    """
    errors = []
    for name, tensor in expected.items():
        if name not in stored:
            if tensor.is_required:
                errors.append(f"{name} is missing")
        elif stored[name].shape != tensor.shape:
            errors.append(f"{name} is {list(stored[name].shape)} instead of {list(tensor.shape)}")
        elif tensor.is_floating_point and stored[name].dtype not in FLOAT_DTYPES:
            errors.append(f"{name} is of type {stored[name].dtype}")
    for name in sorted(stored.keys() - packed.keys() - expected.keys()):
        errors.append(f"the model has no place for {name}")
    if errors:
        raise UserError(
            f"{len(errors)} unpacked tensors do not fit the model, first: {errors[0]}: copy the checkpoint again"
        )


def layer_path(name: str) -> str | None:
    """Returns the path of the layer that a tensor or module belongs to: its name up to the first number."""
    layer = _LAYER_PATH.match(name)
    return layer.group() if layer else None


def _describe(spec: TensorSpec) -> str:
    """Returns dtype and shape as text."""
    return f"{spec.dtype} {list(spec.shape)}"


def _natural_order(item: tuple[str, Any]) -> list[tuple[bool, int, str]]:
    """Sort key of (module path, value): numbers in the path are compared as numbers."""
    path = item[0]
    return [(name.isdigit(), int(name) if name.isdigit() else 0, name) for name in path.split(".")]


def _width(value: object, path: str) -> Width:
    """Parses a width in config.json. Raises UserError for anything but a known number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _damaged(f"{path} has the width {reprlib.repr(value)}, which is not a number")
    return Width(value)


def _damaged(reason: str) -> UserError:
    """Returns the error for a ``quantization_config`` that gemq did not write."""
    return UserError(f"quantization_config in config.json is damaged ({reason}): copy the checkpoint again")
