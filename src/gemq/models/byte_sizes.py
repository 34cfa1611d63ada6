"""Sizes in bytes of a model's parts, computed from shapes and widths alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gemq.models.structure import Experts, Matrix, Structure
from gemq.quant.rotation import block_side
from gemq.quant.widths import ROTATION_SIDE, AnyWidth, group_size_for
from gemq.recipe import Recipe
from gemq.runtime.compat import transformers_private


def matrix_sizes(matrix: Matrix, widths: Sequence[AnyWidth], group_size: int) -> list[int]:
    """Returns the stored bytes of one expert's matrix at each width, scales and offsets included."""
    group = group_size_for(matrix.columns, group_size)
    return [width.matrix_bytes(matrix.rows, matrix.columns, group) for width in widths]


def expert_bytes(experts: Experts, width: AnyWidth, group_size: int) -> int:
    """Returns the stored bytes of one expert at a width, scales and offsets included."""
    return sum(matrix_sizes(matrix, (width,), group_size)[0] for matrix in experts.matrices)


def linear_bytes(structure: Structure, recipe: Recipe) -> int:
    """Returns the stored bytes of the quantized dense linears; 0 if the recipe does not quantize them."""
    if recipe.dense_width is None:
        return 0
    total = 0
    for layer in structure.layers:
        for linear in layer.linears:
            group = group_size_for(linear.columns, recipe.group_size)
            total += recipe.dense_width.matrix_bytes(linear.rows, linear.columns, group)
    return total


def candidate_bytes(structure: Structure, recipe: Recipe) -> int:
    """Returns the bytes of all candidates in the work directory, quantized dense linears included."""
    total = linear_bytes(structure, recipe)
    for _, layer in structure.moe_layers:
        for width in recipe.candidate_widths:
            total += layer.experts.count * expert_bytes(layer.experts, width, recipe.group_size)
    return total


def count_smaller_groups(structure: Structure, recipe: Recipe) -> int:
    """Counts the matrices with affine codes whose columns the recipe's group size does not divide."""
    count = 0
    if recipe.dense_width is not None:
        for layer in structure.layers:
            count += sum(_has_smaller_groups(linear.columns, recipe) for linear in layer.linears)
    if recipe.codes == "trellis":
        return count
    for _, layer in structure.moe_layers:
        for matrix in layer.experts.matrices:
            if _has_smaller_groups(matrix.columns, recipe):
                count += layer.experts.count
    return count


def _has_smaller_groups(columns: int, recipe: Recipe) -> bool:
    """Whether a matrix with affine codes gets a smaller group size than the recipe's."""
    return group_size_for(columns, recipe.group_size) != recipe.group_size


def count_smaller_rotations(structure: Structure, recipe: Recipe) -> int:
    """Counts the matrices with trellis codes whose inputs are rotated in smaller blocks than usual."""
    if recipe.codes != "trellis":
        return 0
    count = 0
    for _, layer in structure.moe_layers:
        smaller = [matrix for matrix in layer.experts.matrices if block_side(matrix.columns) < ROTATION_SIDE]
        count += len(smaller) * layer.experts.count
    return count


def parameter_bytes(model: Any, stored_dtypes: Mapping[str, torch.dtype]) -> int:
    """Returns the bytes of a full-precision model's parameters in its files.

    Args:
        model: the model, which may be on the meta device
        stored_dtypes: stored types by parameter name
    """
    return sum(parameter.numel() * stored_dtypes[name].itemsize for name, parameter in model.named_parameters())


def quantized_share(structure: Structure, recipe: Recipe) -> float:
    """Returns the share of the model's parameters that the recipe quantizes."""
    quantized = structure.expert_weights
    if recipe.dense_width is not None:
        quantized += sum(linear.rows * linear.columns for layer in structure.layers for linear in layer.linears)
    return quantized / structure.total_parameters


def unquantized_bytes(model: Any, structure: Structure, recipe: Recipe, stored_dtypes: dict[str, torch.dtype]) -> int:
    """Returns the bytes of everything that stays unquantized. Tied weights count once.

    Args:
        model: the model, which may be on the meta device
        structure: of the model
        recipe: says which matrices are quantized
        stored_dtypes: stored types by parameter name
    """
    excluded = set(transformers_private.tied_weights(model))
    for layer in structure.layers:
        if recipe.dense_width is not None:
            excluded.update(f"{linear.path}.weight" for linear in layer.linears)
        if layer.experts is not None:
            excluded.update(f"{layer.experts.path}.{matrix.name}" for matrix in layer.experts.matrices)
    total = 0
    for name, tensor in model.state_dict().items():
        if name not in excluded:
            total += tensor.numel() * stored_dtypes.get(name, tensor.dtype).itemsize
    return total
