"""Division of integers that rounds up. Must not import torch."""

from __future__ import annotations


def ceil_div(count: int, size: int) -> int:
    """Return how many parts of ``size`` hold ``count``."""
    return -(-count // size)


def round_up(count: int, multiple: int) -> int:
    """Return the smallest multiple that is not less than ``count``."""
    return ceil_div(count, multiple) * multiple
