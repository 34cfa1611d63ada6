"""The scheme of a layer's quantization: the widths and the group size that give packed tensors their meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gemq.models.structure import Layer, Linear
from gemq.quant.widths import ExpertWidths, Width, group_size_for

UNQUANTIZED_BITS = 16
"""``dense_bits`` from which on dense linears stay in the model's own type."""


@dataclass(frozen=True)
class QuantizationScheme:
    """How one layer is quantized.

    Attributes:
        expert_widths: Widths of the two matrices of every expert; empty for a dense layer.
        dense_bits: Width of the dense linears. 16 leaves them unquantized.
        group_size: Group size of the recipe. ``group`` returns that of a matrix.
    """

    expert_widths: Sequence[ExpertWidths]
    dense_bits: int
    group_size: int

    def group(self, columns: int) -> int:
        """Return the group size of a matrix with ``columns`` inputs."""
        return group_size_for(columns, self.group_size)

    def linears(self, layer: Layer) -> tuple[Linear, ...]:
        """Return the dense linears of ``layer`` that are quantized."""
        return quantized_linears(layer, self.dense_bits)

    def matrix_widths(self, layer: Layer) -> dict[str, tuple[Width, ...]]:
        """Return the width of every expert of ``layer`` by the name of the matrix."""
        return matrix_widths(layer, self.expert_widths)


def quantized_linears(layer: Layer, dense_bits: int) -> tuple[Linear, ...]:
    """Return the dense linears of ``layer`` that are quantized: all of them, or none at 16 bits."""
    return layer.linears if dense_bits < UNQUANTIZED_BITS else ()


def matrix_widths(layer: Layer, expert_widths: Sequence[ExpertWidths]) -> dict[str, tuple[Width, ...]]:
    """Return the width of every expert by the name of the matrix; empty for a dense layer."""
    if layer.experts is None:
        return {}
    widths_by_name = {}
    for position, matrix in enumerate(layer.experts.matrices):
        widths_by_name[matrix.name] = tuple(widths[position] for widths in expert_widths)
    return widths_by_name
