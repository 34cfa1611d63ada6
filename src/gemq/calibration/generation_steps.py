"""Next-token logits of texts that are written in parallel, one token a step.

On a GPU a step is captured in a CUDA graph over a static cache, since launching the kernels of a step of few tokens
takes longer than running them. Where the model or memory does not allow a graph, and on a CPU, the model is called as
it is, with a cache that holds a whole window from the start: one that grows by concatenation copies itself at every
step. Must not deal with sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from gemq.decoding.decoder import Decoder, Unsupported
from gemq.decoding.static_cache import last_logits_argument
from gemq.errors import UserError
from gemq.models.cache_names import cache_argument, output_cache
from gemq.models.config_values import rotary_limit
from gemq.runtime.fallbacks import optional

Step = Callable[[Tensor], Tensor]
"""Newest tokens int64 [rows, n] -> logits of the next ones, float32 [rows, V], valid until the next step.

The first step takes a token or a prompt of each row, every later one a token.
"""


class Stepper:
    """Makes the steps of one model, for one batch of windows after another.

    Attributes:
        model: writes the windows.
        seq_len: tokens of a window.
        static: whether steps use a static cache. By default on a GPU.
        eager_reason: the reason if static steps were requested and are not possible, otherwise empty.
    """

    def __init__(self, model: Any, seq_len: int, static: bool | None = None) -> None:
        self.model, self.seq_len = model, seq_len
        self.static = model.device.type == "cuda" if static is None else static
        self.eager_reason = ""
        self._static_step: _StaticStep | None = None

    def begin(self, rows: int) -> Step:
        """The step of ``rows`` new windows."""
        if self.static:
            try:
                return self._restart_static_step(rows)
            except (Unsupported, torch.OutOfMemoryError) as error:
                self.eager_reason = " ".join(f"{error}".split())[:300]
                self.static = False
            self._static_step = None
        return _DynamicStep(self.model, self.seq_len)

    def _restart_static_step(self, rows: int) -> Step:
        """The captured step for ``rows`` windows, captured again if the number of windows changes."""
        if self._static_step is None or self._static_step.batch != rows:
            self._static_step = None  # frees its memory before the next one is made
            self._static_step = _StaticStep(self.model, rows, self.seq_len)
            self._static_step.capture()
        self._static_step.restart()
        return self._static_step


class _StaticStep(Decoder):
    """A decoder whose step ends with the logits: the caller chooses the tokens."""

    def __init__(self, model: Any, rows: int, seq_len: int) -> None:
        super().__init__(model, rows, seq_len)
        self._logits: Tensor | None = None
        self._has_prefilled = False

    def capture(self) -> None:
        """Captures the step. Raises Unsupported if a GPU cannot."""
        self.prefill(self._token.clone())
        self.prepare(compile_layers=False)
        if self.device.type == "cuda" and self._graph is None:
            raise Unsupported("; ".join(self.reasons.values()))
        self.prefill(self._token.clone())  # later prompts take another path than the first, which may fail as well

    def restart(self) -> None:
        """Begins new windows."""
        self._has_prefilled = False

    def __call__(self, tokens: Tensor) -> Tensor:
        """One step, see ``Step``."""
        if self._has_prefilled:
            self._token.copy_(tokens)
            self.step()
        else:
            self._has_prefilled = True
            self.prefill(tokens)
        assert self._logits is not None
        return self._logits

    def _finish_step(self, logits: Tensor) -> None:
        """Stores the logits and moves on. The caller writes the next tokens."""
        self._choose(logits)
        self._position.add_(1)

    def _choose(self, logits: Tensor) -> Tensor:
        """Stores the logits in a buffer that a CUDA graph writes to. Returns the token buffer as it is."""
        if self._logits is None:
            self._logits = logits.float().clone()
        else:
            self._logits.copy_(logits)
        return self._token


class _DynamicStep:
    """Calls the model as it is, over the cache that it makes itself.

    If the rotary factors change at a length inside the window, the cache is computed again at that length, as
    Transformers' ``generate`` does: keys of a short text were rotated by other factors than those of a long one.
    """

    def __init__(self, model: Any, seq_len: int) -> None:
        self.model, self.seq_len = model, seq_len
        limit = rotary_limit(model.config.get_text_config())
        self._rotary_limit = limit if limit is not None and limit < seq_len else None
        self._cache: Any = None
        self._tokens: list[Tensor] = []
        """All tokens so far, until the rotary limit is reached."""

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """One step, see ``Step``."""
        if self._rotary_limit is not None:
            self._tokens.append(tokens.clone())
            if sum(step_tokens.shape[1] for step_tokens in self._tokens) > self._rotary_limit:
                tokens = torch.cat(self._tokens, dim=1)
                self._cache = self._rotary_limit = None
        arguments = cache_argument(self.model, self._cache) | last_logits_argument(self.model)
        out = self.model(input_ids=tokens, use_cache=True, **arguments)
        if self._cache is None:
            self._cache = _preallocate(output_cache(out), self.seq_len, self.model)
        logits: Tensor = out.logits[:, -1]
        return logits.float()


class _PreallocatedLayer(DynamicLayer):
    """A layer's keys and values in buffers for a whole window, so that a step copies only those of its own token."""

    def __init__(self, layer: DynamicLayer, seq_len: int) -> None:
        super().__init__()
        keys, values = layer.keys, layer.values
        assert keys is not None
        assert values is not None
        self.lazy_initialization(keys, values)
        self._key_buffer = keys.new_empty(*keys.shape[:-2], seq_len, keys.shape[-1])
        self._value_buffer = values.new_empty(*values.shape[:-2], seq_len, values.shape[-1])
        self._length = 0
        self.update(keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values. Returns all of them."""
        start, stop = self._length, self._length + key_states.shape[-2]
        self._key_buffer[:, :, start:stop] = key_states
        self._value_buffer[:, :, start:stop] = value_states
        self._length = stop
        self.keys = self._key_buffer[:, :, :stop]
        self.values = self._value_buffer[:, :, :stop]
        return self.keys, self.values


def _preallocate(cache: Any, seq_len: int, model: Any) -> Any:
    """Replaces the plain growing layers of the cache that the model made in its first step. Others stay."""
    if cache is None:
        raise UserError(f"{type(model).__name__} has no key-value cache to write windows with: give --calibration FILE")
    layers = getattr(cache, "layers", [])
    with optional("cache_grows"):
        for index, layer in enumerate(layers):
            if type(layer) is DynamicLayer and layer.is_initialized:
                layers[index] = _PreallocatedLayer(layer, seq_len)
    return cache
