"""The dense twin: a packed checkpoint written out as an ordinary one that needs no gemq.

It reads the packed files plainly and dequantizes a layer at a time, so that it doubles as an independent
check of what ``load`` computes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gemq.checkpoint.names import hub_state
from gemq.checkpoint.outputs import check_output, claimed
from gemq.checkpoint.reader import CheckpointReader
from gemq.checkpoint.save import SHARD_BYTES, config_values, write_directory
from gemq.quant.grid import dequantize
from gemq.quant.widths import Width, group_size_for


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
    check_output(out, resume=False)
    reader = CheckpointReader(packed, trust_remote_code=trust_remote_code)
    reader.verify_unpacked()
    reader.verify_data()
    values = {**config_values(reader.config), "dtype": str(dtype).removeprefix("torch.")}
    with claimed(out):
        write_directory(out, values, _dense_shards(reader, dtype), packed, None, None, shard_bytes, set())


def _dense_shards(reader: CheckpointReader, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """One dict a layer with what was packed, then everything else as it is stored."""
    skeleton, packed_format = reader.skeleton, reader.format

    def weight(name: str, kind: str, width: Width) -> Tensor:
        group_size = group_size_for(reader.shapes[kind][1], packed_format.group_size)
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
