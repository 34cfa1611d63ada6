"""A step that is launched from a CUDA graph after it has run a few times.

Launching hundreds of kernels one by one takes Python as long as a GPU needs for them, and longer than its part of them
takes where several GPUs share a step. Knows nothing of what is computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from gemq.runtime.graph_capture import capture

WARM_UP = 2
"""Steps that run as they are before one is captured: kernels are compiled and optimizers have their state then."""

MANY = 4 * WARM_UP
"""So many steps should have met others of their kind."""


class Replayed:
    """``run`` on a GPU, from a CUDA graph where one can be had. On a CPU, and where none can be had, as it is.

    What ``run`` changes has to stay where it is, on the device, and all that differs between steps has to be there too.
    """

    failed = False
    """Whether a capture has failed in this process. There is no other then, as torch keeps the memory of each."""

    def __init__(
        self,
        run: Callable[..., Any],
        device: torch.device,
        tell: Callable[[], None],
        *,
        usable: bool = True,
        pool: Any = None,
    ):
        """run: takes whatever stays the same from step to step, then tensors; returns nothing, or a tensor

        tell:   called once when ``run`` is not captured on a GPU, be it for want of steps that are given alike
        usable: False where it is known to be nothing for a graph, or memory has no room for one
        pool:   of ``graph_pool_handle``, for several that never run at the same time
        """
        self._run, self._tell, self._pool = run, tell, pool
        self._usable = usable and device.type == "cuda"
        if device.type == "cuda" and not usable:
            tell()
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._fixed: Any = None
        self._given: list[Tensor] = []  # where the graph looks for its tensors
        self._output: Tensor | None = None
        self._alike = self._calls = 0  # steps that were given the same one after the other, and all of them

    def __call__(self, fixed: Any, *tensors: Tensor) -> Any:
        """One step. What it returns holds until the next."""
        if not self._usable:
            return self._run(fixed, *tensors)
        self._calls += 1
        if not self._fits(fixed, tensors):  # such as a last micro-batch of fewer windows
            if self._graph is not None:
                return self._run(fixed, *tensors)
            self._fixed, self._given, self._alike = fixed, [torch.empty_like(t) for t in tensors], 0
        self._alike += 1
        if self._graph is None and self._alike <= WARM_UP:
            return self._aside(tensors)
        if self._graph is None and not self._captured():
            return self._run(fixed, *tensors)
        assert self._graph is not None
        for place, tensor in zip(self._given, tensors, strict=True):
            place.copy_(tensor)
        self._graph.replay()
        return self._output

    def close(self) -> None:
        """Gives back what the graph holds."""
        if self._usable and self._graph is None and self._calls > MANY:
            self._tell()
        self._graph, self._output, self._fixed, self._usable = None, None, None, False
        self._given.clear()

    def _fits(self, fixed: Any, tensors: Sequence[Tensor]) -> bool:
        alike = len(tensors) == len(self._given) and all(
            t.shape == place.shape and t.dtype == place.dtype for t, place in zip(tensors, self._given, strict=True)
        )
        return alike and same(fixed, self._fixed)

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def _aside(self, tensors: Sequence[Tensor]) -> Any:
        """A step on another stream, as a capture wants it of what comes before."""
        now = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            output = self._run(self._fixed, *tensors)
        now.wait_stream(self._stream)
        for tensor in (*tensors, *([output] if isinstance(output, Tensor) else ())):
            tensor.record_stream(self._stream)
            tensor.record_stream(now)
        return output

    def _captured(self) -> bool:
        if not Replayed.failed:
            run = partial(self._run, self._fixed, *self._given)
            try:
                self._graph, self._output = capture(run, self._device, stream=self._stream, pool=self._pool)
                return True
            except Exception:  # noqa: BLE001 - out of memory, or whatever a graph does not take: steps run without
                Replayed.failed = True
        self._usable = False
        self._tell()
        return False


def same(one: Any, other: Any) -> bool:
    """Whether two nests hold the same tensors and equal values."""
    if one is other:
        return True
    if isinstance(one, Tensor) or type(one) is not type(other):
        return False
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if dataclasses.is_dataclass(one):
        return same(vars(one), vars(other))
    return bool(one == other)
