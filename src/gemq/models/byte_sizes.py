"""How many bytes things take, from shapes alone. Knows structures and widths, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gemq.models.structure import Experts, Matrix, Structure
from gemq.quant.widths import Width, group_size_for, matrix_bytes
from gemq.recipe import Recipe


def matrix_sizes(matrix: Matrix, widths: Sequence[Width], group_size: int) -> list[int]:
    """Stored bytes of one of an expert's matrices at each width, scales and offsets included."""
    group = group_size_for(matrix.columns, group_size)
    return [matrix_bytes(matrix.rows, matrix.columns, width, group) for width in widths]


def expert_bytes(experts: Experts, width: Width, group_size: int) -> int:
    """Stored bytes of one expert at a width, scales and offsets included."""
    return sum(matrix_sizes(m, (width,), group_size)[0] for m in experts.matrices)


def linear_bytes(structure: Structure, recipe: Recipe) -> int:
    """Stored bytes of the quantized dense linears; 0 when the recipe leaves them alone."""
    if recipe.attention_bits == 16:
        return 0
    return sum(
        matrix_bytes(x.rows, x.columns, recipe.attention_bits, group_size_for(x.columns, recipe.group_size))
        for layer in structure.layers
        for x in layer.linears
    )


def ladder_bytes(structure: Structure, recipe: Recipe) -> int:
    """Bytes that the ladder takes in the work directory."""
    rungs = sum(
        layer.experts.count * expert_bytes(layer.experts, width, recipe.group_size)
        for _, layer in structure.moe_layers
        if layer.experts
        for width in recipe.ladder_widths
    )
    return rungs + linear_bytes(structure, recipe)


def smaller_groups(structure: Structure, group_size: int) -> int:
    """Matrices whose inputs the wanted group size does not divide, so that they get a smaller one."""
    columns = [x.columns for layer in structure.layers for x in layer.linears]
    for _, layer in structure.moe_layers:
        assert layer.experts is not None
        columns += [m.columns for m in layer.experts.matrices for _ in range(layer.experts.count)]
    return sum(group_size_for(c, group_size) != group_size for c in columns)


def quantized_share(structure: Structure, recipe: Recipe) -> float:
    """Share of the model's parameters that the recipe quantizes."""
    linears = sum(x.rows * x.columns for layer in structure.layers for x in layer.linears)
    quantized = structure.expert_weights + (linears if recipe.attention_bits < 16 else 0)
    return quantized / structure.total_parameters


def other_bytes(model: Any, structure: Structure, recipe: Recipe, stored: dict[str, torch.dtype]) -> int:
    """Bytes of what stays unquantized, at the types ``stored`` by parameter name. Tied weights count once."""
    left_out = set(model.all_tied_weights_keys)
    for layer in structure.layers:
        if recipe.attention_bits < 16:
            left_out |= {f"{x.path}.weight" for x in layer.linears}
        if layer.experts is not None:
            left_out |= {f"{layer.experts.path}.{m.name}" for m in layer.experts.matrices}
    return sum(
        tensor.numel() * stored.get(name, tensor.dtype).itemsize
        for name, tensor in model.state_dict().items()
        if name not in left_out
    )
