"""The widths that exist, their bytes, and the group size of a matrix.

Must not import torch, so that recipes and ``--help`` stay fast.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from gemq.errors import UserError, short_repr
from gemq.runtime.integers import ceil_div

SMALLEST_GROUP = 16
"""Smallest group size."""

TILE_SIDE = 16
"""Rows and columns of a tile of trellis codes."""

ROTATION_SIDE = 128
"""Largest block of columns that are rotated together before trellis codes are made."""

MIN_EIGHTHS, MAX_EIGHTHS = 8, 32
"""Smallest and largest width of trellis codes, in eighths of a bit."""

CODES_PER_TERNARY_BYTE = 5
"""3^5 = 243 codes fit into a byte."""


@functools.total_ordering
class Width(Enum):
    """The width of a matrix's codes.

    A width has a number, which names it in files, recipes and messages: 1, 1.6, 2, 3, 4 or 8. ``Width("1.6")`` is the
    width of that number, and a width equals its number. To compute with it, take ``bits``: ternary is named 1.6, but
    counts 1.625 bits. JSON takes ``value``.

    Attributes:
        value: The number.

    Raises:
        UserError: There is no such width.
    """

    ONE_BIT = 1
    TERNARY = 1.6
    TWO_BIT = 2
    THREE_BIT = 3
    FOUR_BIT = 4
    EIGHT_BIT = 8

    @classmethod
    def _missing_(cls, value: object) -> Width:
        """Find the width of a number that is written as text. Called for values that are no member's number."""
        try:
            number = float(value)  # type: ignore[arg-type]
        except (OverflowError, TypeError, ValueError):
            number = -1.0
        for width in cls:
            if width.value == number:
                return width
        raise UserError(f"there is no width {short_repr(value)}: choose from {', '.join(map(str, cls))}")

    @classmethod
    def read(cls, number: object) -> Width:
        """Return the width of a number, or of its text. Raises UserError if there is none."""
        return cls(number)

    def __str__(self) -> str:
        """Return the number as it is written everywhere: ``1``, ``1.6``, ``2`` ..."""
        return f"{self.value:g}"

    def __eq__(self, other: object) -> bool:
        """Compare with a width, or with its number."""
        return bool(self.value == (other.value if isinstance(other, Width) else other))

    def __hash__(self) -> int:
        """Return the hash of the number, which equals the width."""
        return hash(self.value)

    def __lt__(self, other: Any) -> bool:
        """Order by bits."""
        return self.bits < other.bits if isinstance(other, Width) else NotImplemented

    @property
    def bits(self) -> float:
        """Bits per weight that budgets count, without scales and offsets. Ternary: 26 bytes hold 128 codes."""
        return 1.625 if self is Width.TERNARY else float(self.value)

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 3 if self is Width.TERNARY else 1 << int(self.value)

    @property
    def max_code(self) -> int:
        """The highest code."""
        return self.levels - 1

    def group_bytes(self, group_size: int) -> int:
        """Return the bytes that the codes of one group take on disk and in memory."""
        if self is Width.TERNARY:
            return ceil_div(group_size, CODES_PER_TERNARY_BYTE)
        return group_size * int(self.value) // 8

    def group_size(self, group_bytes: int) -> int:
        """Return the group size whose codes take ``group_bytes`` bytes. Group sizes are powers of two."""
        if self is Width.TERNARY:
            return 1 << (group_bytes * CODES_PER_TERNARY_BYTE).bit_length() - 1
        return group_bytes * 8 // int(self.value)

    def matrix_bytes(self, rows: int, columns: int, group_size: int) -> int:
        """Return the bytes of one packed matrix: codes, and one byte each for the scale and the offset of a group."""
        return rows * (columns // group_size) * (self.group_bytes(group_size) + 2)


@functools.total_ordering
@dataclass(frozen=True, eq=False)
class TrellisWidth:
    """The width of a matrix's trellis codes: any multiple of 1/8 bit from 1 to 4.

    Like ``Width`` it equals its number, and ``TrellisWidth.read("2.5")`` is the width of that number.

    Attributes:
        eighths: The width in eighths of a bit.
    """

    eighths: int

    @classmethod
    def read(cls, number: object) -> TrellisWidth:
        """Return the width of a number, or of its text.

        Raises:
            UserError: There is no such width.
        """
        try:
            eighths = float(getattr(number, "value", number)) * 8  # type: ignore[arg-type]
        except (OverflowError, TypeError, ValueError):
            eighths = 0.0
        if not (MIN_EIGHTHS <= eighths <= MAX_EIGHTHS and eighths == int(eighths)):
            raise UserError(
                f"there is no trellis width {short_repr(number)}: choose a multiple of 0.125 from "
                f"{MIN_EIGHTHS // 8} to {MAX_EIGHTHS // 8}"
            )
        return cls(int(eighths))

    def __str__(self) -> str:
        """Return the number as it is written everywhere: ``1``, ``1.125``, ``2`` ..."""
        return f"{self.value:g}"

    def __eq__(self, other: object) -> bool:
        """Compare with a trellis width, or with its number. Affine widths are different widths."""
        if isinstance(other, Width):
            return False
        return bool(self.value == (other.value if isinstance(other, TrellisWidth) else other))

    def __hash__(self) -> int:
        """Return the hash of the number, which equals the width."""
        return hash(self.value)

    def __lt__(self, other: Any) -> bool:
        """Order by bits."""
        return self.eighths < other.eighths if isinstance(other, TrellisWidth) else NotImplemented

    @property
    def value(self) -> int | float:
        """The number, an integer where it is whole, as files have it."""
        return self.eighths / 8 if self.eighths % 8 else self.eighths // 8

    @property
    def bits(self) -> float:
        """Bits per weight that budgets count, without scales."""
        return self.eighths / 8

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile's codes: as many words of 32 bits as the width has eighths of a bit."""
        return 4 * self.eighths

    def matrix_bytes(self, rows: int, columns: int, group_size: int = 0) -> int:
        """Return the bytes of one matrix: codes, and one byte for the scale of a row. There are no groups."""
        return self.code_bytes(rows, columns) + rows

    def code_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes of the codes of one matrix."""
        return rows * columns * self.eighths // 64


ALL_TRELLIS_WIDTHS = tuple(TrellisWidth(eighths) for eighths in range(MIN_EIGHTHS, MAX_EIGHTHS + 1))
"""Every trellis width, in ascending order."""

AnyWidth = Width | TrellisWidth
"""A width of affine codes or of trellis codes."""


def affine_widths(widths: Iterable[AnyWidth]) -> tuple[Width, ...]:
    """Return the affine widths among ``widths``."""
    return tuple(width for width in widths if isinstance(width, Width))


def trellis_widths(widths: Iterable[AnyWidth]) -> tuple[TrellisWidth, ...]:
    """Return the trellis widths among ``widths``."""
    return tuple(width for width in widths if isinstance(width, TrellisWidth))


ExpertWidths = tuple[AnyWidth, AnyWidth]
"""Widths of an expert's two matrices: gate and up (or only up), and down."""


def plain_widths(by_layer: list[list[ExpertWidths]]) -> list[list[float | list[float]]]:
    """Return widths by layer and expert as files contain them: one number if both matrices have the same, else both."""
    plain: list[list[float | list[float]]] = []
    for layer in by_layer:
        plain.append([up.value if up == down else [up.value, down.value] for up, down in layer])
    return plain


def group_size_for(columns: int, recipe_group_size: int) -> int:
    """Return the group size of a matrix with ``columns`` inputs.

    This is the largest of the recipe's group size, its half, its quarter and so on that divides ``columns``, with a
    minimum of 16: 128 becomes 64, 32 or 16.

    Raises:
        UserError: Even 16 does not divide ``columns``.
    """
    group = recipe_group_size
    while group >= SMALLEST_GROUP:
        if columns % group == 0:
            return group
        group //= 2
    raise UserError(
        f"a matrix with {columns} input columns cannot be cut into groups of {SMALLEST_GROUP} or more: "
        "such a module cannot be quantized"
    )
