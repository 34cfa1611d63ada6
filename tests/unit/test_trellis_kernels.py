"""Kernels of experts with trellis codes against the reference: in Triton's interpreter, or on a GPU (marker gpu)."""

from __future__ import annotations

from support.interpreted import DEVICE  # first: skips the module where triton is missing

# isort: split

import pytest
import torch
import triton
import triton.language as tl

from gemq.kernels.trellis.values import (
    MEAN,
    PERIODS,
    byte_sum_asm,
    centered_half,
    centered_sum,
    end_distance,
    half_asm,
    load_window,
    narrow_eighths,
    period_words,
    state,
)
from gemq.quant import trellis
from support.ptx import run


@triton.jit
def decode_kernel(words, out, eighths, STATE_BITS: tl.constexpr, NARROW: tl.constexpr, PORTABLE: tl.constexpr):
    """Decode the tile of each program: [256] float32."""
    period = tl.arange(0, PERIODS)
    ring = words.to(tl.pointer_type(tl.uint32)) + tl.program_id(0) * eighths
    word, previous, before_previous, shift = period_words(period, eighths)
    high, low = load_window(ring, word, previous, before_previous, shift, None, NARROW, PORTABLE)
    for i in tl.static_range(8):
        states = state(high, low, end_distance(i, eighths), STATE_BITS, NARROW, PORTABLE)
        weight = tl.program_id(0) * 256 + period * 8 + i
        exact = centered_sum(states, PORTABLE)
        rounded = centered_half(states, PORTABLE).to(tl.float32)
        tl.store(out + weight, tl.where(exact == rounded, exact, float("nan")))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("state_bits", [8, 12, 16])
def test_every_width_decodes_as_the_reference_does(device, state_bits):
    if device != DEVICE:
        pytest.skip("kernels run on the GPU where there is one, else in the interpreter")
    table = trellis.byte_sum_table(state_bits)
    for eighths in range(8, 33, 1 if device == "cuda" else 3):
        words = torch.randint(-(2**31), 2**31, (2, eighths), dtype=torch.int64).to(torch.int32)
        out = torch.empty(2, 256, device=device)
        narrow = eighths <= narrow_eighths(state_bits)
        decode_kernel[(2,)](words.to(device), out, eighths, state_bits, narrow, device == "cpu", num_warps=1)
        expected = trellis.decode(words, eighths, table)
        torch.testing.assert_close(out.cpu() / trellis.BYTES_DEVIATION, expected, rtol=1e-6, atol=0)
    assert narrow_eighths(12) == 22


def test_assembly_of_values():
    for product in (0, 0x12345678, 0xFFFFFFFF):
        total = sum(product.to_bytes(4, "little"))
        assert run(byte_sum_asm(0x4B000000), 1, [product]) == [0x4B000000 + total]
        halves = run(half_asm(), 1, [product, 0])[0].to_bytes(4, "little")
        values = torch.frombuffer(bytearray(halves), dtype=torch.float16).tolist()
        assert values == [total - MEAN, -MEAN]
