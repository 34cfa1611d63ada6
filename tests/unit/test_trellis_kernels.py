"""Kernels of experts with trellis codes against the reference: in Triton's interpreter, or on a GPU (marker gpu)."""

from __future__ import annotations

from support.interpreted import DEVICE  # first: skips the module where triton is missing

# isort: split

import os

import pytest
import torch
import triton
import triton.language as tl
from torch import nn

from gemq.evaluation.weight_traffic import expert_bytes
from gemq.kernels import dispatch, reference
from gemq.kernels.activation import activation_of
from gemq.kernels.trellis import launch, operators
from gemq.kernels.trellis.fragments import repeat_asm
from gemq.kernels.trellis.operands import period_values
from gemq.kernels.trellis.tuning import ProductConfig
from gemq.kernels.trellis.values import (
    byte_total,
    half_windows,
    narrow_eighths,
    period_products,
    period_words,
    state_shifts,
    sum_asm,
)
from gemq.quant import trellis
from support.packed_cases import assert_as_close, exact_experts, random_routing, silu_gate
from support.ptx import run
from support.trellis_cases import TrellisExperts


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param != DEVICE:
        pytest.skip("kernels run on the GPU where there is one, else in the interpreter")
    monkeypatch.setattr(dispatch, "mode", "triton")
    if request.param == "cpu":  # a program costs the interpreter about as much however large its tiles are
        monkeypatch.setattr(launch, "product_config", lambda: ProductConfig(tile_rows=32, num_warps=4))
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
def decode_kernel(words, values, sums, eighths, STATE_BITS: tl.constexpr, NARROW: tl.constexpr, PORTABLE: tl.constexpr):
    """Decode the tile of each program as for many tokens and as for few: [256] float32 each."""
    period = tl.arange(0, 32)
    ring = words.to(tl.pointer_type(tl.uint32)) + tl.program_id(0) * eighths
    word, previous, before_previous, shift = period_words(period, eighths)
    last, middle, first = tl.load(ring + word), tl.load(ring + previous), tl.load(ring + before_previous)
    tile = period_values(last, middle, first, shift, eighths, STATE_BITS)
    tl.store(values + tl.program_id(0) * 256 + tl.arange(0, 256), tl.reshape(tl.permute(tile, (0, 3, 2, 1)), (256,)))
    windows = half_windows(last, middle, first, shift, eighths, NARROW, PORTABLE)
    products = period_products(windows, state_shifts(eighths, STATE_BITS, NARROW, 3), STATE_BITS, 3)
    for i in tl.static_range(8):
        tl.store(sums + tl.program_id(0) * 256 + period * 8 + i, byte_total(products[i]).to(tl.float32))


@pytest.mark.parametrize(("state_bits", "widths"), [(8, (9, 26)), (12, (8, 22, 23, 32)), (16, (16, 31))])
def test_widths_decode_as_in_the_reference(state_bits, widths, device):
    table = trellis.byte_sum_table(state_bits)
    for eighths in range(8, 33) if device == "cuda" else widths:
        words = torch.randint(-(2**31), 2**31, (2, eighths), dtype=torch.int64).to(torch.int32)
        values, sums = torch.empty(2, 2, 256, device=device)
        narrow = eighths <= narrow_eighths(state_bits)
        decode_kernel[(2,)](words.to(device), values, sums, eighths, state_bits, narrow, device == "cpu", num_warps=1)
        assert torch.equal(values, sums - trellis.BYTES_MEAN)
        expected = trellis.decode(words, eighths, table)
        torch.testing.assert_close(values.cpu() / trellis.BYTES_DEVIATION, expected, rtol=1e-6, atol=0)
    assert narrow_eighths(12) == 22


def test_assembly_of_values():
    for product in (0, 0x12345678, 0xFFFFFFFF):
        total = sum(product.to_bytes(4, "little"))
        assert run(sum_asm(), 1, [product]) == [0x4B000000 + total]
        assert [run(repeat_asm(i), 1, [product]) for i in range(4)] == [
            [byte * 0x01010101] for byte in product.to_bytes(4, "little")
        ]


WIDTHS = (8, 9, 16, 20, 31, 32)


@pytest.mark.parametrize(
    ("tokens", "slots", "dtype", "state_bits", "unused"),
    [
        (1, 3, torch.bfloat16, 12, False),
        (1, 2, torch.float32, 16, True),
        (5, 3, torch.float16, 8, True),
    ],
)
def test_experts_of_mixed_widths(tokens, slots, dtype, state_bits, unused, device, generator):
    """Blocks of 32 and 16 columns, which do not fill steps, and rows that do not fill programs."""
    module = TrellisExperts(96, 144, WIDTHS, state_bits, generator)
    check_experts(module, tokens, slots, dtype, device, generator, unused)


def clamped_gate(y):
    """Apply an activation of interleaved rows."""
    gate, up = y[..., ::2].clamp(max=1.5), y[..., 1::2].clamp(-1.5, 1.5)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@pytest.mark.parametrize("kind", ["interleaved", "no gate", "unknown", "norm"])
