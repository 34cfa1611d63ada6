"""Next-token logits of windows that are written side by side, one token a step.

On a GPU a step is captured in a CUDA graph over a static cache: a step of few tokens is launches, and a graph has none.
Where the model or memory does not allow that, and on a CPU, the model is called as it is over a cache that holds a
whole window from the start; one that grows by concatenation copies itself at every step. Knows nothing of sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from gemq.decoding.decoder import Decoder, Unsupported
from gemq.errors import UserError
from gemq.models.cache_names import cache_argument, output_cache
from gemq.models.config_values import rotary_limit
from gemq.runtime.fallbacks import optional

Step = Callable[[Tensor], Tensor]
"""Newest tokens int64 [rows, 1] -> logits of the next ones, float32 [rows, V], valid until the next step."""


class Steps:
    """The steps of one model, batch after batch of windows.

    static: over a static cache; by default on a GPU
    why:    the reason why steps asked to be static are not, else empty
    """

    def __init__(self, model: Any, window: int, static: bool | None = None) -> None:
        self.model, self.window = model, window
        self.static = model.device.type == "cuda" if static is None else static
        self.why = ""
        self._static: _StaticStep | None = None

    def begin(self, rows: int) -> Step:
        """The step of ``rows`` new windows."""
        if self.static:
            try:
                return self._static_step(rows)
            except (Unsupported, torch.OutOfMemoryError) as error:
                self.why = " ".join(f"{error}".split())[:300]
                self.static = False
            self._static = None
        return _GrowingStep(self.model, self.window)

    def _static_step(self, rows: int) -> Step:
        if self._static is None or self._static.batch != rows:
            self._static = None  # before the next one takes memory
            self._static = _StaticStep(self.model, rows, self.window)
            self._static.capture()
        self._static.restart()
        return self._static


class _StaticStep(Decoder):
    """A decoder that leaves the choice of tokens to others: its step ends with the logits."""

    def __init__(self, model: Any, rows: int, window: int) -> None:
        super().__init__(model, rows, window)
        self._logits: Tensor | None = None
        self._begun = False

    def capture(self) -> None:
        """Raises Unsupported where a GPU does not take it."""
        self.prefill(self._token.clone())
        self.prepare(compile_layers=False)
        if self.device.type == "cuda" and self.execution == "eager":
            raise Unsupported("; ".join(self.reasons.values()))

    def restart(self) -> None:
        self._begun = False

    def __call__(self, tokens: Tensor) -> Tensor:
        if self._begun:
            self._token.copy_(tokens)
            self.step()
        else:
            self._begun = True
            self.prefill(tokens)
        assert self._logits is not None
        return self._logits

    def _choose(self, logits: Tensor) -> Tensor:
        if self._logits is None:
            self._logits = logits.float().clone()
        else:
            self._logits.copy_(logits)
        return self._token


class _GrowingStep:
    """The model as it is, over the cache that it makes itself.

    Where rotary factors change at a length inside the window, the cache is computed again there, as Transformers'
    ``generate`` does: keys that were turned by the factors of short texts are not those of a long one.
    """

    def __init__(self, model: Any, window: int) -> None:
        self.model, self.window = model, window
        limit = rotary_limit(model.config.get_text_config())
        self._limit = limit if limit is not None and limit < window else None
        self._cache: Any = None
        self._written: list[Tensor] = []  # the tokens so far, as long as the limit is ahead

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        if self._limit is not None:
            self._written.append(tokens.clone())
            if len(self._written) > self._limit:
                tokens, self._cache, self._limit = torch.cat(self._written, dim=1), None, None
        out = self.model(input_ids=tokens, use_cache=True, **cache_argument(self.model, self._cache))
        if self._cache is None:
            self._cache = _preallocate(output_cache(out), self.window, self.model)
        logits: Tensor = out.logits[:, -1]
        return logits.float()


class _Preallocated(DynamicLayer):
    """A layer of the cache that holds a whole window from the start, so that a step copies its own keys and
    values only."""

    def __init__(self, layer: DynamicLayer, window: int) -> None:
        super().__init__()
        keys, values = layer.keys, layer.values
        assert keys is not None
        assert values is not None
        self.lazy_initialization(keys, values)
        self._all_keys = keys.new_empty(*keys.shape[:-2], window, keys.shape[-1])
        self._all_values = values.new_empty(*values.shape[:-2], window, values.shape[-1])
        self._used = 0
        self.update(keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, self._used = self._used, self._used + key_states.shape[-2]
        self._all_keys[:, :, start : self._used] = key_states
        self._all_values[:, :, start : self._used] = value_states
        self.keys = self._all_keys[:, :, : self._used]
        self.values = self._all_values[:, :, : self._used]
        return self.keys, self.values


def _preallocate(cache: Any, window: int, model: Any) -> Any:
    """The cache that the model made in its first step, its plain growing layers replaced; others stay as they
    are."""
    if cache is None:
        raise UserError(f"{type(model).__name__} has no key-value cache to write windows with: give --calib FILE")
    layers = getattr(cache, "layers", [])
    with optional("cache_grows"):
        for index, layer in enumerate(layers):
            if type(layer) is DynamicLayer and layer.is_initialized:
                layers[index] = _Preallocated(layer, window)
    return cache
