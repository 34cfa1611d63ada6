"""CUDA graphs of prompts, whose kernels take the host longer to launch than the GPU to run, up to thousands of tokens.

The first prompt of a length runs kernel by kernel, the second one is captured. Lengths are rounded up, so that few
graphs serve all prompts. Tokens after a prompt change nothing before them: attention is causal, and a step overwrites
their keys and values or masks them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemq.runtime.graph_capture import capture
from gemq.runtime.integers import round_up

MIN_TOKENS = 16
"""Shorter prompts run kernel by kernel. Lengths are rounded up to a multiple of this at least."""

MAX_TOKENS = 4096
"""Most tokens of a batch of prompts in a graph. With more, kernels run longer than the host launches them."""

LENGTHS_PER_OCTAVE = 8
"""Rounded lengths between two powers of two from 128 on: an eighth of a prompt is added at most."""

MAX_GRAPHS = 8
"""Upper bound for the number of graphs. They share their memory. The least recently used one is dropped."""


class _PromptGraph(NamedTuple):
    """A graph with its buffers: ids [batch, S], the position of the last token [1], and logits [batch, V]."""

    graph: Any
    ids: Tensor
    last: Tensor
    logits: Tensor


class PromptGraphs:
    """Graphs of prompts for one batch size, by their rounded length.

    Args:
        batch: number of prompts
        max_length: upper bound for rounded lengths
    """

    def __init__(self, batch: int, max_length: int) -> None:
        self._batch, self._max_length = batch, max_length
        self._lengths: set[int] = set()  # that came before
        self._graphs: dict[int, _PromptGraph] = {}  # the last one was used last
        self._stream: Any = None

    def record_length(self, length: int) -> bool:
        """Records prompts of ``length`` tokens. Returns whether a graph may serve them and such prompts came before."""
        rounded = self._rounded(length)
        if length < MIN_TOKENS or rounded * self._batch > MAX_TOKENS:
            return False
        came_before = rounded in self._lengths
        self._lengths.add(rounded)
        return came_before

    def is_captured(self, length: int) -> bool:
        """Whether there is a graph for prompts of ``length`` tokens."""
        return self._rounded(length) in self._graphs

    def capture(self, run: Callable[[Tensor, Tensor], Tensor], length: int, device: torch.device) -> None:
        """Captures a graph for prompts of ``length`` tokens.

        Args:
            run: computes the logits [batch, V] at a position [1] of prompts [batch, S], the same for all
            length: S
            device: of the model

        Raises:
            RuntimeError: there is not enough memory for it.
            Exception: whatever the model raised.
        """
        rounded = self._rounded(length)
        ids = torch.zeros(self._batch, rounded, dtype=torch.long, device=device)
        last = torch.zeros(1, dtype=torch.long, device=device)
        try:
            run(ids, last)  # compiles kernels and initialises libraries
            if len(self._graphs) == MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            graph, logits = self._record(lambda: run(ids, last), device)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(f"there is no memory for a graph of {rounded} tokens") from error
        self._graphs[rounded] = _PromptGraph(graph, ids, last, logits)

    def replay(self, ids: Tensor) -> Tensor:
        """Runs prompts [batch, S] in their graph. Returns logits [batch, V], which the next prompts overwrite."""
        length = ids.shape[1]
        rounded = self._rounded(length)
        prompt = self._graphs[rounded] = self._graphs.pop(rounded)
        prompt.ids[:, :length].copy_(ids)
        prompt.last.fill_(length - 1)
        prompt.graph.replay()
        return prompt.logits

    def _rounded(self, length: int) -> int:
        """Returns the length to which prompts are filled up."""
        octave = 1 << (length - 1).bit_length()
        step = max(MIN_TOKENS, octave // (2 * LENGTHS_PER_OCTAVE))
        rounded = round_up(length, step)
        return max(length, min(rounded, self._max_length))

    def _record(self, run: Callable[[], Tensor], device: torch.device) -> tuple[Any, Tensor]:
        """Captures ``run``. Graphs share a pool, since their intermediate results are never needed at the same time."""
        if self._stream is None:  # one for all graphs: a stream has a workspace for matrix products
            self._stream = torch.cuda.Stream(device)
        pool = next((prompt.graph.pool() for prompt in self._graphs.values()), None)
        return capture(run, device, stream=self._stream, pool=pool)
