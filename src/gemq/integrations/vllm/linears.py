"""vLLM's dense linears with packed weights: single or merged (gate and up; q, k and v), divided by rows or columns.

Matrices that vLLM joins in one layer may have different widths in the checkpoint. Consecutive ones of equal width
become one packed matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

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
from gemq.integrations.vllm.row_order import row_order
from gemq.integrations.vllm.split import RowRange, divided_groups, groups_of_rank
from gemq.kernels.modules import PackedLinear
from gemq.quant.widths import group_size_for

if TYPE_CHECKING:
    from gemq.integrations.vllm.method import Checkpoint

_SUPPORTED = (QKVParallelLinear, MergedColumnParallelLinear, ColumnParallelLinear, RowParallelLinear, ReplicatedLinear)
_PARAMETERS = {"codes": "qweight", "scales": "scales", "offsets": "offsets"}
"""Tensors of a packed matrix -> parameters of vLLM's layer.

vLLM looks for ``qweight`` where it needs a dense copy (multi-head latent attention).
"""


class _Block(NamedTuple):
    """Consecutive matrices of a layer that have one width and form one packed matrix.

    ``name`` is the one that ``ops`` knows it by. ``suffix`` ends the names of its parameters.
    """

    name: str
    suffix: str
    packed: PackedLinear
    ranges: list[RowRange]


class PackedLinearMethod(LinearMethodBase):
    """Linears that read their packed weights from the files of the checkpoint."""

    def __init__(self, packed_format: PackedFormat, paths: Sequence[str], checkpoint: Checkpoint) -> None:
        """Remember what to load. ``paths``: the checkpoint's linears that vLLM joins in one layer, in order."""
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
        """Create empty packed matrices. Raises UserError for a model that is not supported."""
        reader = self._checkpoint.reader
        ranges = _rank_rows(layer, self._paths, output_partition_sizes)
        for matrix in ranges:
            shape = (matrix.total_rows, input_size)
            if reader.shapes[matrix.name] != shape:
                raise UserError(
                    f"{matrix.name} is {list(reader.shapes[matrix.name])} in the checkpoint and "
                    f"{list(shape)} in vLLM: this model is not supported"
                )
        group_size = group_size_for(input_size, self._format.group_size)
        size = input_size // input_size_per_partition
        rank = layer.tp_rank if size > 1 else 0
        group_counts = divided_groups(reader.format, reader.shapes) if size > 1 else ()
        self._groups = groups_of_rank(layer.prefix, input_size, group_size, rank, size, group_counts)
        self._blocks: list[_Block] = []
        for width, same_width in groupby(ranges, key=lambda matrix: self._format.linears[matrix.name]):
            block_ranges = list(same_width)
            rows = sum(matrix.rows for matrix in block_ranges)
            packed = PackedLinear(rows, input_size_per_partition, width, group_size, None)
            number = len(self._blocks)
            name = ops.name_module(f"{layer.prefix}.{number}" if number else layer.prefix, packed)
            block = _Block(name, f"_{number}" if number else "", packed, block_ranges)
            self._blocks.append(block)
            for tensor_name, parameter_name in _PARAMETERS.items():
                parameter = nn.Parameter(getattr(packed, tensor_name), requires_grad=False)
                layer.register_parameter(parameter_name + block.suffix, parameter)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Read this rank's share of every matrix from the files."""
        reader = self._checkpoint.reader
        for block in self._blocks:
            for tensor_name, parameter_name in _PARAMETERS.items():  # vLLM may have moved its parameters
                parameter = getattr(layer, parameter_name + block.suffix)
                setattr(block.packed, tensor_name, parameter.data)
            start = 0
            for matrix in block.ranges:
                stored = reader.matrix_slice(matrix.name, slice(matrix.start, matrix.stop), self._groups)
                order = row_order(matrix.name, matrix.total_rows, matrix.start, matrix.stop)
                if order is not None:
                    stored = stored.select(order)
                for target, source in zip(block.packed.matrix().tensors(), stored.tensors(), strict=True):
                    target[start : start + matrix.rows].copy_(source)
                start += matrix.rows

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the outputs of this rank, [..., rows]."""
        outputs = [ops.linear(x, block.packed.out_features, block.name) for block in self._blocks]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return output if bias is None else output + bias


def _rank_rows(layer: LinearBase, paths: Sequence[str], rank_row_counts: Sequence[int]) -> list[RowRange]:
    """Return the rows that this rank holds, in the order in which vLLM joins them.

    Args:
        layer: vLLM's layer
        paths: the checkpoint's matrices: one for each that vLLM joins, or one that is already joined
        rank_row_counts: rows of each joined matrix on this rank
    """
    divisions = _divisions(layer, len(rank_row_counts))
    if len(paths) not in (1, len(rank_row_counts)):
        raise UserError(f"{layer.prefix} joins {len(rank_row_counts)} matrices, the checkpoint has {len(paths)}")
    totals = [rows * count for rows, (_, count) in zip(rank_row_counts, divisions, strict=True)]
    is_joined = len(paths) == 1
    ranges = []
    for number, (rows, (index, _)) in enumerate(zip(rank_row_counts, divisions, strict=True)):
        start = index * rows
        if is_joined:
            start += sum(totals[:number])
        path = paths[0] if is_joined else paths[number]
        total_rows = sum(totals) if is_joined else totals[number]
        ranges.append(RowRange(path, start, start + rows, total_rows))
    return ranges


def _divisions(layer: LinearBase, matrices: int) -> list[tuple[int, int]]:
    """Return for each joined matrix the number of shares of its rows, and the index of this rank's: (index, count)."""
    kind = next((kind for kind in _SUPPORTED if isinstance(layer, kind)), None)
    if kind is None or type(layer).weight_loader is not kind.weight_loader:
        raise UserError(f"{layer.prefix} ({type(layer).__name__}) is not supported: load the model with Transformers")
    rank, size = layer.tp_rank, layer.tp_size
    if kind is QKVParallelLinear:
        replicas = layer.num_kv_head_replicas
        kv_division = (rank // replicas, size // replicas)
        return [(rank, size), kv_division, kv_division]
    if kind in (RowParallelLinear, ReplicatedLinear):
        return [(0, 1)] * matrices
    return [(rank, size)] * matrices