def test_experts_of_other_families(kind, device, generator):
    gate = {"interleaved": clamped_gate, "no gate": torch.relu, "unknown": lambda y: y.chunk(2, -1)[0]}
    bias = kind in ("interleaved", "unknown")
    gated = kind != "no gate"
    module = TrellisExperts(32, 16, (8, 20), 12, generator, gate.get(kind, silu_gate), bias, gated)
    if kind == "interleaved":
        module.limit = 1.5
    if kind == "norm":
        module.has_post_expert_norm, module.post_expert_norm = True, nn.RMSNorm(32)
    check_experts(module, 2, 2, torch.float32, device, generator, unused=True)


def test_rows_that_several_programs_share(device, generator, monkeypatch):
    """Two splits of three blocks, the sums of which are added before the activation."""
    monkeypatch.setattr(launch, "num_splits", lambda pairs, rows, columns: 2)
    module = TrellisExperts(96, 96, (16, 20), 12, generator, bias=True)
    check_experts(module, 1, 2, torch.bfloat16, device, generator)


def test_an_expert_in_two_slots_of_a_token(device, generator):
    module = TrellisExperts(32, 16, (16, 31), 12, generator).to(device)
    hidden = torch.randn(2, 32, generator=generator).to(device)
    index = torch.tensor([[1, 1], [0, 1]], device=device)
    weights = torch.rand(2, 2, generator=generator).to(device)
    result = dispatch.experts_forward(module, hidden, index, weights)
    torch.testing.assert_close(result.double(), exact_experts(module, hidden, index, weights), rtol=1e-5, atol=1e-4)


def test_operators_trace(device, generator):
    """Fake implementations and schemas are correct, and a compiled module has no graph break."""
    module = TrellisExperts(32, 16, (16, 31), 12, generator).to(device)
    hidden = torch.randn(1, 32, generator=generator).to(device)
    index, weights = random_routing(1, 1, 2, generator, torch.float32, device)
    up, down = launch.TrellisArguments.from_experts(module)
    tests = ("test_schema", "test_faketensor")
    arguments = (
        hidden,
        index,
        weights,
        up.tensors,
        up.sizes,
        down.tensors,
        down.sizes,
        activation_of(module).numbers(),
    )
    torch.library.opcheck(operators.trellis_experts, arguments, test_utils=tests)
    torch.library.opcheck(operators.trellis_rows, (hidden, index, None, up.tensors, up.sizes), test_utils=tests)
    with torch.no_grad():
        compiled = torch.compile(lambda x: module(x, index, weights), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(hidden), module(hidden, index, weights))


@pytest.mark.gpu
def test_a_graph_follows_the_routing(generator, monkeypatch):
    monkeypatch.setattr(dispatch, "mode", "triton")
    module = TrellisExperts(256, 128, (16, 24, 9, 30), 12, generator).cuda()
    hidden = torch.randn(4, 256, generator=generator).cuda().bfloat16()
    index, weights = random_routing(4, 2, 4, generator, torch.bfloat16, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        dispatch.experts_forward(module, hidden, index, weights)
        with torch.cuda.graph(graph):
            result = dispatch.experts_forward(module, hidden, index, weights)
        index.copy_(index.flip(0))
        graph.replay()
        assert torch.equal(result, dispatch.experts_forward(module, hidden, index, weights))


def test_state_dict_has_the_tensors_of_the_checkpoint(generator):
    module, copy = (TrellisExperts(32, 16, (16, 31), 12, generator) for _ in range(2))
    state = module.state_dict()
    assert state["1.gate_up_proj.codes"].shape == (2, 2 * 4 * 31)
    assert state["0.down_proj.scales"].shape == (32,)
    copy.load_state_dict(state)
    assert torch.equal(copy.down_proj.dequantize(1, torch.float32), module.down_proj.dequantize(1, torch.float32))
    state["0.down_proj.codes"] = state["0.down_proj.codes"][:1]
    with pytest.raises(RuntimeError, match=r"0\.down_proj: expert 0: .*\[1, "):
        copy.load_state_dict(state)
    assert module.to(torch.float16).down_proj.scales.dtype == torch.uint8


def test_a_cpu_takes_the_reference(generator, monkeypatch):
    """PyTorch's 4-bit product on a CPU is for affine codes."""
    monkeypatch.setattr(dispatch, "mode", "")
    module = TrellisExperts(32, 16, (16, 31), 12, generator)
    hidden = torch.randn(2, 32, generator=generator).bfloat16()
    index, weights = random_routing(2, 1, 2, generator, torch.bfloat16, "cpu")
    with torch.no_grad():
        result = module(hidden, index, weights)
        assert torch.equal(result, reference.experts_forward(module, hidden, index, weights))
    assert sum(expert_bytes(module)) == sum(tensor.nbytes for tensor in module.state_dict().values())
