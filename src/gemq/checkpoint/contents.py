"""Summary of a packed checkpoint from its headers, without reading weights."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemq.checkpoint.format import PackedFormat, PackedTensor, ProjectionWidths, Shapes
from gemq.checkpoint.stored import StoredCheckpoint
from gemq.checkpoint.verification import surplus_names
from gemq.errors import UserError
from gemq.quant.widths import SMALLEST_GROUP, TILE_SIDE, ExpertWidths, TrellisWidth, plain_widths
from gemq.runtime.safetensors_files import TensorSpec


@dataclass(frozen=True)
class Contents:
    """Widths and sizes of a packed checkpoint. ``inspect`` returns it.

    Attributes:
        path: directory of the checkpoint
        model_type: type of the model, from config.json
        codes: kind of the experts' codes, ``affine`` or ``trellis``
        state_bits: bits of a state of trellis codes, None for affine codes
        group_size: weights of affine codes that share a scale and an offset; smaller for matrices whose columns it does
            not divide
        layers: for each experts module its path in the model, the widths of its experts (of gate and up, and of down),
            and their mean nominal bits
        linears: number of packed dense linears by width
        expert_bytes: bytes of packed experts, with scales and offsets
        linear_bytes: bytes of packed dense linears, with scales and offsets
        other_bytes: bytes of tensors that are not packed
        other_elements: number of elements of tensors that are not packed
        expert_weights: number of weights in packed experts
        expert_bits_nominal: mean bits per weight of packed experts, without scales and offsets
    """

    path: Path
    model_type: str
    codes: str
    state_bits: int | None
    group_size: int
    layers: tuple[tuple[str, list[ExpertWidths], float], ...]
    linears: dict[str, int]
    expert_bytes: int
    linear_bytes: int
    other_bytes: int
    other_elements: int
    expert_weights: int
    expert_bits_nominal: float

    @property
    def stored_bytes(self) -> int:
        """Bytes of all the checkpoint's tensors."""
        return self.expert_bytes + self.linear_bytes + self.other_bytes

    @property
    def expert_bits_stored(self) -> float:
        """Mean bits per weight of packed experts, with scales and offsets."""
        return self.expert_bytes * 8 / self.expert_weights

    def loaded_bytes(self, itemsize: int) -> int:
        """Return the bytes that the tensors of the loaded model take.

        Args:
            itemsize: bytes per element of the tensors that are not packed, such as 2 for bfloat16
        """
        return self.expert_bytes + self.linear_bytes + self.other_elements * itemsize

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as ``gemq inspect --json`` writes them."""
        return {
            "model": str(self.path),
            "model_type": self.model_type,
            "codes": self.codes,
            "state_bits": self.state_bits,
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
    """Summarize a packed checkpoint from its configuration and tensor headers, without reading weights.

    Args:
        path: the checkpoint's directory
        verify: also read all weights and compare them with the checksums

    Returns:
        The widths of all experts, and sizes.

    Raises:
        UserError: it is not a packed checkpoint, or it is damaged. With ``verify`` also if it has no checksums.
    """
    path = Path(path)
    stored = StoredCheckpoint.open(path)
    specs = stored.specs
    shapes = stored_shapes(stored.format, specs)
    if shapes is None:  # save_pretrained renamed tensors, or the checkpoint is damaged: the model's classes are needed
        from gemq.checkpoint.reader import CheckpointReader

        reader = CheckpointReader(path)
        specs, shapes = reader.specs, reader.shapes
    stored.check_config()
    if verify:
        if stored.checksums.tensors is None:
            raise UserError(f"{path} has no checksums to verify it with: save_pretrained or an older gemq wrote it")
        stored.check_data()
    return _summarize(stored, specs, shapes)


def _summarize(stored: StoredCheckpoint, specs: Mapping[str, TensorSpec], shapes: Shapes) -> Contents:
    """Sums the sizes of all tensors. ``specs`` lists packed tensors by their names in the model."""
    packed = stored.format
    expert_bytes = linear_bytes = 0
    weights = Counter[str]()  # number of weights and sum of their bits, by experts module
    bits = defaultdict[str, float](float)
    packed_names = set[str]()
    for matrix in packed.matrices():
        matrix_bytes = sum(specs[name].bytes for name in matrix.tensor_names)
        packed_names.update(matrix.tensor_names)
        module = matrix.kind.rpartition(".")[0]
        if module in packed.experts:
            num_weights = math.prod(shapes[matrix.kind])
            expert_bytes += matrix_bytes
            weights[module] += num_weights
            bits[module] += matrix.width.bits * num_weights
        else:
            linear_bytes += matrix_bytes
    layers = []
    for path, projections in packed.experts.items():
        layers.append((path, widths_by_expert(projections), bits[path] / max(weights[path], 1)))
    unpacked = [spec for name, spec in specs.items() if name not in packed_names]
    return Contents(
        path=stored.directory,
        model_type=str(stored.config.get("model_type")),
        codes=packed.codes,
        state_bits=packed.state_bits or None,
        group_size=packed.group_size,
        layers=tuple(layers),
        linears=dict(Counter(str(width) for width in packed.linears.values())),
        expert_bytes=expert_bytes,
        linear_bytes=linear_bytes,
        other_bytes=sum(spec.bytes for spec in unpacked),
        other_elements=sum(math.prod(spec.shape) for spec in unpacked),
        expert_weights=weights.total(),
        expert_bits_nominal=sum(bits.values()) / max(weights.total(), 1),
    )


def widths_by_expert(projections: ProjectionWidths) -> list[ExpertWidths]:
    """Returns the widths of each expert: gate and up, or up, before down. JSON sorts the projections by name."""
    names = sorted(projections, key=lambda name: name == "down_proj")
    return list(zip(*(projections[name] for name in names), strict=True))


def stored_shapes(packed: PackedFormat, specs: Mapping[str, TensorSpec]) -> Shapes | None:
    """Returns (rows, columns) of every packed matrix kind from headers, or None if the tensors are inconsistent."""
    shapes: dict[str, tuple[int, int]] = {}
    for matrix in packed.matrices():
        shape = _matrix_shape(matrix, specs, packed.group_size)
        if shape is None or shapes.setdefault(matrix.kind, shape) != shape:
            return None
    expected = packed.expected(shapes)
    if surplus_names(expected, specs):
        return None
    if any(specs.get(name) != spec for name, spec in expected.items()):
        return None
    return shapes


def _matrix_shape(matrix: PackedTensor, specs: Mapping[str, TensorSpec], group_size: int) -> tuple[int, int] | None:
    """Returns (rows, columns) of a packed matrix from its codes and scales, or None if they do not fit together."""
    codes = specs.get(f"{matrix.name}.codes")
    scales = specs.get(f"{matrix.name}.scales")
    if codes is None or scales is None or len(codes.shape) != 2:
        return None
    if isinstance(matrix.width, TrellisWidth):
        columns = codes.shape[1] // matrix.width.tile_bytes * TILE_SIDE
        return codes.shape[0] * TILE_SIDE, columns
    if len(scales.shape) != 2:
        return None
    rows, groups = scales.shape
    while group_size >= SMALLEST_GROUP:
        if groups * matrix.width.group_bytes(group_size) == codes.shape[1]:
            return rows, groups * group_size
        group_size //= 2
    return None
