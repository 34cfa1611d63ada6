"""What a tensor-parallel rank holds of a packed matrix. Pure arithmetic: no torch, no vLLM.

Rows may be cut anywhere. Columns may be cut between groups only: a group shares one scale and one offset, and its codes
interleave inside its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from gemq.checkpoint.format import PackedFormat, Shapes
from gemq.errors import UserError
from gemq.quant.widths import group_size_for

_ROW_PARALLEL = (".o_proj", ".down_proj", ".out_proj", ".dense")
"""Linears whose input columns vLLM divides between ranks, by the names that families give them."""


class Piece(NamedTuple):
    """Rows ``start`` to ``stop`` of the packed matrix ``name``, all of which has ``of`` rows."""

    name: str
    start: int
    stop: int
    of: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def groups_of_rank(name: str, columns: int, group_size: int, rank: int, size: int, others: Iterable[int]) -> slice:
    """The groups of ``columns`` columns that rank ``rank`` of ``size`` holds.

    others: groups per row of all matrices that are cut like this one, for the sizes that the message names
    Raises UserError when ``size`` ranks would cut a group in two.
    """
    groups = columns // group_size
    if groups % size:
        common = math.gcd(groups, *others)
        works = [str(n) for n in range(1, common + 1) if common % n == 0]
        raise UserError(
            f"tensor parallel size {size} would cut the groups of {group_size} columns of {name} ({columns} columns): "
            f"use --tensor-parallel-size {_or(works)}"
        )
    each = groups // size
    return slice(rank * each, (rank + 1) * each)


def divided_groups(packed_format: PackedFormat, shapes: Shapes) -> set[int]:
    """Groups per row of every matrix whose columns vLLM divides between ranks."""
    paths = [f"{path}.down_proj" for path in packed_format.experts]
    paths += [path for path in packed_format.linears if path.endswith(_ROW_PARALLEL)]
    return {shapes[p][1] // group_size_for(shapes[p][1], packed_format.group_size) for p in paths}


def _or(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
