"""Attention of a decode step by our own kernel, behind Transformers' attention interface.

Transformers' ``sdpa`` goes through the whole of a static cache under a mask, and copies keys and values where heads
share them. The kernel reads what is there. In place of a mask the model is handed the places that a token sees, which
Transformers passes on to each layer's attention as it would a mask. Knows the interface, no family.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gemq.kernels import dispatch

NAME = "gemq_decode"


def usable(model: Any, config: Any) -> bool:
    """Whether ``model`` attends as ``sdpa`` does, where the kernel runs."""
    if config._attn_implementation != "sdpa" or dispatch.mode == "reference" or find_spec("triton") is None:
        return False
    return model.device.type == "cuda" or dispatch.mode == "triton"


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [B, H, 1, D], key and value [B, N, L, D] -> [B, 1, H, D], as Transformers' ``sdpa_attention_forward``.

    attention_mask: the places that are seen, int32 [1, 1, 1, 2]: the first and the one behind the last
    Raises RuntimeError for attention that the kernel does not compute.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32 or tuple(attention_mask.shape) != (1, 1, 1, 2):
        raise RuntimeError("its layers change the attention mask")
    if query.shape[2] != 1 or value.shape != key.shape or position_bias is not None or softcap is not None:
        raise RuntimeError("its attention is not of one query over keys and values of one size")
    from gemq.kernels.decode.attention import decode_attention

    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return decode_attention(query[:, :, 0], key, value, attention_mask.view(2), scaling)[:, None], None


@contextmanager
def attending(config: Any) -> Iterator[None]:
    """While open, layers of the model with this ``config`` attend through ``attend``."""
    from transformers import AttentionInterface  # only here: what a release changes about it ends in a fallback

    AttentionInterface.register(NAME, attend)
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
