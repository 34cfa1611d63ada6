"""The dense twin: a packed checkpoint written out as an ordinary one that needs no gemq.

It reads the packed files plainly and dequantizes a layer at a time, so that it doubles as an independent
check of what ``load`` computes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from gemq.checkpoint.adopt import adopt_experts
from gemq.checkpoint.auto import auto_class
from gemq.checkpoint.format import (
    PARTS,
    PackedFormat,
    TensorSpec,
    read_header,
    read_quantization_config,
    verify,
    weight_files,
)
from gemq.checkpoint.load import matrix_shapes
from gemq.checkpoint.names import hub_state, saved_names
from gemq.checkpoint.packing import PackedMatrix
from gemq.checkpoint.save import SHARD_BYTES, config_values, write_directory
from gemq.quant.grid import dequantize
from gemq.quant.widths import Width, group_size_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_dense_twin(
    packed: Path,
    out: Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    trust_remote_code: bool = False,
    shard_bytes: float = SHARD_BYTES,
) -> None:
    """Writes the dequantized model of the packed checkpoint directory ``packed`` to ``out``.

    dtype: of the weights that were packed; all others keep theirs
    Raises UserError when ``packed`` is damaged or ``out`` is taken.
    """
    from transformers import AutoConfig

    packed_format = PackedFormat.from_dict(read_quantization_config(packed))
    config = AutoConfig.from_pretrained(packed, trust_remote_code=trust_remote_code)
    del config.quantization_config
    with torch.device("meta"):
        skeleton = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    adopt_experts(skeleton)
    shapes = matrix_shapes(skeleton, packed_format)
    reader = _Reader(packed, skeleton, packed_format.expected(shapes))
    shards = _dense_shards(reader, skeleton, packed_format, shapes, dtype)
    values = {**config_values(config), "dtype": str(dtype).removeprefix("torch.")}
    write_directory(out, values, shards, packed, None, None, shard_bytes, set())


class _Reader:
    """Tensors of a packed checkpoint by name, checked against the format."""

    def __init__(self, packed: Path, model: PreTrainedModel, expected: Mapping[str, TensorSpec]) -> None:
        self._files: dict[str, tuple[Path, str]] = {}  # name -> file, name in the file
        self._open: dict[Path, Any] = {}
        found = {}
        for file in weight_files(packed):
            for name, spec in read_header(file).items():
                found[name] = spec
                self._files[name] = (file, name)
        if not expected.keys() <= found.keys():
            for name, saved in saved_names(model, expected).items():
                if saved in found:
                    found[name], self._files[name] = found.pop(saved), self._files.pop(saved)
        verify(expected, found)
        self.unpacked = sorted(found.keys() - expected.keys())

    def tensor(self, name: str) -> Tensor:
        file, stored = self._files[name]
        if file not in self._open:  # kept open: a header may list 100,000 tensors
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file].get_tensor(stored)

    def matrix(self, name: str) -> PackedMatrix:
        return PackedMatrix(*(self.tensor(f"{name}.{part}") for part in PARTS))


def _dense_shards(
    reader: _Reader,
    skeleton: PreTrainedModel,
    packed_format: PackedFormat,
    shapes: Mapping[str, tuple[int, int]],
    dtype: torch.dtype,
) -> Iterator[dict[str, Tensor]]:
    """One dict a layer with what was packed, then everything else as it is stored."""

    def weight(name: str, kind: str, width: Width) -> Tensor:
        group_size = group_size_for(shapes[kind][1], packed_format.group_size)
        return dequantize(reader.matrix(name).unpack(width, group_size), dtype)

    # Hub names of a layer come from all of its tensors together (a family may fuse or split them there).
    layers: dict[str, list[str]] = {}
    for path in [*packed_format.experts, *packed_format.linears]:
        layer = re.match(r".*?\.\d+(?=\.)", path)
        layers.setdefault(layer.group() if layer else path, []).append(path)
    for paths in layers.values():
        dense: dict[str, Tensor] = {}
        for path in paths:
            if path in packed_format.linears:
                dense[f"{path}.weight"] = weight(path, path, packed_format.linears[path])
                continue
            transposed = getattr(skeleton.get_submodule(path), "is_transposed", False)
            for proj, widths in packed_format.experts[path].items():
                name = f"{path}.{proj}"
                stacked = torch.stack([weight(f"{path}.{e}.{proj}", name, w) for e, w in enumerate(widths)])
                dense[name] = stacked.transpose(-1, -2).contiguous() if transposed else stacked
        yield hub_state(skeleton, dense)
    for name in reader.unpacked:
        yield {name: reader.tensor(name)}
