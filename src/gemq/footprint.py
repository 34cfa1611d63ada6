"""How much memory a stage computes with, from shapes alone: beside layers, and beside activations that wait.

Knows structures and recipes, no weights and no machine.
"""

from __future__ import annotations

from typing import Any

import torch

from gemq.errors import UserError
from gemq.memory import Memory, gigabytes
from gemq.models.structure import Layer, Structure
from gemq.recipe import Recipe

CHUNK_BYTES = 4 << 30
"""Most that quantizing takes for the experts that are quantized together."""

TRAINED_BYTES = 24
"""Bytes a weight while it is trained: latent, gradient, two moments, the weight in use and its gradient."""


def working_bytes(structure: Structure, recipe: Recipe, vocabulary: int, dtype: torch.dtype) -> int:
    """Most bytes that any stage has on the device for one layer's or one micro-batch's arithmetic."""
    logits = recipe.batch_tokens * vocabulary * 4 * 4  # as they are, their exponentials, a reference's, a gradient
    return max(logits, *(_layer_bytes(layer, recipe, dtype) for layer in structure.layers))


def _layer_bytes(layer: Layer, recipe: Recipe, dtype: torch.dtype) -> int:
    widths = len(recipe.ladder_widths)
    columns = {x.columns for x in layer.linears}
    moments = 4 * sum(c * c for c in columns)
    quantizing = max((4 * c * 4 * c + 8 * c * x.rows for x in layer.linears for c in (x.columns,)), default=0)
    if layer.experts is None:
        return moments + quantizing
    count, weights = layer.experts.count, layer.experts.count * layer.experts.weights_per_expert
    moments += 4 * count * sum(m.columns**2 for m in layer.experts.matrices)
    each = max(4 * m.columns * (4 * m.columns + widths * m.rows) for m in layer.experts.matrices)
    quantizing = max(quantizing, min(CHUNK_BYTES, count * each))
    codes = widths * weights
    scoring = widths * weights * dtype.itemsize
    training = 0
    if recipe.ladder_epochs:
        training = widths * weights * TRAINED_BYTES
    if recipe.layer_epochs:
        training = max(training, weights * TRAINED_BYTES)
    return max(moments + quantizing + codes, scoring, training)


def held_bytes(model: Any, structure: Structure, dtype: torch.dtype) -> int:
    """What a job holds on the device all the time: two layers, and embeddings, norms and head."""
    layers = [0] * len(structure.layers)
    outside = 0
    prefixes = [f"{layer.path}." for layer in structure.layers]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        cast = isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point()
        count = tensor.numel() * (dtype if cast else tensor.dtype).itemsize
        index = next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), None)
        if index is None:
            outside += count
        else:
            layers[index] += count
    return outside + sum(sorted(layers)[-2:])


def check_bounds(memory: Memory, model: Any, structure: Structure, recipe: Recipe, dtype: torch.dtype) -> None:
    """Raises UserError, saying what would do, when the least that a job must have on its device is above its bound.

    model: may be on the meta device
    """
    held = held_bytes(model, structure, dtype)
    working = working_bytes(structure, recipe, model.config.get_text_config().vocab_size, dtype)
    if held + working > memory.on_device.limit:
        raise UserError(
            f"{memory.flag} {gigabytes(memory.on_device.limit)} do not hold the model's embeddings and two of its "
            f"layers ({gigabytes(held)}) and what one layer takes to compute ({gigabytes(working)}): "
            f"give at least {memory.flag} {gigabytes(held + working)}"
        )
