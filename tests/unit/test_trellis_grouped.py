"""Trellis experts for many tokens, and dense decoding: in Triton's interpreter, or on a GPU (marker gpu).

The interpreter truncates bfloat16 instead of rounding it.
"""

from __future__ import annotations

from support.interpreted import DEVICE  # first: skips the module where triton is missing

# isort: split
import pytest
import torch
from torch import nn

from gemq.kernels import dispatch, reference
from gemq.kernels.activation import activation_of
from gemq.kernels.trellis import grouped
from gemq.kernels.trellis.dense import dequantize_expert, trellis_weight
from gemq.kernels.trellis.dense_kernel import dense, scale_gradients
from gemq.kernels.trellis.launch import TrellisArguments
from support.packed_cases import exact_experts, random_routing, silu_gate
from support.trellis_cases import TrellisExperts, random_trellis

torch.set_num_threads(1)
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDTHS = (8, 9, 20, 31, 32)


@pytest.fixture
def generator(monkeypatch):
    monkeypatch.setattr(dispatch, "mode", "triton")
    return torch.Generator().manual_seed(0)


def clamped_gate(y):
    """Apply an activation of interleaved rows."""
    gate, up = y[..., ::2].clamp(max=1.5), y[..., 1::2].clamp(-1.5, 1.5)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def routed_inputs(module, tokens, slots, dtype, generator):
    """Return inputs with marks of padding tokens in vLLM, and of dropped tokens in families."""
    count = module.down_proj.num_experts
    hidden = torch.randn(tokens, module.down_proj.rows, generator=generator).to(DEVICE, dtype)
    index, weights = random_routing(tokens, slots, count, generator, dtype, DEVICE)
    index[-1], index[0, 0] = -1, count + 3
    return hidden, index, weights


def check_experts(module, tokens, slots, dtype, generator):
    """Check that errors against float64 are at most a small multiple of the reference's."""
    module = module.to(DEVICE)
    inputs = routed_inputs(module, tokens, slots, dtype, generator)
    with torch.no_grad():
        result = dispatch.experts_forward(module, *inputs)
        expected = reference.experts_forward(module, *inputs)
    truth = exact_experts(module, *inputs)
    assert result.dtype == dtype
    error, plain_error = ((y.double() - truth).norm() / truth.norm() for y in (result, expected))
    slack = 6 if DEVICE == "cpu" and dtype == BF16 else 1.5
    assert error <= slack * plain_error + 1e-6, f"relative error {error:.2e}, reference {plain_error:.2e}"


@pytest.mark.parametrize(
    ("tokens", "dtype", "hidden", "inner", "gate", "state_bits"),
    [
        (17, BF16, 128, 64, silu_gate, 12),
        (19, FP16, 48, 80, clamped_gate, 16),
        (18, FP32, 64, 32, None, 8),
        (120, FP16, 64, 64, silu_gate, 12),
    ],
)
def test_experts_of_mixed_widths(tokens, dtype, hidden, inner, gate, state_bits, generator):
    """Each kind of tile, and sizes that fill no block."""
    gated = gate is not None
    module = TrellisExperts(hidden, inner, WIDTHS, state_bits, generator, gate or torch.relu, gated, gated)
    if gate is clamped_gate:
        module.limit = 1.5
    check_experts(module, tokens, 2, dtype, generator)


def test_an_unknown_activation_and_a_norm(generator):
    module = TrellisExperts(32, 16, (8, 20), 12, generator, lambda y: y.chunk(2, -1)[0])
    module.has_post_expert_norm, module.post_expert_norm = True, nn.RMSNorm(32)
    check_experts(module, 17, 1, FP32, generator)


def test_gradients_of_hidden_states_weights_and_biases(generator):
    module = TrellisExperts(32, 32, (9, 20), 12, generator, bias=True).to(DEVICE)
    inputs = routed_inputs(module, 17, 1, FP32, generator)
    gradients = []
    for forward in (dispatch.experts_forward, reference.experts_forward):
        hidden, weights = (x.clone().requires_grad_() for x in (inputs[0], inputs[2]))
        forward(module, hidden, inputs[1], weights).square().sum().backward()
        gradients.append([hidden.grad, weights.grad, module.down_proj_bias.grad])
        module.zero_grad()
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_operator_traces(generator):
    module = TrellisExperts(32, 32, (8, 20), 12, generator).to(DEVICE)
    up, down = TrellisArguments.from_experts(module)
    tensors = (up.tensors, up.sizes, down.tensors, down.sizes)
    arguments = (*routed_inputs(module, 17, 1, FP32, generator), *tensors, activation_of(module).numbers())
    torch.library.opcheck(grouped.grouped_experts, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_graph_follows_the_routing(generator):
    module = TrellisExperts(256, 128, (16, 24, 9, 30), 12, generator).cuda()
    hidden, index, weights = routed_inputs(module, 100, 2, BF16, generator)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        dispatch.experts_forward(module, hidden, index, weights)
        with torch.cuda.graph(graph):
            result = dispatch.experts_forward(module, hidden, index, weights)
        index.copy_(index.flip(0))
        graph.replay()
        assert torch.equal(result, dispatch.experts_forward(module, hidden, index, weights))


@pytest.mark.parametrize("columns", [128, 48])
def test_dense_matrices_and_gradients_of_scales(columns, generator):
    packed = random_trellis(48, columns, WIDTHS, 12, generator).to(DEVICE)
    scales = torch.rand(len(WIDTHS), 48, generator=generator).to(DEVICE)
    unscaled = torch.stack([packed.matrix(expert).unscaled() for expert in range(len(WIDTHS))])
    expected = unscaled * scales[..., None]
    weights = dense(packed.codes, packed.table, scales, 48, columns, 12, FP32)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-5)
    gradient = torch.randn(unscaled.shape, generator=generator).to(DEVICE)
    expected_gradient = (gradient * unscaled).sum(-1)
    gradients = scale_gradients(gradient, packed.codes, packed.table, 12)
    torch.testing.assert_close(gradients, expected_gradient, rtol=1e-4, atol=1e-3)

    scales.requires_grad_()
    weights = trellis_weight(packed, scales)
    torch.testing.assert_close(weights.detach(), expected, rtol=1e-5, atol=1e-5)
    weights.backward(gradient)
    torch.testing.assert_close(scales.grad, expected_gradient, rtol=1e-4, atol=1e-3)


def test_one_expert_is_dequantized_as_the_module_does(generator):
    packed = random_trellis(16, 32, WIDTHS, 12, generator).to(DEVICE)
    for expert in (2, 4):
        weights = dequantize_expert(packed, expert, FP16)
        torch.testing.assert_close(weights, packed.dequantize(expert, FP16), rtol=2**-10, atol=1e-5)
