"""A training step that is captured in a CUDA graph after it has run a few times.

Launching hundreds of kernels one by one takes Python as long as the GPU needs to run them, and longer where several
GPUs share a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from gemq.runtime.graph_capture import capture
from gemq.runtime.processes import RankLostError

WARM_UP_STEPS = 2
"""Steps that run eagerly before one is captured: afterwards kernels are compiled and optimizers have their state."""

EXPECTED_STEPS = 4 * WARM_UP_STEPS
"""Among more steps than these, some should have been captured."""


class CudaGraphReplay:
    """Calls a function on a GPU from a CUDA graph if that is possible, otherwise and on a CPU eagerly.

    Tensors that the function changes must keep their storage, and everything that differs between steps must be on the
    device.
    """

    failed = False
    """Whether a capture has failed in this process. No other is tried then, as torch keeps the memory of each."""

    def __init__(
        self,
        run: Callable[..., Any],
        device: torch.device,
        on_fallback: Callable[[], None],
        *,
        usable: bool = True,
        pool: Any = None,
    ) -> None:
        """Prepare to call ``run``.

        Args:
            run: takes a constant argument, which is the same at each step, then tensors; returns a tensor or None
            device: where ``run`` launches its kernels
            on_fallback: called once if ``run`` is not captured on a GPU, even if only because no steps were alike
            usable: False if ``run`` cannot be captured, or memory has no room for the graph
            pool: a ``graph_pool_handle`` for several graphs that never run at the same time
        """
        self._run, self._on_fallback, self._pool = run, on_fallback, pool
        self._usable = usable and device.type == "cuda"
        if device.type == "cuda" and not usable:
            on_fallback()
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._constant: Any = None
        self._inputs: list[Tensor] = []
        """Where the graph reads its input tensors."""
        self._output: Tensor | None = None
        self._steps = 0
        self._matching_steps = 0
        """Consecutive steps with the same constant and the same shapes."""

    def __call__(self, constant: Any, *tensors: Tensor) -> Any:
        """Run one step. Its result is overwritten by the next."""
        if not self._usable:
            return self._run(constant, *tensors)
        self._steps += 1
        if not self._matches(constant, tensors):  # such as a last micro-batch of fewer windows
            if self._graph is not None:
                return self._run(constant, *tensors)
            self._constant = constant
            self._inputs = [torch.empty_like(tensor) for tensor in tensors]
            self._matching_steps = 0
        self._matching_steps += 1
        if self._graph is None and self._matching_steps <= WARM_UP_STEPS:
            return self._warm_up(tensors)
        if self._graph is None and not self._try_capture():
            return self._run(constant, *tensors)
        assert self._graph is not None
        for graph_input, tensor in zip(self._inputs, tensors, strict=True):
            graph_input.copy_(tensor)
        self._graph.replay()
        return self._output

    def close(self) -> None:
        """Free the memory of the graph."""
        if self._usable and self._graph is None and self._steps > EXPECTED_STEPS:
            self._on_fallback()
        self._graph, self._output, self._constant, self._usable = None, None, None, False
        self._inputs.clear()

    def _matches(self, constant: Any, tensors: Sequence[Tensor]) -> bool:
        """Whether a step has the constant and the shapes of the last one."""
        if len(tensors) != len(self._inputs):
            return False
        for tensor, graph_input in zip(tensors, self._inputs, strict=True):
            if tensor.shape != graph_input.shape or tensor.dtype != graph_input.dtype:
                return False
        return is_identical(constant, self._constant)

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """The stream of warm-up steps and of the capture."""
        return torch.cuda.Stream(self._device)

    def _warm_up(self, tensors: Sequence[Tensor]) -> Any:
        """Run a step eagerly on a side stream, as a later capture requires."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = self._run(self._constant, *tensors)
        current.wait_stream(self._stream)
        shared = list(tensors)
        if isinstance(output, Tensor):
            shared.append(output)
        for tensor in shared:
            tensor.record_stream(self._stream)
            tensor.record_stream(current)
        return output

    def _try_capture(self) -> bool:
        """Capture a step. Returns False, and falls back to eager steps, if that fails."""
        if not CudaGraphReplay.failed:
            run = partial(self._run, self._constant, *self._inputs)
            try:
                self._graph, self._output = capture(run, self._device, stream=self._stream, pool=self._pool)
                return True
            except RankLostError:
                raise
            except Exception:  # noqa: BLE001 - out of memory, or anything that a graph does not support
                CudaGraphReplay.failed = True
        self._usable = False
        self._on_fallback()
        return False


def is_identical(first: Any, second: Any) -> bool:
    """Whether two nested values consist of the same tensor objects and of equal other values."""
    if first is second:
        return True
    if isinstance(first, Tensor) or type(first) is not type(second):
        return False
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(map(is_identical, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(is_identical(value, second[key]) for key, value in first.items())
    if dataclasses.is_dataclass(first):
        return is_identical(vars(first), vars(second))
    return bool(first == second)
