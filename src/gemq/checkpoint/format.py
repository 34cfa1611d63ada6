"""What a packed checkpoint holds: config.json's ``quantization_config`` and the tensors that follow from it.

Schema version 2 (``docs/checkpoint-format.md``). Imports neither torch nor Transformers: a checkpoint can
be planned, inspected and verified from JSON and safetensors headers alone.
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
from gemq.quant.widths import SMALLEST_GROUP, Width, bytes_per_group, group_size_for, matrix_bytes, parse_width
from gemq.runtime.safetensors_files import TensorSpec, read_json

QUANT_METHOD = "gemq"
FORMAT_VERSION = 2
PARTS = ("codes", "scales", "offsets")
UP_PROJECTIONS = ("gate_up_proj", "up_proj")
LARGEST_GROUP = 1 << 16
_MODULE_PATH = re.compile(r"\w+(\.\w+)*", re.ASCII)

Shapes = Mapping[str, tuple[int, int]]
"""(rows, columns) of each packed matrix kind: ``{experts path}.{projection}`` or ``{linear path}``."""


class PackedTensor(NamedTuple):
    """One packed matrix: its name without ``.codes``, the key of its shape, and its width."""

    name: str
    kind: str
    width: Width


@dataclass(frozen=True)
class PackedFormat:
    """Which matrices are packed and at which widths. Paths are Transformers' in-model module paths."""

    experts: Mapping[str, Mapping[str, tuple[Width, ...]]] = field(default_factory=dict)
    """experts path -> ``gate_up_proj`` (or ``up_proj``) and ``down_proj`` -> width of each expert."""
    linears: Mapping[str, Width] = field(default_factory=dict)
    """path of a dense linear -> width."""
    group_size: int = 128
    """Wanted group size; a matrix's own is ``group_size_for(columns, group_size)``."""
    fingerprint: str = ""
    """What the checkpoint was made from (model, calibration, recipe), hashed: tells a result from another."""

    def __post_init__(self) -> None:
        if self.group_size < SMALLEST_GROUP or self.group_size & (self.group_size - 1):
            raise UserError(f"group_size {self.group_size} is not a power of two from {SMALLEST_GROUP} up: try 128")
        if self.group_size > LARGEST_GROUP:
            raise UserError(f"group_size {self.group_size} is larger than {LARGEST_GROUP}: try 128")
        for path, projections in self.experts.items():
            names = set(projections)
            if names not in ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"}):
                raise _damaged(f"{path} lists projections {', '.join(sorted(names)) or 'none'}")
            counts = {len(widths) for widths in projections.values()}
            if len(counts) != 1 or 0 in counts:
                raise _damaged(f"the projections of {path} list {' and '.join(map(str, sorted(counts)))} experts")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PackedFormat:
        """From config.json's ``quantization_config``, layers in the model's order: in the file they are in that of
        their names, 10 before 2. Raises UserError for anything that is not version 2.
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
        experts, linears, group_size = (values.get(key) for key in ("experts", "linears", "group_size"))
        fingerprint = values.get("fingerprint", "")
        if not isinstance(experts, Mapping) or not isinstance(linears, Mapping) or type(group_size) is not int:
            raise _damaged("experts, linears or group_size is missing or of the wrong kind")
        if not isinstance(fingerprint, str):
            raise _damaged("fingerprint is not text")
        if not all(isinstance(p, Mapping) and all(isinstance(w, list) for w in p.values()) for p in experts.values()):
            raise _damaged("experts does not map projections to lists of widths")
        for path in (*experts, *linears):
            if not _MODULE_PATH.fullmatch(path):
                raise _damaged(f"{path!r} is not the path of a module")
        return cls(
            experts={
                path: {proj: tuple(_width(w, path) for w in widths) for proj, widths in projections.items()}
                for path, projections in sorted(experts.items(), key=_by_number)
            },
            linears={path: _width(width, path) for path, width in sorted(linears.items(), key=_by_number)},
            group_size=group_size,
            fingerprint=fingerprint,
        )

    def to_dict(self) -> dict[str, Any]:
        """The ``quantization_config`` for config.json."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "group_size": self.group_size,
            "fingerprint": self.fingerprint,
            "experts": {p: {proj: list(w) for proj, w in widths.items()} for p, widths in self.experts.items()},
            "linears": dict(self.linears),
        }

    def matrices(self) -> Iterator[PackedTensor]:
        """Every packed matrix, in a fixed order."""
        for path, projections in self.experts.items():
            for proj, widths in projections.items():
                for e, width in enumerate(widths):
                    yield PackedTensor(f"{path}.{e}.{proj}", f"{path}.{proj}", width)
        for path, width in self.linears.items():
            yield PackedTensor(path, path, width)

    def tensor_names(self) -> Iterator[str]:
        return (f"{matrix.name}.{part}" for matrix in self.matrices() for part in PARTS)

    def replaced_names(self) -> set[str]:
        """In-model names of the full-precision parameters that the packed tensors stand for."""
        experts = {f"{path}.{proj}" for path, projections in self.experts.items() for proj in projections}
        return experts | {f"{path}.weight" for path in self.linears}

    def expected(self, shapes: Shapes) -> dict[str, TensorSpec]:
        """Name, dtype and shape of every packed tensor."""
        specs = {}
        for matrix in self.matrices():
            rows, columns = shapes[matrix.kind]
            group_size = group_size_for(columns, self.group_size)
            groups = columns // group_size
            specs[f"{matrix.name}.codes"] = TensorSpec("U8", (rows, groups * bytes_per_group(matrix.width, group_size)))
            specs[f"{matrix.name}.scales"] = specs[f"{matrix.name}.offsets"] = TensorSpec("U8", (rows, groups))
        return specs

    def total_bytes(self, shapes: Shapes) -> int:
        """Bytes of all packed tensors: codes, scales and offsets."""
        return sum(
            matrix_bytes(*shapes[m.kind], m.width, group_size_for(shapes[m.kind][1], self.group_size))
            for m in self.matrices()
        )


