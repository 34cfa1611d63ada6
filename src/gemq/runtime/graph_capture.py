"""Capture of a CUDA graph that leaves no trace in the process when it fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from gemq.runtime.compat import torch_private


def capture(
    run: Callable[[], Any], device: torch.device, *, stream: torch.cuda.Stream | None = None, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture what ``run`` launches on ``device``.

    ``torch.cuda.graph`` does the same. But when a capture fails, it leaves its stream current, its memory pool open,
    and the default generator in its capturing state, in which every later draw raises (torch 2.11).

    Args:
        run: launches the work; it must have run before, so that kernels are compiled and libraries are initialized
        device: where it is launched
        stream: the stream to capture on, a new one by default
        pool: a ``graph_pool_handle`` shared by graphs that never run at the same time, a new one by default

    Returns:
        The graph, and what ``run`` returned: tensors that each replay overwrites.

    Raises:
        Exception: whatever ``run`` or the end of the capture raised.
    """
    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[device_index(device)]
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # the graph cannot use memory that is cached outside its pool
    state = generator.clone_state()
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device) if stream is None else stream):
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            output = run()
        except BaseException:
            with suppress(RuntimeError):  # the first error is more informative
                _end(graph, device, pool, generator, state)
            raise
        _end(graph, device, pool, generator, state)
    return graph, output


def device_index(device: torch.device) -> int:
    """Return the index of a GPU: the current one if ``device`` has none."""
    return torch.cuda.current_device() if device.index is None else device.index


def _end(
    graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any, generator: torch.Generator, state: torch.Generator
) -> None:
    """End a capture. Raises RuntimeError if it is invalid, after undoing what torch leaves then."""
    try:
        graph.capture_end()
    except RuntimeError:
        with suppress(RuntimeError):  # from torch 2.12 on, the pool is closed already
            torch_private.close_graph_pool(device_index(device), pool)
        generator.graphsafe_set_state(state)
        raise
