"""Compares gemq's arithmetic of routed experts with that of a model's own code, before a job relies on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gemq.errors import UserError
from gemq.models.experts import ExpertsCall, experts_forward, record_experts_calls
from gemq.runtime.compat import transformers_private

MAX_ARITHMETIC_ERROR = 2e-2
"""Allowed relative difference from the module's own class. Other orders of sums, and bfloat16, stay below 4e-3."""


@contextmanager
def _class_forward(module: Any) -> Iterator[None]:
    """Makes an experts module run the forward of its class, whichever implementation is selected."""
    config = getattr(module, "config", None)
    # without a config the family offers no choice of implementations
    with nullcontext() if config is None else transformers_private.select_experts(config, "eager"):
        yield


def check_arithmetic(model: Any, paths: Sequence[str], ids: Tensor) -> None:
    """Compares ``experts_forward`` with the computation of the model's own class, on inputs of one forward pass.

    A clamp or a gate that ``models.experts`` does not implement shows up here.

    Args:
        model: the model
        paths: of its experts modules
        ids: token ids [B, S] int64, on the model's device

    Raises:
        UserError: they differ
    """
    modules = [model.get_submodule(path) for path in paths]
    with ExitStack() as stack:
        recordings = [stack.enter_context(record_experts_calls(module)) for module in modules]
        model(input_ids=ids, use_cache=False)
    for path, module, calls in zip(paths, modules, recordings, strict=True):
        for call in calls:
            difference = _arithmetic_error(module, call)
            if not difference < MAX_ARITHMETIC_ERROR:
                raise UserError(
                    f"cannot quantize {path} ({type(module).__name__}): it computes something else than gemq "
                    f"understands (relative difference {difference:.2g}); this family is not supported yet"
                )


@torch.no_grad()
def _arithmetic_error(module: Any, call: ExpertsCall) -> float:
    """Returns the relative difference between ``experts_forward`` and the module's own class for a call."""
    output = experts_forward(module, call.hidden, call.top_k_index, call.top_k_weights).float()
    with _class_forward(module):
        if getattr(module, "batched_rows", False):
            expected = module(call.hidden)
        else:
            expected = module(call.hidden, call.top_k_index, call.top_k_weights)
    expected = expected.reshape(output.shape).float()
    return float((output - expected).norm() / expected.norm().clamp_min(1e-12))
