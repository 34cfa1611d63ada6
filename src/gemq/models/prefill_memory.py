"""Bytes of temporary tensors while a packed model reads prompts on a GPU, from shapes alone.

Formulas have: n tokens that are read at once, H hidden size, I intermediate size of an expert, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch

from gemq.models.config_values import experts_per_token
from gemq.models.structure import Layer, Structure

MAX_PREFILL_TOKENS = 8192
"""Tokens of prompts that are counted as read at once."""

STREAMS = 4
"""Tensors [n, H] alive while experts compute: embeddings, the residual, its norm and their input."""

ROTATED, GATED = 3, 3
"""Copies of queries, keys and values while rotary factors are applied; and of a dense layer's intermediate state."""


def prefill_bytes(
    structure: Structure,
    config: Any,
    dtype: torch.dtype,
    tokens: int,
    batch: int,
    *,
    has_trellis: bool,
    gpus: int = 1,
) -> int:
    """Bytes of temporary tensors on each GPU: of the widest layer, or of the logits.

    Args:
        structure: of the model.
        config: of the language model.
        dtype: of activations.
        tokens: of all prompts. At most ``MAX_PREFILL_TOKENS`` count.
        batch: sequences, each of which gets logits of its last token.
        has_trellis: whether the experts have trellis codes.
        gpus: number of GPUs that share the model.
    """
    tokens = min(tokens, MAX_PREFILL_TOKENS)
    hidden = int(config.hidden_size)
    copies = 2 if has_trellis else 1  # trellis codes multiply a rotated copy
    largest = 0
    for layer in structure.layers:
        numbers = _dense_numbers(layer, tokens, hidden, gpus)
        if layer.experts is not None:
            pairs = tokens * experts_per_token(config)
            intermediate = layer.experts.matrices[1].columns // gpus
            numbers = max(numbers, pairs * (copies * intermediate + hidden))  # the outputs of both matrices
        largest = max(largest, tokens * STREAMS * hidden + numbers)
    logit_bytes = batch * int(config.vocab_size) * (dtype.itemsize + 2 * 4)
    return max(largest * dtype.itemsize, logit_bytes)


def _dense_numbers(layer: Layer, tokens: int, hidden: int, gpus: int) -> int:
    """Numbers in the temporary tensors of attention, or of a dense layer, and in the largest unpacked linear."""
    attention = sum(linear.rows for linear in layer.linears if linear.kind == "attention") // gpus
    widest = max((linear.rows for linear in layer.linears if linear.kind != "attention"), default=0) // gpus
    largest_linear = max((linear.rows * linear.columns for linear in layer.linears), default=0) // gpus
    return tokens * max(ROTATED * attention, GATED * widest + hidden) + largest_linear
