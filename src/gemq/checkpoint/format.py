"""The packed format: ``quantization_config`` in config.json, and the tensors that follow from it.

Implements versions 2 and 3 of ``docs/checkpoint-format.md``. In version 3 the experts have trellis codes. Must not
import torch or Transformers, so that JSON and safetensors headers are enough to plan, inspect and verify a checkpoint.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gemq.errors import UserError, short_repr
from gemq.quant.widths import (
    ROTATION_SIDE,
    SMALLEST_GROUP,
    TILE_SIDE,
    AnyWidth,
    TrellisWidth,
    Width,
    group_size_for,
)
from gemq.runtime.safetensors_files import TensorSpec, read_json

QUANT_METHOD = "gemq"
AFFINE, TRELLIS = "affine", "trellis"
FORMAT_VERSIONS = {AFFINE: 2, TRELLIS: 3}
"""Version of the format by the kind of the experts' codes."""

CONFIG_KEY = "gemq_checksums"
"""Key of the checksums in config.json. It is not in ``quantization_config``, which Transformers copies to other
checkpoints."""

GEMQ_KEYS = {"format_version", "experts", "linears"}
"""Keys of ``quantization_config`` that, together, no other method has."""

ABOUT_KEYS = ("bits", "producer", "modules_to_not_convert")
"""Keys of ``quantization_config`` that only describe the checkpoint. Readers ignore them, and they may be missing."""

TRELLIS_KEYS = GEMQ_KEYS | {"quant_method", "codes", "state_bits", "group_size", "fingerprint", *ABOUT_KEYS}
"""All keys of ``quantization_config`` in version 3."""

PACKED_FIELDS = ("codes", "scales", "offsets")
"""Suffixes of the three tensors of a packed matrix with affine codes."""

TRELLIS_FIELDS = ("codes", "scales")
"""Suffixes of the two tensors of a matrix with trellis codes."""

FEWEST_STATE_BITS, MOST_STATE_BITS = 8, 16

PROJECTIONS = ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"})
"""Matrices of an experts module, for families with and without a gate."""

LARGEST_GROUP = 1 << 16
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
    width: AnyWidth

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of its tensors, codes first."""
        return tuple(f"{self.name}.{field}" for field in fields_of(self.width))


ProjectionWidths = Mapping[str, tuple[AnyWidth, ...]]
"""Width of every expert by projection."""


@dataclass(frozen=True)
class PackedFormat:
    """Which matrices are packed, and at which widths. Paths are module paths in the Transformers model.

    Attributes:
        experts: experts path -> ``gate_up_proj`` (or ``up_proj``) and ``down_proj`` -> width of each expert
        linears: path of a dense linear -> width
        group_size: requested group size; that of a matrix is ``group_size_for(columns, group_size)``
        fingerprint: hash of everything that the checkpoint was made from (model, calibration, recipe)
        state_bits: bits of a state of the experts' trellis codes; 0 if they have affine codes
    """

    experts: Mapping[str, ProjectionWidths] = field(default_factory=dict)
    linears: Mapping[str, Width] = field(default_factory=dict)
    group_size: int = 128
    fingerprint: str = ""
    state_bits: int = 0

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
            width_class = TrellisWidth if self.state_bits else Width
            if not all(isinstance(width, width_class) for widths in projections.values() for width in widths):
                raise ValueError(f"{path} has a width that is not one of {self.codes} codes")

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
        codes = _read_codes(values)
        state_bits = _read_state_bits(values) if codes == TRELLIS else 0
        _check_types(values)
        expert_width: Callable[[object], AnyWidth] = TrellisWidth.read if codes == TRELLIS else Width.read
        experts: dict[str, dict[str, Any]] = {}
        for path, projections in sorted(values["experts"].items(), key=_natural_order):
            experts[path] = {}
            for projection, widths in projections.items():
                experts[path][projection] = tuple(expert_width(_number(width, path)) for width in widths)
        linears: dict[str, Width] = {}
        for path, width in sorted(values["linears"].items(), key=_natural_order):
            linears[path] = Width(_number(width, path))
        return cls(experts, linears, values["group_size"], values.get("fingerprint", ""), state_bits)

    def to_dict(self) -> dict[str, Any]:
        """Returns the ``quantization_config`` for config.json."""
        experts = {}
        for path, projections in self.experts.items():
            experts[path] = {
                projection: [width.value for width in widths] for projection, widths in projections.items()
            }
        values = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSIONS[self.codes],
            "group_size": self.group_size,
            "fingerprint": self.fingerprint,
            "experts": experts,
            "linears": {path: width.value for path, width in self.linears.items()},
        }
        if self.state_bits:
            values |= {"codes": TRELLIS, "state_bits": self.state_bits}
        return values

    @property
    def codes(self) -> str:
        """The kind of the experts' codes: ``affine`` or ``trellis``."""
        return TRELLIS if self.state_bits else AFFINE

    @property
    def expert_fields(self) -> tuple[str, ...]:
        """Suffixes of the tensors of an expert's matrix."""
        return TRELLIS_FIELDS if self.state_bits else PACKED_FIELDS

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
        return (name for matrix in self.matrices() for name in matrix.tensor_names)

    def replaced_names(self) -> set[str]:
        """Returns the names, in the model, of the full-precision parameters that the packed tensors replace."""
        names = {f"{path}.weight" for path in self.linears}
        for path, projections in self.experts.items():
            names.update(f"{path}.{projection}" for projection in projections)
        return names

    def expected(self, shapes: Shapes) -> dict[str, TensorSpec]:
        """Returns dtype and shape of all packed tensors by name.

        Raises:
            UserError: a matrix has a shape that trellis codes cannot have.
        """
        specs = {}
        for matrix in self.matrices():
            rows, columns = shapes[matrix.kind]
            if isinstance(matrix.width, TrellisWidth):
                matrix_shapes = _trellis_shapes(matrix.name, matrix.width, rows, columns)
            else:
                group_size = group_size_for(columns, self.group_size)
                groups = columns // group_size
                code_bytes = groups * matrix.width.group_bytes(group_size)
                matrix_shapes = ((rows, code_bytes), (rows, groups), (rows, groups))
            for name, shape in zip(matrix.tensor_names, matrix_shapes, strict=True):
                specs[name] = TensorSpec("U8", shape)
        return specs

    def block_side(self, kind: str, columns: int) -> int:
        """Returns how many neighboring columns of a matrix cannot be divided: a group, or a block of the rotation.

        Args:
            kind: key of the matrix in ``Shapes``
            columns: of the matrix
        """
        is_trellis = self.state_bits > 0 and kind not in self.linears
        return group_size_for(columns, ROTATION_SIDE if is_trellis else self.group_size)

    def total_bytes(self, shapes: Shapes) -> int:
        """Returns the bytes of all packed tensors."""
        return sum(spec.bytes for spec in self.expected(shapes).values())


