"""How much memory a stage computes with, from shapes alone: beside layers, and beside activations that wait.

Knows structures and recipes, no weights and no machine.
"""

from __future__ import annotations

from typing import Any

import torch

from gemq.errors import UserError
from gemq.ladder import CHUNK_BYTES
from gemq.memory import Memory, gigabytes
from gemq.models.structure import Layer, Structure
from gemq.recipe import Recipe
from gemq.rungs import expert_chunks

MOST_CHOSEN = 8
"""Experts that a token chooses where a configuration does not tell: at most so many in nearly all families."""

TRAINED_BYTES = {torch.bfloat16: 11, torch.float32: 28}
"""Bytes a weight while it is trained, by compute type: code, latent, moments, weight in use, gradients."""


def working_bytes(structure: Structure, recipe: Recipe, config: Any, dtype: torch.dtype, device: torch.device) -> int:
    """Most bytes that any stage has on the device for one layer's or one micro-batch's arithmetic.

    config: the model's
    """
    text = config.get_text_config()
    logits = recipe.batch_tokens * text.vocab_size * 4 * 4  # themselves, exponentials, a reference's, a gradient
    chosen = experts_per_token(text)
    return max(logits, *(_layer_bytes(layer, recipe, chosen, dtype, device) for layer in structure.layers))


def experts_per_token(text: Any) -> int:
    """Experts that a token chooses, from a text model's configuration: families name it differently."""
    names = (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_top_k",
        "moe_k",
        "top_k_experts",
        "experts_per_token",
    )
    return next((value for n in names if isinstance(value := getattr(text, n, None), int)), MOST_CHOSEN)


def _layer_bytes(layer: Layer, recipe: Recipe, chosen: int, dtype: torch.dtype, device: torch.device) -> int:
    widths = len(recipe.ladder_widths)
    columns = {x.columns for x in layer.linears}
    moments = 4 * sum(c * c for c in columns)
    quantizing = max((4 * c * 4 * c + 8 * c * x.rows for x in layer.linears for c in (x.columns,)), default=0)
    if layer.experts is None:
        return moments + quantizing
    first, down = layer.experts.matrices
    # a micro-batch's routed pairs on their way through the experts, in float32 where outputs are compared
    pairs = recipe.batch_tokens * chosen * (4 * first.columns + 3 * down.columns) * 4
    count, weights = layer.experts.count, layer.experts.count * layer.experts.weights_per_expert
    moments += 4 * count * sum(m.columns**2 for m in layer.experts.matrices)
    each = max(4 * m.columns * (4 * m.columns + widths * m.rows) for m in layer.experts.matrices)
    quantizing = max(quantizing, each, min(CHUNK_BYTES, count * each))
    codes = widths * weights
    scoring = widths * weights * dtype.itemsize
    training, trained = 0, TRAINED_BYTES.get(dtype, TRAINED_BYTES[torch.float32])
    if recipe.ladder_epochs:
        together = max(x.stop - x.start for x in expert_chunks(layer.experts, widths, device))
        training = together * layer.experts.weights_per_expert * widths * trained + codes
    if recipe.layer_epochs:
        training = max(training, weights * trained)
    return max(moments + quantizing + codes, moments + pairs, scoring + pairs, training + pairs)


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


def staging_bytes(model: Any, structure: Structure) -> int:
    """Host memory for reading one layer: as it is read, as it is fused, and pinned."""
    state = model.state_dict()
    sizes = [
        sum(t.numel() * t.element_size() for n, t in state.items() if n.startswith(f"{layer.path}."))
        for layer in structure.layers
    ]
    return 3 * max(sizes)


def check_bounds(memory: Memory, model: Any, structure: Structure, recipe: Recipe, dtype: torch.dtype) -> None:
    """Raises UserError, saying what would do, when the least that a job must have on its device is above its bound.

    model: may be on the meta device
    """
    if memory.device.type == "cuda" and (staging := staging_bytes(model, structure)) > memory.host.limit:
        raise UserError(
            f"--host-memory {gigabytes(memory.host.limit)} do not hold the layer that is on its way to the GPU: give "
            f"at least --host-memory {gigabytes(staging)}"
        )
    held = held_bytes(model, structure, dtype)
    working = working_bytes(structure, recipe, model.config, dtype, memory.device)
    if held + working > memory.on_device.limit:
        raise UserError(
            f"{memory.flag} {gigabytes(memory.on_device.limit)} do not hold the model's embeddings and two of its "
            f"layers ({gigabytes(held)}) and what one layer takes to compute ({gigabytes(working)}): "
            f"give at least {memory.flag} {gigabytes(held + working)}"
        )
