"""The device that a name means, how it adds up, and how fast it is, measured in about a second: products, elementwise
passes, calls, random numbers.

Knows no models: ``planning.cost_model`` counts how much of each a stage takes.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemq.errors import UserError, shown

SECONDS, TRIES = 0.05, 3
"""What a figure is measured for, and how often: the best counts, as others may use the machine now and then."""
LARGEST = 2048
"""Rows and columns of a measured product at most: larger ones are no faster."""


def pick_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:1``. Raises UserError when that device is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"there is no device {shown(name)}: give auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"gemq does not compute on {shown(name)}: give auto, cpu or cuda")
    if device.type == "cpu":
        return torch.device("cpu")
    if (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name} is not there ({torch.cuda.device_count()} GPUs found): give --device cpu")
    return device


class FixedOrder:
    """Lets a GPU add up in a fixed order, attention's gradients among all else, so that it gives the same each time.

    Where an operation has no such order, it is computed once more without, and so is what follows.
    """

    def __init__(self, device: torch.device):
        self.kept = device.type == "cuda"

    def run(self, compute: Callable[[], Any]) -> Any:
        """What ``compute`` gives, called a second time if it has no fixed order."""
        if not self.kept:
            return compute()
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for, and uses on a GPU of today
        memory: Any = torch.utils.deterministic
        before = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
        torch.set_deterministic_debug_mode("error")  # a mode that only warns leaves attention as it is
        memory.fill_uninitialized_memory = False
        try:
            return compute()
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            self.kept = False
        finally:
            torch.set_deterministic_debug_mode(before[0])
            memory.fill_uninitialized_memory = before[1]
        return compute()


@dataclass(frozen=True)
class Rates:
    """Of one device, in one compute type; per second.

    products: floating-point operations of matrix products
    bytes:    read and written by a chain of elementwise operations as experts have them, memory for results included
    near:     the same in place, on what stays in a CPU's caches
    calls:    operations on tensors so small that only starting them takes time
    draws:    random numbers of the exponential distribution, by which labels are sampled
    """

    products: float
    bytes: float
    near: float
    calls: float
    draws: float


@cache
@torch.no_grad()
def measure(device: torch.device, dtype: torch.dtype, rows: int, columns: int) -> Rates:
    """The rates of ``device``, products with matrices [rows, columns] as the model's experts have them.

    Measured once in a process: the demo runs several jobs.
    """
    on_cpu = device.type == "cpu"
    rows, columns = min(rows, LARGEST), min(columns, LARGEST)
    tokens = (1 if on_cpu else 32) * max(64, (1 << 26) // (rows * columns))
    matrix, x = (torch.randn(n, columns, device=device).to(dtype) for n in (rows, tokens))
    products = 2.0 * rows * columns * tokens * _per_second(lambda: F.linear(x, matrix), device)
    tiny, few = torch.nn.Linear(16, 16, device=device), torch.randn(4, 16, device=device)
    calls = _per_second(lambda: tiny(few), device)
    drawn = torch.empty(1 << (20 if on_cpu else 24), device=device)
    draws = drawn.numel() * _per_second(lambda: drawn.exponential_(), device)
    if not on_cpu:
        passes = _gate_rate(1 << 26, device)
        return Rates(products, passes, passes, calls, draws)
    # what lies between tensors whose memory is used again and those that the system hands out anew each time
    passes = math.sqrt(_gate_rate(1 << 22, device) * _gate_rate(1 << 23, device))
    near = torch.randn(1 << 18)
    in_place = 2.0 * near.nbytes * _per_second(lambda: near.add_(1), device)
    return Rates(products, passes, in_place, calls, draws)


def _gate_rate(numbers: int, device: torch.device) -> float:
    """Bytes a second of gathering, gating and adding up ``numbers`` float32."""
    x = torch.randn(numbers // 512, 512, device=device)
    order = torch.randperm(len(x), device=device)

    def run() -> Tensor:
        a, b = x.index_select(0, order).chunk(2, -1)
        h = F.silu(a) * b
        return torch.zeros_like(h).index_add(0, order, h)

    return 6.5 * x.nbytes * _per_second(run, device)


def _per_second(run: Callable[[], object], device: torch.device) -> float:
    """How often ``run`` runs in a second."""

    def timed(times: int) -> float:
        _wait(device)
        begin = time.perf_counter()
        for _ in range(times):
            run()
        _wait(device)
        return time.perf_counter() - begin

    timed(2)
    times = max(2, int(2 * SECONDS / max(timed(2), 1e-6)))
    return times / min(timed(times) for _ in range(TRIES))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
