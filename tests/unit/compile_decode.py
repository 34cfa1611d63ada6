"""Compiles the decode kernels as they would be launched, for GPUs that are not here.

Prints a line for each: architecture, kernel, shared memory in bytes.
Its own process: Triton must not have been told to interpret.
"""

from __future__ import annotations

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from gemq.kernels import attention, fields, launch
from gemq.kernels.activation import SILU, Activation


class Device:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def main() -> None:
    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_only
    kinds = {torch.bfloat16: fields.BF16, torch.float16: fields.FP16, torch.float32: fields.SPLIT}
    launch._kind = lambda x: int(kinds[x.dtype])
    for capability in (89, 90):
        triton.runtime.driver.set_active(Device(capability))
        if capability == 89:
            launch_all(torch.bfloat16, 2048, 1024, 64, [2, 3, 4, 8, 16, 256])
            launch_all(torch.float32, 2048, 1024, 64, [2, 3, 4, 8])
        else:
            launch_all(torch.bfloat16, 4096, 14336, 8, [2, 3, 4, 8])
        for name, kernel in compiled:
            launch._check_layout(kernel)
            print(capability, name, kernel.metadata.shared)
        compiled.clear()


def launch_all(dtype: torch.dtype, hidden: int, inner: int, experts: int, levels: list[int]) -> None:
    """All kernels of a shape with 16 columns of activations."""
    tokens, slots = 16, 2
    packed = (torch.empty(16, dtype=torch.uint8), *(torch.empty(8, dtype=torch.int16) for _ in range(2)))
    table = torch.empty(experts, 3, dtype=torch.int64)
    index = torch.empty(tokens, slots, dtype=torch.int64)
    x, weights = torch.empty(tokens, hidden, dtype=dtype), torch.empty(tokens, slots, dtype=dtype)
    activation = Activation(SILU, gated=True)
    up = launch.Matrices(*packed, table, None, 2 * inner, 128, levels)
    down = launch.Matrices(*packed, table, None, hidden, 128, levels)
    h = launch.launch_up(x, index, up, activation)
    launch.launch_down(h, index, weights, down)
    for bits in (16, 256):
        grid = torch.empty(2048, hidden // 128, dtype=torch.int16)
        codes = torch.empty(2048, hidden // 2, dtype=torch.uint8)
        linears = launch.Linears([codes] * 3, [grid] * 3, [grid] * 3, [], bits, 128)
        for tokens in (1, 16):
            launch.launch_linears(x[:tokens], linears)
    bounds = torch.empty(2, dtype=torch.int32)
    for length in (64, 4096):
        cache = torch.empty(1, 2, length, 128, dtype=dtype)
        attention.decode_attention(torch.empty(1, 8, 128, dtype=dtype), cache, cache, bounds, 1.0)


if __name__ == "__main__":
    main()
