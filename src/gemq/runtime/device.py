"""Choice of a device, deterministic sums on it, and its speed: the rates that ``planning.cost_model`` needs.

The rates are measured in about a second. Must not import models.
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

from gemq.errors import UserError, short_repr

SECONDS, TRIES = 0.05, 3
"""Duration of a measurement, and how often it is repeated. The best counts, as others may use the machine too."""

MAX_MATRIX_SIZE = 2048
"""Upper bound for the rows and columns of a measured product. Larger ones are no faster."""


def pick_device(name: str) -> torch.device:
    """Return the device that ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` names.

    Raises:
        UserError: the device is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"there is no device {short_repr(name)}: give auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"gemq does not compute on {short_repr(name)}: give auto, cpu or cuda")
    if device.type == "cpu":
        return torch.device("cpu")
    if (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name} is not there ({torch.cuda.device_count()} GPUs found): give --device cpu")
    return device


class FixedOrder:
    """Makes sums on a GPU deterministic, those of attention's gradients included.

    If an operation has no deterministic implementation, ``run`` repeats the computation without this mode, and so do
    all later calls.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_active = device.type == "cuda"

    def run(self, compute: Callable[[], Any]) -> Any:
        """Return the result of ``compute``, which is called a second time if it cannot be deterministic."""
        if not self.is_active:
            return compute()
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch requires it; recent GPUs use it anyway
        memory: Any = torch.utils.deterministic
        mode, fill = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
        torch.set_deterministic_debug_mode("error")  # the mode "warn" does not change attention
        memory.fill_uninitialized_memory = False
        try:
            return compute()
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            self.is_active = False
        finally:
            torch.set_deterministic_debug_mode(mode)
            memory.fill_uninitialized_memory = fill
        return compute()


@dataclass(frozen=True)
class Rates:
    """Speed of one device in one dtype, per second.

    Attributes:
        products: floating-point operations of matrix products
        bytes: bytes that elementwise operations of experts read and write, including allocation of their results
        calls: operations on tensors so small that only their launch takes time
    """

    products: float
    bytes: float
    calls: float


@cache
@torch.no_grad()
def measure(device: torch.device, dtype: torch.dtype, rows: int, columns: int) -> Rates:
    """Measure the rates of ``device``, once in a process.

    Args:
        device: what to measure
        dtype: of matrix products
        rows: rows of a matrix of the model's experts
        columns: its columns
    """
    products = _product_rate(device, dtype, min(rows, MAX_MATRIX_SIZE), min(columns, MAX_MATRIX_SIZE))
    layer, x = torch.nn.Linear(16, 16, device=device), torch.randn(4, 16, device=device)
    calls = _per_second(lambda: layer(x), device)
    if device.type != "cpu":
        return Rates(products, _gate_rate(1 << 26, device), calls)
    # the mean of tensors whose memory is reused, and of those that get new memory from the system each time
    gate_rate = math.sqrt(_gate_rate(1 << 22, device) * _gate_rate(1 << 23, device))
    return Rates(products, gate_rate, calls)


def _product_rate(device: torch.device, dtype: torch.dtype, rows: int, columns: int) -> float:
    """Return the floating-point operations per second of products with a matrix [rows, columns]."""
    tokens = (1 if device.type == "cpu" else 32) * max(64, (1 << 26) // (rows * columns))
    matrix = torch.randn(rows, columns, device=device).to(dtype)
    x = torch.randn(tokens, columns, device=device).to(dtype)
    return 2.0 * rows * columns * tokens * _per_second(lambda: F.linear(x, matrix), device)


def _gate_rate(numbers: int, device: torch.device) -> float:
    """Return the bytes per second of gathering, gating and scattering ``numbers`` float32 numbers."""
    x = torch.randn(numbers // 512, 512, device=device)
    order = torch.randperm(len(x), device=device)

    def run() -> Tensor:
        gate, up = x.index_select(0, order).chunk(2, -1)
        h = F.silu(gate) * up
        return torch.zeros_like(h).index_add(0, order, h)

    return 6.5 * x.nbytes * _per_second(run, device)


def _per_second(run: Callable[[], object], device: torch.device) -> float:
    """Return how often ``run`` can be called in a second."""

    def seconds_for(calls: int) -> float:
        _synchronize(device)
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        _synchronize(device)
        return time.perf_counter() - begin

    seconds_for(2)
    calls = max(2, int(2 * SECONDS / max(seconds_for(2), 1e-6)))
    return calls / min(seconds_for(calls) for _ in range(TRIES))


def _synchronize(device: torch.device) -> None:
    """Wait for a GPU to finish its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
