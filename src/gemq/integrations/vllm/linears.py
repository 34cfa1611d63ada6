"""vLLM's dense linears with packed weights: single, merged (gate and up; q, k and v), split by rows or by columns.

What vLLM joins in one layer may have different widths in the checkpoint. Neighbours of equal width become one packed
matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from gemq.checkpoint.format import PackedFormat
from gemq.errors import UserError
from gemq.integrations.vllm import ops
from gemq.integrations.vllm.split import Piece, divided_groups, groups_of_rank
from gemq.kernels.modules import PackedLinear
from gemq.quant.widths import group_size_for

if TYPE_CHECKING:
    from gemq.integrations.vllm.method import Checkpoint

_KNOWN = (QKVParallelLinear, MergedColumnParallelLinear, ColumnParallelLinear, RowParallelLinear, ReplicatedLinear)
_PARAMETERS = {"codes": "qweight", "scales": "scales", "offsets": "offsets"}
"""vLLM looks for a parameter ``qweight`` where it needs a dense copy (multi-head latent attention)."""


class PackedLinearMethod(LinearMethodBase):
    def __init__(self, packed_format: PackedFormat, paths: Sequence[str], checkpoint: Checkpoint) -> None:
        """paths: the checkpoint's linears that vLLM joins in one layer, in order."""
        self._format, self._paths, self._checkpoint = packed_format, paths, checkpoint

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        reader = self._checkpoint.reader
        pieces = _pieces(layer, self._paths, output_partition_sizes)
        for piece in pieces:
            if reader.shapes[piece.name] != (piece.of, input_size):
                raise UserError(
                    f"{piece.name} is {list(reader.shapes[piece.name])} in the checkpoint and "
                    f"{[piece.of, input_size]} in vLLM: this model is not supported"
                )
        group_size = group_size_for(input_size, self._format.group_size)
        size = input_size // input_size_per_partition
        rank = layer.tp_rank if size > 1 else 0
        others = divided_groups(reader.format, reader.shapes) if size > 1 else ()
        self._groups = groups_of_rank(layer.prefix, input_size, group_size, rank, size, others)
        self._parts: list[tuple[str, PackedLinear, list[Piece]]] = []
        for number, (width, group) in enumerate(groupby(pieces, key=lambda p: self._format.linears[p.name])):
            members = list(group)
            rows = sum(piece.rows for piece in members)
            packed = PackedLinear(rows, input_size_per_partition, width, group_size, None)
            name = ops.name_module(f"{layer.prefix}.{number}" if number else layer.prefix, packed)
            self._parts.append((name, packed, members))
            for part, parameter in _PARAMETERS.items():
                tensor = nn.Parameter(getattr(packed, part), requires_grad=False)
                layer.register_parameter(f"{parameter}_{number}" if number else parameter, tensor)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Reads the rank's part of every matrix from the files."""
        reader = self._checkpoint.reader
        for number, (_, packed, members) in enumerate(self._parts):
            for part, parameter in _PARAMETERS.items():  # vLLM may have moved its parameters since
                tensor = getattr(layer, f"{parameter}_{number}" if number else parameter)
                setattr(packed, part, tensor.data)
            start = 0
            for piece in members:
                matrix = reader.matrix_slice(piece.name, slice(piece.start, piece.stop), self._groups)
                for mine, given in zip(packed.matrix(), matrix, strict=True):
                    mine[start : start + piece.rows].copy_(given)
                start += piece.rows

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        outputs = [ops.linear(x, packed.out_features, name) for name, packed, _ in self._parts]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return out if bias is None else out + bias


def _pieces(layer: LinearBase, paths: Sequence[str], local: list[int]) -> list[Piece]:
    """The rows of ``paths`` that this rank holds, in the order in which vLLM joins them. ``local``: rows of each."""
    known = next((kind for kind in _KNOWN if isinstance(layer, kind)), None)
    if known is None or type(layer).weight_loader is not known.weight_loader:
        raise UserError(f"{layer.prefix} ({type(layer).__name__}) is not supported: load the model with Transformers")
    rank, size = layer.tp_rank, layer.tp_size
    if known is QKVParallelLinear:
        q, k, v = local
        replicas = layer.num_kv_head_replicas
        firsts = [rank, rank // replicas, rank // replicas]
        sizes = [q * size, k * size // replicas, v * size // replicas]
    elif known in (RowParallelLinear, ReplicatedLinear):
        firsts, sizes = [0] * len(local), list(local)
    else:
        firsts, sizes = [rank] * len(local), [rows * size for rows in local]
    if len(paths) == len(local):
        names, offsets, totals = list(paths), [0] * len(local), sizes
    elif len(paths) == 1:  # joined in the checkpoint as well
        names, totals = [paths[0]] * len(local), [sum(sizes)] * len(local)
        offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    else:
        raise UserError(f"{layer.prefix} joins {len(local)} matrices, the checkpoint has {len(paths)}")
    return [
        Piece(name, offset + first * rows, offset + (first + 1) * rows, total)
        for name, offset, first, rows, total in zip(names, offsets, firsts, local, totals, strict=True)
    ]
