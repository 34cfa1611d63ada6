"""Types of the arguments of Triton functions. All of them are ``tl.tensor``; the names tell a reader what to pass."""

from __future__ import annotations

import triton.language as tl

Pointer = tl.tensor
"""Pointer to the first element of a tensor, or a tile of pointers."""

Scalar = tl.tensor
"""Number that is known at run time only."""

Tile = tl.tensor
"""Block of values in registers. The docstring has its shape."""

Tiles = tl.tuple
"""Tuple of tiles, whose number is known at compile time."""