def read_packed_config(checkpoint: Path) -> dict[str, Any]:
    """The contents of a packed checkpoint's config.json. Raises UserError when it is unreadable or not gemq's."""
    if not os.path.lexists(checkpoint / "config.json"):
        raise UserError(f"{checkpoint} has no readable config.json: give a directory that gemq wrote")
    config = read_json(checkpoint / "config.json", unique_keys=True)
    values = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(values, dict) or values.get("quant_method") != QUANT_METHOD:
        raise UserError(f"{checkpoint} is not a gemq checkpoint: give a directory that gemq quantize or export wrote")
    return config


def read_quantization_config(checkpoint: Path) -> dict[str, Any]:
    """The raw ``quantization_config`` of a local checkpoint. Raises UserError when it is not gemq's."""
    values: dict[str, Any] = read_packed_config(checkpoint)["quantization_config"]
    return values


def is_packed(path: Path) -> bool:
    """Whether a directory's config.json names gemq as its quantization."""
    try:
        config = read_json(path / "config.json")
    except UserError:
        return False
    values = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(values, dict) and values.get("quant_method") == QUANT_METHOD


def verify(expected: Mapping[str, TensorSpec], found: Mapping[str, TensorSpec]) -> None:
    """Compares what config.json promises with what the files hold; UserError names the first bad tensor."""
    wrong = []
    for name, spec in expected.items():
        if name not in found:
            wrong.append(f"{name} is missing")
        elif found[name] != spec:
            wrong.append(f"{name} is {_describe(found[name])} instead of {_describe(spec)}")
    known = expected.keys()
    wrong += [f"{name} is not listed in config.json" for name in found if name.endswith(".codes") and name not in known]
    if wrong:
        raise UserError(
            f"{len(wrong)} packed tensors do not match config.json, first: {wrong[0]}: "
            "copy the checkpoint again, or undo the edit of config.json"
        )


class UnpackedTensor(NamedTuple):
    """What the model expects of a tensor that is not packed. ``required`` is False for weights that are tied."""

    shape: tuple[int, ...]
    floating: bool
    required: bool = True


FLOATING = {"F64", "F32", "F16", "BF16"}


def verify_unpacked(
    expected: Mapping[str, UnpackedTensor], packed: Mapping[str, TensorSpec], found: Mapping[str, TensorSpec]
) -> None:
    """Compares the tensors that are not packed with what the model expects.

    Raises:
        UserError: one is missing, has another shape or no floating-point type, or the model has no place for it.
    """
    wrong = []
    for name, tensor in expected.items():
        if name not in found:
            wrong += [f"{name} is missing"] if tensor.required else []
        elif found[name].shape != tensor.shape:
            wrong.append(f"{name} is {list(found[name].shape)} instead of {list(tensor.shape)}")
        elif tensor.floating and found[name].dtype not in FLOATING:
            wrong.append(f"{name} is of type {found[name].dtype}")
    wrong += [f"the model has no place for {name}" for name in sorted(found.keys() - packed.keys() - expected.keys())]
    if wrong:
        raise UserError(
            f"{len(wrong)} unpacked tensors do not fit the model, first: {wrong[0]}: copy the checkpoint again"
        )


def _describe(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"


def _by_number(item: tuple[str, Any]) -> list[tuple[bool, int, str]]:
    """Sorts by module path, numbers in it by their size."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in item[0].split(".")]


def _width(value: object, path: str) -> Width:
    """A width as config.json has it: a number, neither text nor a truth value. Raises UserError for others."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _damaged(f"{path} has the width {reprlib.repr(value)}, which is not a number")
    return parse_width(value)


def _damaged(what: str) -> UserError:
    return UserError(f"quantization_config in config.json is damaged ({what}): copy the checkpoint again")
