"""What a packed checkpoint holds, from its headers alone: no weights are read."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemq.checkpoint.format import PackedFormat, read_quantization_config
from gemq.quant.widths import ExpertWidths, Width, nominal_bits, plain_widths, width_name
from gemq.safetensors_files import TensorSpec, read_header, weight_files


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


def inspect_checkpoint(path: str | Path) -> Contents:
    """Reads a packed checkpoint's configuration and tensor headers. Raises UserError when it is not one."""
    path = Path(path)
    packed = PackedFormat.from_dict(read_quantization_config(path))
    headers: dict[str, TensorSpec] = {}
    for file in weight_files(path):
        headers.update(read_header(file))
    sizes = {name: spec.bytes for name, spec in headers.items()}
    expert_bytes = linear_bytes = 0
    weights, bits = Counter[str](), defaultdict[str, float](float)  # by experts module
    listed = set()
    for matrix in packed.matrices():
        names = [f"{matrix.name}.{part}" for part in ("codes", "scales", "offsets")]
        taken = sum(sizes.get(n, 0) for n in names)
        listed.update(names)
        module = matrix.kind.rpartition(".")[0]
        if module in packed.experts:
            rows, groups = headers[names[1]].shape
            count = rows * _columns(headers[names[0]], groups, matrix.width)
            expert_bytes += taken
            weights[module] += count
            bits[module] += nominal_bits(matrix.width) * count
        else:
            linear_bytes += taken
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return Contents(
        path,
        str(config.get("model_type")),
        packed.group_size,
        tuple(
            (path, list(zip(*map(widths.get, _in_order(widths)), strict=True)), bits[path] / max(weights[path], 1))
            for path, widths in packed.experts.items()
        ),
        dict(Counter(width_name(w) for w in packed.linears.values())),
        expert_bytes,
        linear_bytes,
        sum(size for name, size in sizes.items() if name not in listed),
        sum(math.prod(spec.shape) for name, spec in headers.items() if name not in listed),
        weights.total(),
        sum(bits.values()) / max(weights.total(), 1),
    )


def _in_order(projections: Iterable[str]) -> list[str]:
    """Gate and up, or up, before down: JSON has them by name."""
    return sorted(projections, key=lambda name: name == "down_proj")


def _columns(codes: TensorSpec, groups: int, width: Width) -> int:
    """Input columns of a packed matrix from the bytes of its rows."""
    per_group = codes.shape[1] // groups
    if width == 1.6:  # the last of five codes a byte may be padding: groups are powers of two
        return groups * (1 << ((per_group * 5).bit_length() - 1))
    return groups * per_group * 8 // int(width)
