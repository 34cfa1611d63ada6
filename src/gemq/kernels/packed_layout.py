"""Sizes of packed codes, for Triton kernels. The layout is that of ``docs/checkpoint-format.md``."""

from __future__ import annotations

import triton


@triton.constexpr_function
def code_bits(levels: int):
    """Return the bits that hold a code."""
    return (levels - 1).bit_length()


@triton.constexpr_function
def group_bytes(levels: int, group_size: int):
    """Return the bytes of one group's codes. Five ternary codes share a byte."""
    return (group_size + 4) // 5 if levels == 3 else group_size * (levels - 1).bit_length() // 8
