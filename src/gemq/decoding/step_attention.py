"""Attention of a decode step by gemq's kernel, and of prompts, registered with the interface of Transformers.

``sdpa`` of Transformers reads the whole static cache under a mask, and copies keys and values where heads share them.
The kernel reads only the visible positions. The model receives their range in place of a mask, and Transformers passes
it on to the attention of each layer as it would a mask.

Prompts take ``sdpa`` without a mask, whose causal kernels take half the time. Transformers makes masks for its own
implementations only, some of its releases even for causal attention if it is captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gemq.kernels import dispatch
from gemq.runtime.compat import transformers_private

NAME = "gemq_decode"
"""Name of the attention implementation in Transformers."""


def usable(model: Any, config: Any) -> bool:
    """Whether the model's attention is ``sdpa`` and the kernel runs on its device."""
    attention = transformers_private.attention_implementation(config)
    if attention != "sdpa" or dispatch.mode == "reference" or find_spec("triton") is None:
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
    kernel: Callable[..., Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one query token, with the signature of ``sdpa_attention_forward`` in Transformers.

    H attention heads share N key-value heads of size D, in a cache of L positions.

    Args:
        module: the attention module, not used
        query: [B, H, 1, D]
        key: [B, N, L, D]
        value: [B, N, L, D]
        attention_mask: first visible position and end of the visible positions, int32 [1, 1, 1, 2]
        dropout: not used, since a decode step is inference
        scaling: of the logits; None: 1 / sqrt(D)
        position_bias: must be None
        softcap: must be None
        kernel: called in place of ``decode_attention`` of gemq's kernels

    Returns:
        The output [B, 1, H, D], and None in place of attention weights.

    Raises:
        RuntimeError: the kernel does not support this attention.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32 or tuple(attention_mask.shape) != (1, 1, 1, 2):
        raise RuntimeError("its layers change the attention mask")
    if query.shape[2] != 1 or value.shape != key.shape or position_bias is not None or softcap is not None:
        raise RuntimeError("its attention is not of one query over keys and values of one size")
    from gemq.kernels.decode.attention import decode_attention

    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = decode_attention if kernel is None else kernel
    output = kernel(query[:, :, 0], key, value, bounds=attention_mask.view(2), scaling=scaling)
    return output[:, None], None


def attend_causally(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """Attention of prompts over themselves by ``sdpa_attention_forward`` in Transformers, with its signature."""
    from transformers import AttentionInterface

    return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)


def sees_all_before(windows: Mapping[str, int | None], tokens: int) -> bool:
    """Whether each of a prompt's ``tokens`` attends to all before it. ``windows``: see ``attention_windows``."""
    return all(window is None or tokens <= window for window in windows.values())


@contextmanager
def use_attention(config: Any, function: Callable[..., Any] = attend) -> Iterator[None]:
    """Selects ``attend`` or another ``function`` for the model with this ``config`` while the context is active.

    The model makes no masks then.
    """
    # Imported here, so that a change of this interface only disables the kernel.
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, function)
    try:
        with transformers_private.select_attention(config, NAME):
            yield
    finally:
        AttentionInterface.register(NAME, attend)  # a bound method would keep its model in memory
