"""The widths that exist, their bytes, and the group size of a matrix.

A *width* is named by its nominal bits: 1, 1.6 (ternary: three levels), 2, 3, 4 or 8. Must not import torch, so that
recipes and ``--help`` stay fast.
"""

from __future__ import annotations

from gemq.errors import UserError, short_repr

Width = float
ExpertWidths = tuple[Width, Width]
"""Widths of an expert's two matrices: gate and up (or only up), and down."""

LEVELS: dict[Width, int] = {1: 2, 1.6: 3, 2: 4, 3: 8, 4: 16, 8: 256}
"""Number of codes of each width."""

SMALLEST_GROUP = 16
"""Smallest group size."""


def width_name(width: Width) -> str:
    """Return a width as it is written everywhere: ``1``, ``1.6``, ``2`` ..."""
    return f"{width:g}"


def plain_widths(by_layer: list[list[ExpertWidths]]) -> list[list[Width | list[Width]]]:
    """Return widths by layer and expert as files contain them: one number if both matrices have the same, else both."""
    plain: list[list[Width | list[Width]]] = []
    for layer in by_layer:
        plain.append([gate_up if gate_up == down else [gate_up, down] for gate_up, down in layer])
    return plain


def parse_width(value: object) -> Width:
    """Read a width from user input such as ``2`` or ``"1.6"``.

    Raises:
        UserError: There is no such width.
    """
    try:
        width = float(value)  # type: ignore[arg-type]
    except (OverflowError, TypeError, ValueError):
        width = -1.0
    if width not in LEVELS:
        known_widths = ", ".join(width_name(w) for w in LEVELS)
        raise UserError(f"there is no width {short_repr(value)}: choose from {known_widths}")
    return int(width) if width == int(width) else width


def nominal_bits(width: Width) -> float:
    """Return the bits per weight that budgets count: the width, or 1.625 for ternary (26 bytes hold 128 codes)."""
    return 1.625 if width == 1.6 else float(width)


def bytes_per_group(width: Width, group_size: int) -> int:
    """Return the bytes that the codes of one group take on disk and in memory."""
    if width == 1.6:
        return -(-group_size // 5)
    return group_size * int(width) // 8


def matrix_bytes(rows: int, columns: int, width: Width, group_size: int) -> int:
    """Return the bytes of one packed matrix: codes, and one byte each for the scale and the offset of a group."""
    return rows * (columns // group_size) * (bytes_per_group(width, group_size) + 2)


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
