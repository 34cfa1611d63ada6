"""Experts whose matrices are decoded before they are multiplied: in Triton's interpreter, or on a GPU (marker gpu)."""

from __future__ import annotations

from support.interpreted import DEVICE  # first: skips the module where triton is missing

# isort: split
import pytest
import torch
from torch import Tensor

from gemq.kernels import decoded_experts, dispatch, grouped_product, reference
from gemq.kernels.activation import SILU, Activation
from gemq.quant.widths import Width
from support.packed_cases import Experts, assert_as_close, exact_experts, random_routing, silu_gate
from support.trellis_cases import TrellisExperts

torch.set_num_threads(1)
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

FP16, FP32 = torch.float16, torch.float32
GATE = Activation(SILU, gated=True)


def looped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply as torch's grouped product does. Rows that it leaves out are not numbers."""
    out = x.new_full((len(x), weights.shape[1]), torch.nan)
    start = 0
    for weight, end in zip(weights, ends.tolist(), strict=True):
        out[start:end] = (x[start:end].float() @ weight.float().T).to(x.dtype)
        start = end
    return out


def interleaved_gate(y: Tensor) -> Tensor:
    """Apply the SwiGLU activation to rows of gate and up that alternate."""
    return torch.nn.functional.silu(y[..., ::2]) * y[..., 1::2]


def packed_experts(codes, hidden, inner, gate, generator):
    """Return four experts of mixed widths."""
    options = generator, gate or torch.relu
    gated = gate is not None
    if codes == "trellis":
        return TrellisExperts(hidden, inner, (8, 9, 20, 31), 12, *options, gated=gated).to(DEVICE)
    return Experts(hidden, inner, list(Width)[:4], *options, group_sizes=(16, 16), gated=gated).to(DEVICE)


@pytest.fixture
def products(monkeypatch):
    """Return the shapes of grouped products, which are allowed on every device from four pairs an expert."""
    shapes = []
    monkeypatch.setattr(dispatch, "mode", "triton")
    monkeypatch.setattr(grouped_product, "product", lambda *args: shapes.append(args[1].shape) or looped_product(*args))
    monkeypatch.setattr(grouped_product, "MIN_PAIRS", 4)
    monkeypatch.setattr(grouped_product, "is_supported", lambda *_: True)
    monkeypatch.setattr(grouped_product, "never_waits", lambda _: True)
    return shapes


@pytest.mark.parametrize("codes", ["trellis", "affine"])
@pytest.mark.parametrize(
    ("dtype", "hidden", "inner", "gate"),
    [(FP16, 128, 16, silu_gate), (FP32, 48, 16, interleaved_gate), (FP32, 16, 32, None)],
)
def test_errors_are_those_of_the_reference(codes, dtype, hidden, inner, gate, products):
    generator = torch.Generator().manual_seed(0)
    module = packed_experts(codes, hidden, inner, gate, generator)
    x = torch.randn(40, hidden, generator=generator).to(DEVICE, dtype)
    index, weights = random_routing(40, 2, 4, generator, dtype, DEVICE)
    index[index == 2] = 9  # an expert without pairs, and slots of another rank
    x[-1], index[-1] = torch.nan, -1  # padding of vLLM
    with torch.no_grad():
        result = dispatch.experts_forward(module, x, index, weights)
        x[-1] = 0
        expected = reference.experts_forward(module, x, index, weights)
    assert products == [(4, inner if gate is None else 2 * inner, hidden), (4, hidden, inner)]
    assert not result[-1].any()
    assert_as_close(result, expected, exact_experts(module, x, index, weights))


@pytest.mark.parametrize("codes", ["trellis", "affine"])
def test_experts_in_host_memory_are_decoded_in_registers(codes, products, monkeypatch):
    """Their GPU memory is bounded, and a workspace is not counted."""
    generator = torch.Generator().manual_seed(0)
    module = packed_experts(codes, 16, 16, silu_gate, generator)
    module.fetch_table = None
    monkeypatch.setattr("gemq.kernels.fetch.fetch_codes", lambda index, *_: index)
    index, weights = random_routing(17, 1, 4, generator, FP16, DEVICE)
    with torch.no_grad():
        dispatch.experts_forward(module, torch.randn(17, 16).to(DEVICE, FP16), index, weights)
    assert not products


@pytest.mark.parametrize(
    ("tokens", "hidden", "up_rows", "dtype", "capability", "covered"),
    [
        (4096, 2048, 2048, torch.bfloat16, (9, 0), True),
        (4095, 2048, 2048, torch.bfloat16, (9, 0), False),  # fewer than 512 pairs an expert
        (4096, 2048, 16384, torch.bfloat16, (9, 0), False),  # more than 2 GiB
        (4096, 2048, 2048, FP16, (9, 0), False),
        (4096, 2048, 2048, torch.bfloat16, (8, 9), False),  # torch would wait for the GPU
        (4096, 2044, 2048, torch.bfloat16, (9, 0), False),
    ],
)
def test_what_decides(tokens, hidden, up_rows, dtype, capability, covered, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    class OnDevice:
        device, shape = torch.device("cuda", 0), (tokens, hidden)

        def __init__(self):
            self.dtype = dtype

    index = torch.zeros(tokens, 8, dtype=torch.int32)
    assert decoded_experts.covers(OnDevice(), index, 64, up_rows, GATE) == covered
    assert not decoded_experts.covers(torch.zeros(tokens, hidden, dtype=dtype), index, 64, up_rows, GATE)  # on a CPU
