"""Runs a causal LM layer by layer by replaying the calls that the model itself makes to its decoder layers.

Masks, positions and whatever else a family passes to a layer are captured once and passed again, never rebuilt by
hand. The tail (final norm, head, logit scaling) runs through the model's own forward as well, with layers replaced
for the moment. Knows nothing of quantization.

Shapes: B windows, S tokens in a window, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemq.errors import UserError
from gemq.models.structure import Structure


@dataclass(frozen=True)
class Call:
    """What a model passes to one decoder layer beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _AllCaptured(Exception):
    """Ends a forward pass once the last layer's call is known."""


class Replay:
    """A causal LM cut at its decoder layers.

    ``inputs`` gives the first layer's hidden states and every layer's call, ``run`` runs one layer, ``logits`` runs
    what follows the last layer. Raises UserError from the constructor when the model does more between its layers
    than passing hidden states on.
    """

    def __init__(self, model: Any, structure: Structure):
        self.model: Any = model.eval().requires_grad_(False)
        self.structure = structure
        self.layers = list(model.get_submodule(structure.layers_path).children())
        self._tuple_outputs = False
        self._shared: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        if getattr(model.config, "output_router_logits", False):
            model.config.output_router_logits = False  # the auxiliary loss has no meaning in a replay
        probe = torch.zeros(1, 4, dtype=torch.long, device=self.device)
        try:
            self.inputs(probe)
        except _NotPassedOn:
            self._tuple_outputs = True
            try:
                self.inputs(probe)
            except _NotPassedOn as error:
                raise UserError(
                    f"{type(model).__name__} does more between its decoder layers than passing hidden states on "
                    f"(before layer {error.args[0]}): gemq cannot replay it; this family is not supported yet"
                ) from None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def inputs(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """Token ids [B, S] int64 -> (hidden states [B, S, H] before the first layer, one call per layer)."""
        calls: list[Call] = []
        first: list[Tensor] = []

        def record(hidden: Tensor, call: Call) -> Tensor:
            if first and hidden is not first[0]:
                raise _NotPassedOn(len(calls))
            first.append(hidden)
            calls.append(Call(self._share(call.args), self._share(call.kwargs)))
            if len(calls) == len(self.layers):
                raise _AllCaptured
            return hidden

        with self._patched(record):
            try:
                self.model(input_ids=ids.to(self.device), use_cache=False)
            except _AllCaptured:
                return first[0], calls
        raise UserError(
            f"{type(self.model).__name__} has {len(self.layers)} decoder layers and calls {len(calls)} of them: "
            "gemq cannot replay it; this family is not supported yet"
        )

    def run(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        """Hidden states [B, S, H] after layer ``index``. Differentiable."""
        out = self.layers[index](hidden, *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits [B, S, V] from the last layer's hidden states [B, S, H], by the model's own tail. Differentiable."""
        seen = 0

        def substitute(before: Tensor, call: Call) -> Tensor:
            nonlocal seen
            seen += 1
            return hidden if seen == len(self.layers) else before

        with self._patched(substitute):
            return self.model(input_ids=ids.to(self.device), use_cache=False).logits

    @torch.no_grad()
    def verify(self, ids: Tensor) -> None:
        """Compares a replay of token ids [B, S] with the model's own forward. Raises UserError when they differ."""
        hidden, calls = self.inputs(ids)
        for index, call in enumerate(calls):
            hidden = self.run(index, hidden, call)
        replayed = self.logits(ids, hidden).float()
        expected = self.model(input_ids=ids.to(self.device), use_cache=False).logits.float()
        # the same operations in the same order: equal but for kernels chosen by memory alignment
        error = (replayed - expected).norm() / expected.norm().clamp_min(1e-12)
        if not error < 1e-2:
            raise UserError(
                f"replaying {type(self.model).__name__} layer by layer gives other logits than its own forward "
                f"(relative difference {error:.2g}): its layers share state; this family is not supported yet"
            )

    @contextmanager
    def _patched(self, function: Callable[[Tensor, Call], Tensor]) -> Iterator[None]:
        """Replaces every layer's forward for the moment. The instance stays, with the attributes a model reads."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                hidden, rest = args[0], args[1:]
            else:
                kwargs = dict(kwargs)
                hidden, rest = kwargs.pop("hidden_states"), ()
            if not isinstance(hidden, Tensor):
                raise _NotPassedOn(0)
            out = function(hidden, Call(rest, kwargs))
            return (out,) if self._tuple_outputs else out

        for layer in self.layers:
            layer.forward = forward
        try:
            yield
        except (IndexError, RuntimeError) as error:
            # a model that unpacks a tensor as a tuple fails in one of these ways
            if self._tuple_outputs or isinstance(error, torch.OutOfMemoryError):
                raise
            raise _NotPassedOn(0) from error
        finally:
            for layer in self.layers:
                del layer.forward

    def _share(self, value: Any) -> Any:
        """Replaces tensors by equal ones seen before: masks and positions are alike in nearly all micro-batches."""
        if isinstance(value, Tensor):
            known = self._shared.setdefault((value.shape, value.dtype), [])
            for other in known:
                if other is value or torch.equal(other, value):
                    return other
            if len(known) < 8:
                known.append(value)
            return value
        if isinstance(value, tuple | list):
            return type(value)(self._share(v) for v in value)
        if isinstance(value, dict):
            return {k: self._share(v) for k, v in value.items()}
        return value


class _NotPassedOn(Exception):
    """A layer did not receive what the layer before returned. Holds the layer's index."""
