"""What a packed checkpoint holds, from its headers alone: no weights are read."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemq.checkpoint.format import PARTS, PackedFormat, Shapes
from gemq.checkpoint.stored import StoredCheckpoint
from gemq.errors import UserError
from gemq.quant.widths import (
    SMALLEST_GROUP,
    ExpertWidths,
    Width,
    bytes_per_group,
    nominal_bits,
    plain_widths,
    width_name,
)
from gemq.runtime.safetensors_files import TensorSpec


@dataclass(frozen=True)
class Contents:
    """A packed checkpoint in figures.

    layers: per experts module its path, the widths of its experts and their mean bits
    other_numbers: elements of the tensors that are not packed
    """

    path: Path
    model_type: str
    group_size: int
    layers: tuple[tuple[str, list[ExpertWidths], float], ...]
    linears: dict[str, int]
    expert_bytes: int
    linear_bytes: int
    other_bytes: int
    other_numbers: int
    expert_weights: int
    expert_bits_nominal: float

    @property
    def stored_bytes(self) -> int:
        return self.expert_bytes + self.linear_bytes + self.other_bytes

    @property
    def expert_bits_stored(self) -> float:
        return self.expert_bytes * 8 / self.expert_weights

    def loaded_bytes(self, itemsize: int) -> int:
        """Bytes of the loaded model, whose unpacked tensors take ``itemsize`` bytes an element."""
        return self.expert_bytes + self.linear_bytes + self.other_numbers * itemsize

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": str(self.path),
            "model_type": self.model_type,
            "group_size": self.group_size,
            "stored_bytes": self.stored_bytes,
            "expert_bytes": self.expert_bytes,
            "linear_bytes": self.linear_bytes,
            "other_bytes": self.other_bytes,
            "expert_bits_nominal": self.expert_bits_nominal,
            "expert_bits_stored": self.expert_bits_stored,
            "allocation": plain_widths([widths for _, widths, _ in self.layers]),
            "linears": self.linears,
        }


def inspect_checkpoint(path: str | Path, *, verify: bool = False) -> Contents:
    """Reads a packed checkpoint's configuration and tensor headers.

    Args:
        path: the checkpoint's directory
        verify: read every byte as well, to compare with the checksums

    Raises:
        UserError: it is not a packed checkpoint, or it is damaged; with ``verify`` also when it has no checksums.
    """
    path = Path(path)
    stored = StoredCheckpoint.open(path)
    specs = stored.specs
    shapes = stored_shapes(stored.format, specs)
    if shapes is None:  # renamed by save_pretrained, or damaged: the model's classes can tell
        from gemq.checkpoint.reader import CheckpointReader

        reader = CheckpointReader(path)
        specs, shapes = reader.found, reader.shapes
    stored.check_config()
    if verify:
        if stored.checksums.tensors is None:
            raise UserError(f"{path} has no checksums to verify it with: save_pretrained or an older gemq wrote it")
        stored.check_data()
    return _contents(stored, specs, shapes)


def _contents(stored: StoredCheckpoint, specs: Mapping[str, TensorSpec], shapes: Shapes) -> Contents:
    """Sums over all tensors. ``specs``: packed ones by in-model name."""
    packed = stored.format
    expert_bytes = linear_bytes = 0
    weights, bits = Counter[str](), defaultdict[str, float](float)  # by experts module
    for matrix in packed.matrices():
        size = sum(specs[f"{matrix.name}.{part}"].bytes for part in PARTS)
        module = matrix.kind.rpartition(".")[0]
        if module in packed.experts:
            count = math.prod(shapes[matrix.kind])
            expert_bytes += size
            weights[module] += count
            bits[module] += nominal_bits(matrix.width) * count
        else:
            linear_bytes += size
    packed_names = {f"{matrix.name}.{part}" for matrix in packed.matrices() for part in PARTS}
    unpacked = [spec for name, spec in specs.items() if name not in packed_names]
    return Contents(
        stored.directory,
        str(stored.config.get("model_type")),
        packed.group_size,
        tuple(
            (path, list(zip(*map(widths.get, _in_order(widths)), strict=True)), bits[path] / max(weights[path], 1))
            for path, widths in packed.experts.items()
        ),
        dict(Counter(width_name(w) for w in packed.linears.values())),
        expert_bytes,
        linear_bytes,
        sum(spec.bytes for spec in unpacked),
        sum(math.prod(spec.shape) for spec in unpacked),
        weights.total(),
        sum(bits.values()) / max(weights.total(), 1),
    )


def stored_shapes(packed: PackedFormat, specs: Mapping[str, TensorSpec]) -> Shapes | None:
    """(rows, columns) of every packed matrix kind, from headers alone. None unless all packed tensors fit together."""
    shapes: dict[str, tuple[int, int]] = {}
    for matrix in packed.matrices():
        shape = _matrix_shape([specs.get(f"{matrix.name}.{part}") for part in PARTS], matrix.width, packed.group_size)
        if shape is None or shapes.setdefault(matrix.kind, shape) != shape:
            return None
    expected = packed.expected(shapes)
    surplus = any(name.endswith(".codes") and name not in expected for name in specs)
    return None if surplus or any(specs[name] != spec for name, spec in expected.items()) else shapes


def _matrix_shape(specs: Sequence[TensorSpec | None], width: Width, group_size: int) -> tuple[int, int] | None:
    """(rows, columns) of a packed matrix by its codes, scales and offsets. None when no group size fits them."""
    codes, scales, _ = specs
    if codes is None or scales is None or len(codes.shape) != 2 or len(scales.shape) != 2:
        return None
    rows, groups = scales.shape
    while group_size >= SMALLEST_GROUP:
        if groups * bytes_per_group(width, group_size) == codes.shape[1]:
            return rows, groups * group_size
        group_size //= 2
    return None


def _in_order(projections: Iterable[str]) -> list[str]:
    """Gate and up, or up, before down: JSON has them by name."""
    return sorted(projections, key=lambda name: name == "down_proj")
