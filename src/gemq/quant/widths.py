"""The widths that exist, how many bytes they take and which group size a matrix gets.

A *width* is named by its nominal bits: 1, 1.6 (ternary: three levels), 2, 3, 4 or 8. Imports no torch, so that
recipes and ``--help`` stay fast. Knows nothing of tensors, models or files.
"""

from __future__ import annotations

from gemq.errors import UserError, shown

Width = float
ExpertWidths = tuple[Width, Width]
"""Of an expert's two matrices: gate and up (or up alone), and down."""

LEVELS: dict[Width, int] = {1: 2, 1.6: 3, 2: 4, 3: 8, 4: 16, 8: 256}
"""Number of code values of each width."""

SMALLEST_GROUP = 16


def width_name(width: Width) -> str:
    """``1``, ``1.6``, ``2`` ...: how a width is written everywhere."""
    return f"{width:g}"


def plain_widths(by_layer: list[list[ExpertWidths]]) -> list[list[Width | list[Width]]]:
    """Widths by layer and expert as they stand in files: one number where both matrices have the same, else both."""
    return [[first if first == down else [first, down] for first, down in layer] for layer in by_layer]


def parse_width(value: object) -> Width:
    """A width from user input (``2``, ``"1.6"``). Raises UserError for a width that does not exist."""
    try:
        width = float(value)  # type: ignore[arg-type]
    except (OverflowError, TypeError, ValueError):
        width = -1.0
    if width not in LEVELS:
        known = ", ".join(width_name(w) for w in LEVELS)
        raise UserError(f"there is no width {shown(value)}: choose from {known}")
    return int(width) if width == int(width) else width


def nominal_bits(width: Width) -> float:
    """Bits per weight as budgets count them: the width itself, ternary as 1.625 (26 bytes hold 128 codes)."""
    return 1.625 if width == 1.6 else float(width)


def bytes_per_group(width: Width, group_size: int) -> int:
    """Bytes that the codes of one group take on disk and in memory."""
    if width == 1.6:
        return -(-group_size // 5)
    return group_size * int(width) // 8


def matrix_bytes(rows: int, columns: int, width: Width, group_size: int) -> int:
    """Bytes of one packed matrix: codes, and one byte each for a group's scale and offset."""
    return rows * (columns // group_size) * (bytes_per_group(width, group_size) + 2)


def group_size_for(columns: int, wanted: int) -> int:
    """Group size that a matrix with ``columns`` inputs gets when ``wanted`` is asked for.

    The largest power-of-two fraction of ``wanted``, from 16 up, that divides ``columns``: 128 becomes 64, 32 or 16.
    Raises UserError when even 16 does not divide it.
    """
    group = wanted
    while group >= SMALLEST_GROUP:
        if columns % group == 0:
            return group
        group //= 2
    raise UserError(
        f"a matrix with {columns} input columns cannot be cut into groups of {SMALLEST_GROUP} or more: "
        "such a module cannot be quantized"
    )
