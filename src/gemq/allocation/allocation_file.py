"""Reads the widths in an allocation file, which a job or a user wrote.

Shapes: N rows of the problem.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gemq.allocation.knapsack import Ints
from gemq.errors import UserError, short_repr

if TYPE_CHECKING:
    from gemq.allocation.problem import Problem

TWO_WIDTHS_HINT = ", or give two in brackets: that of gate and up, that of down"


def read_choice(layers: list[Any], problem: Problem, origin: str) -> Ints:
    """The choice of a user's file.

    Args:
        layers: for each layer a list of widths, one for each expert or a list of two.
        problem: that the widths are for.
        origin: name of the file, for messages.

    Returns:
        int64 [N], indices into the widths of the problem.

    Raises:
        UserError: it does not fit the problem. The message names the layer.
    """
    if len(layers) != problem.layers:
        count = f"{len(layers)} layers, the model {problem.layers}"
        raise UserError(f"{origin} has {count}: give each a list, [] for a dense one")
    choice: list[int] = []
    for index, (values, rows) in enumerate(zip(layers, problem.by_layer, strict=True)):
        experts = (rows.stop - rows.start) // problem.units_per_expert
        if not isinstance(values, list) or len(values) != experts:
            actual = f"{len(values)} widths" if isinstance(values, list) else short_repr(values)
            raise UserError(f"{origin}: layer {index} has {experts} experts, not {actual}: give one for each")
        for expert, value in enumerate(values):
            try:
                choice += _read_expert(value, problem)
            except ValueError as error:  # not a width (UserError), or not one of the candidates
                raise UserError(
                    f"{origin}: layer {index}, expert {expert} cannot have width {short_repr(value)}: "
                    f"choose from {problem.width_names}{TWO_WIDTHS_HINT if problem.units_per_expert > 1 else ''}"
                ) from error
    return np.array(choice, np.int64)


def _read_expert(value: Any, problem: Problem) -> list[int]:
    """The choice of one expert's rows from a width or a list of widths. Raises ValueError."""
    widths = value if isinstance(value, list) else [value] * problem.units_per_expert
    if len(widths) != problem.units_per_expert:
        raise ValueError
    read = problem.widths[0].read
    return [problem.widths.index(read(width)) for width in widths]