def fields_of(width: AnyWidth) -> tuple[str, ...]:
    """Returns the suffixes of the tensors of a matrix of this width."""
    return TRELLIS_FIELDS if isinstance(width, TrellisWidth) else PACKED_FIELDS


def _trellis_shapes(name: str, width: TrellisWidth, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
    """Returns the shapes of codes and scales of a matrix with trellis codes. Raises UserError if it cannot have any."""
    if rows % TILE_SIDE or columns % TILE_SIDE:
        raise UserError(
            f"{name} is [{rows}, {columns}] and has trellis codes, which need multiples of {TILE_SIDE}: "
            "quantize the model again with affine codes"
        )
    code_shape = (rows // TILE_SIDE, columns // TILE_SIDE * width.tile_bytes)
    return code_shape, (rows,)


def _read_codes(values: Mapping[str, Any]) -> str:
    """Reads the kind of the experts' codes. Raises UserError for versions, kinds and keys that this gemq does not know.

    An unknown key may change what codes mean, such as a codebook. Version 2 has been written with further keys.
    """
    version = values.get("format_version")
    if version not in FORMAT_VERSIONS.values():
        versions = " or ".join(map(str, FORMAT_VERSIONS.values()))
        raise UserError(
            f"checkpoint format version {short_repr(version)} is not {versions}, which "
            "this gemq reads: upgrade gemq, or quantize the model again"
        )
    codes = values.get("codes", AFFINE)
    if codes not in (AFFINE, TRELLIS):
        raise UserError(
            f"the experts' codes are of the kind {short_repr(codes)}, this gemq knows {AFFINE} and {TRELLIS}: "
            "upgrade gemq"
        )
    if version != FORMAT_VERSIONS[codes]:
        raise _damaged(f"format version {version} has no {codes} codes")
    unknown = sorted(values.keys() - TRELLIS_KEYS) if codes == TRELLIS else []
    if unknown:
        raise UserError(
            f"quantization_config has the key {short_repr(unknown[0])}, which this gemq does not know: upgrade gemq"
        )
    return codes


def _read_state_bits(values: Mapping[str, Any]) -> int:
    """Reads the bits of a state of trellis codes. Raises UserError for a number that this gemq does not know."""
    state_bits = values.get("state_bits")
    # type(), since a bool is an int as well
    if type(state_bits) is not int or not FEWEST_STATE_BITS <= state_bits <= MOST_STATE_BITS:
        raise UserError(
            f"trellis codes have state_bits {short_repr(state_bits)}, this gemq knows {FEWEST_STATE_BITS} to "
            f"{MOST_STATE_BITS}: upgrade gemq, or copy the checkpoint again"
        )
    return state_bits


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


def layer_path(name: str) -> str | None:
    """Returns the path of the layer that a tensor or module belongs to: its name up to the first number."""
    layer = _LAYER_PATH.match(name)
    return layer.group() if layer else None


def _natural_order(item: tuple[str, Any]) -> list[tuple[bool, int, str]]:
    """Sort key of (module path, value): numbers in the path are compared as numbers."""
    path = item[0]
    return [(name.isdigit(), int(name) if name.isdigit() else 0, name) for name in path.split(".")]


def _number(value: object, path: str) -> int | float:
    """Checks a width in config.json. Raises UserError for anything but a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _damaged(f"{path} has the width {reprlib.repr(value)}, which is not a number")
    return value


def _damaged(reason: str) -> UserError:
    """Returns the error for a ``quantization_config`` that gemq did not write."""
    return UserError(f"quantization_config in config.json is damaged ({reason}): copy the checkpoint again")
