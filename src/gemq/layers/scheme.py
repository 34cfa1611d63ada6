"""The scheme of a layer's quantization: the widths that give packed tensors their meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gemq.models.structure import Layer, Linear
from gemq.quant.widths import AnyWidth, ExpertWidths, Width


@dataclass(frozen=True)
class QuantizationScheme:
    """How one layer is quantized.

    Attributes:
        expert_widths: Widths of the two matrices of every expert; empty for a dense layer.
        dense_width: Width of the dense linears. None leaves them unquantized.
    """

    expert_widths: Sequence[ExpertWidths]
    dense_width: Width | None

    def linears(self, layer: Layer) -> tuple[Linear, ...]:
        """Return the dense linears of ``layer`` that are quantized."""
        return quantized_linears(layer, self.dense_width)

    def linear_widths(self, layer: Layer) -> list[tuple[Linear, Width]]:
        """Return the dense linears of ``layer`` that are quantized, each with its width."""
        return [] if self.dense_width is None else [(linear, self.dense_width) for linear in layer.linears]

    def matrix_widths(self, layer: Layer) -> dict[str, tuple[AnyWidth, ...]]:
        """Return the width of every expert of ``layer`` by the name of the matrix."""
        return matrix_widths(layer, self.expert_widths)


def quantized_linears(layer: Layer, dense_width: Width | None) -> tuple[Linear, ...]:
    """Return the dense linears of ``layer`` that are quantized: all of them, or none without a width."""
    return () if dense_width is None else layer.linears


def matrix_widths(layer: Layer, expert_widths: Sequence[ExpertWidths]) -> dict[str, tuple[AnyWidth, ...]]:
    """Return the width of every expert by the name of the matrix; empty for a dense layer."""
    if layer.experts is None:
        return {}
    widths_by_name = {}
    for position, matrix in enumerate(layer.experts.matrices):
        widths_by_name[matrix.name] = tuple(widths[position] for widths in expert_widths)
    return widths_by_name
