"""The share of a packed matrix that a tensor-parallel rank holds. Must not import torch or vLLM.

Rows may be divided anywhere. Columns may only be divided between groups, since a group shares one scale and one offset,
and its codes are interleaved in its bytes. With trellis codes a group is a block of columns that are rotated together.
Such a block is a multiple of the side of a tile, so that divided neurons cut no tile of the other matrix either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from gemq.checkpoint.format import PackedFormat, Shapes
from gemq.errors import UserError

_ROW_PARALLEL_SUFFIXES = (".o_proj", ".down_proj", ".out_proj", ".dense")
"""Linears whose input columns vLLM divides among ranks, by the names that families give them."""


class RowRange(NamedTuple):
    """Rows ``start`` to ``stop`` of the packed matrix ``name``, which has ``total_rows`` rows."""

    name: str
    start: int
    stop: int
    total_rows: int

    @property
    def rows(self) -> int:
        """Number of rows in the range."""
        return self.stop - self.start


def groups_of_rank(
    name: str, columns: int, group_size: int, rank: int, size: int, divided_group_counts: Iterable[int]
) -> slice:
    """Return the groups of a matrix's columns that a rank holds.

    Args:
        name: of the matrix, for the message
        columns: of the matrix
        group_size: columns of a group
        rank: tensor-parallel rank
        size: number of ranks
        divided_group_counts: groups per row of all matrices that are divided in this way, to suggest other sizes

    Raises:
        UserError: ``size`` ranks would divide a group.
    """
    groups = columns // group_size
    if groups % size:
        common = math.gcd(groups, *divided_group_counts)
        possible_sizes = [str(count) for count in range(1, common + 1) if common % count == 0]
        raise UserError(
            f"tensor parallel size {size} would cut the groups of {group_size} columns of {name} ({columns} columns): "
            f"use --tensor-parallel-size {_join_with_or(possible_sizes)}"
        )
    groups_per_rank = groups // size
    return slice(rank * groups_per_rank, (rank + 1) * groups_per_rank)


def divided_groups(packed_format: PackedFormat, shapes: Shapes) -> set[int]:
    """Return the groups per row of every matrix whose columns vLLM divides among ranks."""
    kinds = [f"{path}.down_proj" for path in packed_format.experts]
    kinds += [path for path in packed_format.linears if path.endswith(_ROW_PARALLEL_SUFFIXES)]
    counts = set()
    for kind in kinds:
        _, columns = shapes[kind]
        counts.add(columns // packed_format.block_side(kind, columns))
    return counts


def _join_with_or(words: list[str]) -> str:
    """Join words as ``1, 2 or 4``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
