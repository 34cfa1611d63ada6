"""Dense checkpoints: a packed checkpoint written as an ordinary one, which can be loaded without gemq.

Reads the packed files and dequantizes one layer at a time, independently of ``load``. Tests therefore compare the two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gemq.checkpoint.format import layer_path
from gemq.checkpoint.names import hub_state
from gemq.checkpoint.outputs import check_output, lock_output
from gemq.checkpoint.reader import CheckpointReader
from gemq.checkpoint.save import SHARD_BYTES, config_values, write_directory
from gemq.quant.stored_matrix import dequantize_matrix


def write_dense_checkpoint(
    packed: str | Path,
    out: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    trust_remote_code: bool = False,
    shard_bytes: float = SHARD_BYTES,
) -> None:
    """Write the model of a packed checkpoint as a plain Transformers model, which loads without gemq.

    Args:
        packed: directory of the packed checkpoint
        out: directory to write, which must not exist or be empty
        dtype: type of the weights that were packed; all others keep theirs
        trust_remote_code: allow Python code that comes with the model to run
        shard_bytes: approximate size of a file in bytes

    Raises:
        UserError: ``packed`` is not a packed checkpoint or damaged, or ``out`` exists.
    """
    packed, out = Path(packed), Path(out)
    check_output(out, resume=False)
    reader = CheckpointReader(packed, trust_remote_code=trust_remote_code)
    reader.verify_unpacked()
    reader.verify_data()
    config = {**config_values(reader.config), "dtype": str(dtype).removeprefix("torch.")}
    with lock_output(out):
        write_directory(out, config, _dense_shards(reader, dtype), packed, shard_bytes=shard_bytes)


def _dense_shards(reader: CheckpointReader, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Yields the dequantized tensors of each layer, then every unpacked tensor, by name in the files."""
    # A family may fuse or split the tensors of a layer on the hub, so hub_state needs all of them in one call.
    paths_by_layer: dict[str, list[str]] = defaultdict(list)
    for path in [*reader.format.experts, *reader.format.linears]:
        paths_by_layer[layer_path(path) or path].append(path)
    for paths in paths_by_layer.values():
        tensors: dict[str, Tensor] = {}
        for path in paths:
            if path in reader.format.linears:
                tensors[f"{path}.weight"] = dequantize_matrix(reader.matrix(path)).to(dtype)
            else:
                tensors.update(_dense_experts(reader, path, dtype))
        yield hub_state(reader.skeleton, tensors)
    for name in reader.unpacked:
        yield {name: reader.tensor(name)}


def _dense_experts(reader: CheckpointReader, path: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the dequantized parameters of an experts module, by name in the model."""
    is_transposed = getattr(reader.skeleton.get_submodule(path), "is_transposed", False)
    tensors = {}
    for projection, widths in reader.format.experts[path].items():
        matrices = []
        for expert in range(len(widths)):
            matrices.append(dequantize_matrix(reader.matrix(f"{path}.{expert}.{projection}")).to(dtype))
        stacked = torch.stack(matrices)
        tensors[f"{path}.{projection}"] = stacked.transpose(-1, -2).contiguous() if is_transposed else stacked
    return tensors
