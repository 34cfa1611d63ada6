"""Kernels of experts with trellis codes against the reference: in Triton's interpreter, or on a GPU (marker gpu)."""

from __future__ import annotations

from support.interpreted import DEVICE  # first: skips the module where triton is missing

# isort: split

import os

import pytest
import torch
import triton
import triton.language as tl

from gemq.kernels import dispatch, reference
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
from support.packed_cases import assert_as_close, exact_experts, random_routing
from support.ptx import run
from support.trellis_cases import TrellisExperts


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param != DEVICE:
        pytest.skip("kernels run on the GPU where there is one, else in the interpreter")
    monkeypatch.setattr(dispatch, "mode", "triton")
    return request.param


@pytest.fixture
def generator():
    """Random inputs that differ in every run. The seed is printed if a test fails."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def check_experts(module, tokens, slots, dtype, device, generator, unused=False):
    """Compare the kernels with the reference and float64 on random inputs."""
    module = module.to(device)
    hidden = torch.randn(tokens, module.down_proj.rows, generator=generator).to(device, dtype)
    count = module.down_proj.num_experts
    index, weights = random_routing(tokens, slots, count, generator, dtype, device)
    if unused:
        index[-1, 0], index[0, -1] = -1, count + 3  # marks of padding tokens in vLLM, and of dropped tokens in families
        weights[-1, 0] = torch.nan
    with torch.no_grad():
        result = dispatch.experts_forward(module, hidden, index, weights)
        expected = reference.experts_forward(module, hidden, index, weights)
    assert_as_close(result, expected, exact_experts(module, hidden, index, weights))


@triton.jit
def decode_kernel(words, out, eighths, STATE_BITS: tl.constexpr, NARROW: tl.constexpr, PORTABLE: tl.constexpr):
    """Decode the tile of each program: [256] float32."""
    period = tl.arange(0, PERIODS)
    ring = words.to(tl.pointer_type(tl.uint32)) + tl.program_id(0) * eighths
    word, previous, before_previous, shift = period_words(period, eighths)
    high, low = load_window(ring, word, previous, before_previous, shift, NARROW, PORTABLE)
    for i in tl.static_range(8):
        states = state(high, low, end_distance(i, eighths), STATE_BITS, NARROW, PORTABLE)
        weight = tl.program_id(0) * 256 + period * 8 + i
        exact = centered_sum(states, PORTABLE)
        rounded = centered_half(states, PORTABLE).to(tl.float32)
        tl.store(out + weight, tl.where(exact == rounded, exact, float("nan")))


@pytest.mark.parametrize("state_bits", [8, 12, 16])
def test_every_width_decodes_as_the_reference_does(device, state_bits):
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
        assert run(byte_sum_asm(0x3F800000, 255), 1, [product]) == [0x3F800000 + 255 * total]
        halves = run(half_asm(), 1, [product, 0])[0].to_bytes(4, "little")
        values = torch.frombuffer(bytearray(halves), dtype=torch.float16).tolist()
        assert values == [total - MEAN, -MEAN]


WIDTHS = (8, 9, 16, 20, 31, 32)


@pytest.mark.parametrize(
    ("tokens", "slots", "dtype", "state_bits", "unused"),
    [
        (1, 3, torch.bfloat16, 12, False),
        (1, 2, torch.float32, 16, True),
        (3, 2, torch.float16, 8, True),
        (9, 3, torch.float32, 12, True),
    ],
)
def test_experts_of_mixed_widths(tokens, slots, dtype, state_bits, unused, device, generator):
    module = TrellisExperts(96, 144, WIDTHS, state_bits, generator)
    check_experts(module, tokens, slots, dtype, device, generator, unused)
