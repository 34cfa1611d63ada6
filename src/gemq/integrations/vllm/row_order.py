"""The order of the rows of q and k, which vLLM's loader changes for families with another rotary embedding."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.model_loader.utils import get_model_cls

from gemq.errors import UserError

_METHOD = "permute_qk_weight_for_rotary"
"""Method of vLLM's model classes that reorders a weight: (self, name, weight) -> (name, weight)."""


def row_order(name: str, total_rows: int, start: int, stop: int) -> Tensor | None:
    """Return the order of the rows ``start`` to ``stop`` of a linear in vLLM, relative to ``start``.

    vLLM's function is applied to the numbers of the rows, since it would reorder the rows of a weight alike.

    Args:
        name: path of the linear in the checkpoint
        total_rows: rows of the whole matrix
        start: first row of the rank
        stop: end of the rank's rows

    Returns:
        [stop - start] int64, or None if vLLM keeps the order of the family.

    Raises:
        UserError: rows of different ranks are exchanged.
    """
    model_config = get_current_vllm_config().model_config
    reorder = _reordering(get_model_cls(model_config))
    if reorder is None:
        return None
    numbers = torch.arange(total_rows)[:, None]
    _, reordered = reorder(SimpleNamespace(config=model_config.hf_text_config), f"{name}.weight", numbers)
    order: Tensor = reordered[start:stop, 0] - start
    if not torch.equal(order.sort().values, torch.arange(stop - start)):
        raise UserError(f"vLLM exchanges rows of {name} between ranks: use --tensor-parallel-size 1")
    return order


@cache
def _reordering(model_class: type) -> Callable[..., Any] | None:
    """Return vLLM's function for a model class, or for a class that its module builds (the language model of it)."""
    candidates = (model_class, *vars(sys.modules[model_class.__module__]).values())
    return next((getattr(cls, _METHOD) for cls in candidates if isinstance(cls, type) and hasattr(cls, _METHOD)), None)
