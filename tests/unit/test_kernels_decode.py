"""Kernels for a few tokens against the reference and float64: in Triton's interpreter, or on a GPU (marker gpu)."""

from __future__ import annotations

from support.interpreted import DEVICE  # first: skips the module where triton is missing

# isort: split

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gemq.kernels import dispatch, reference
from gemq.kernels.activation import activation_of
from gemq.kernels.decode.linear_fusion import merge_linears
from gemq.quant.widths import Width
from support.packed_cases import (
    Experts,
    assert_as_close,
    exact_experts,
    few_programs,
    random_linear,
    random_routing,
    silu_gate,
)

pytest.importorskip("triton")
from gemq.kernels.decode import launch, operators, tuning

torch.set_num_threads(1)
WIDTHS = tuple(Width)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("kernels run on the GPU where there is one, else in the interpreter")
    monkeypatch.setattr(dispatch, "mode", "triton")
    if request.param == "cpu":  # a program costs the interpreter about as much however large its tiles are
        monkeypatch.setattr(launch, "tensor_core_config", few_programs)
        monkeypatch.setattr(launch, "vector_config", lambda *_, pdl=True, **__: tuning.VectorConfig(64, 4, pdl=pdl))
        monkeypatch.setattr(launch, "linear_vector_config", lambda tokens: tuning.VectorConfig(64, 4))
    return request.param


@pytest.fixture
def generator(request):
    """Random inputs that differ in every run. The seed is printed if a test fails."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def check_experts(module, tokens, slots, dtype, device, generator, unused=False):
    """Compare the kernels with the reference and float64 on random inputs. Returns the inputs."""
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
    return hidden, index, weights


@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
@pytest.mark.parametrize("width", WIDTHS)
def test_linear_of_each_width(width, group_size, device, generator):
    """Group counts that fill blocks or not, rows that are not a multiple of a block, one token and several."""
    variant = WIDTHS.index(width) + group_size
    dtype, tokens = DTYPES[variant % 3], (1, 9)[variant // 16 % 2]
    linear = random_linear(37, group_size * (4, 5, 3)[variant % 3], width, group_size, generator, bias=variant % 2 == 0)
    linear.to(device)
    x = torch.randn(tokens, linear.in_features, generator=generator).to(device, dtype)
    with torch.no_grad():
        result, expected = dispatch.linear_forward(linear, x), reference.linear_forward(linear, x)
    truth = F.linear(x.double(), linear.dequantize(torch.float64))
    assert_as_close(result, expected, truth if linear.bias is None else truth + linear.bias.double())


def test_linear_takes_any_leading_dimensions(device, generator):
    linear = random_linear(40, 64, Width.FOUR_BIT, 64, generator).to(device)
    x = torch.randn(2, 3, 64, generator=generator).to(device)
    y = dispatch.linear_forward(linear, x)
    assert y.shape == (2, 3, 40)
    torch.testing.assert_close(y, reference.linear_forward(linear, x), rtol=1e-5, atol=1e-4)
    transposed = torch.randn(64, 5, generator=generator).to(device).T
    torch.testing.assert_close(
        dispatch.linear_forward(linear, transposed), reference.linear_forward(linear, transposed), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(
    ("tokens", "slots", "dtype", "unused"),
    [
        (1, 3, torch.bfloat16, False),
        (1, 2, torch.float32, True),
        (3, 2, torch.float16, True),
        (16, 2, torch.float32, False),
        (9, 3, torch.bfloat16, True),
    ],
)
def test_experts_of_mixed_widths(tokens, slots, dtype, unused, device, generator):
    module = Experts(128, 96, WIDTHS, generator, group_sizes=(128, 32))
    check_experts(module, tokens, slots, dtype, device, generator, unused)


def test_many_blocks_and_the_real_configuration(device, generator, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "mode", "triton")
    module = Experts(80, 48, (Width.TERNARY, Width.THREE_BIT), generator, group_sizes=(16, 16))
    check_experts(module, 2, 1, torch.float32, device, generator)


def test_an_expert_in_two_slots_of_a_token(device, generator):
    module = Experts(32, 16, (Width.TWO_BIT, Width.THREE_BIT), generator, group_sizes=(32, 16)).to(device)
    hidden = torch.randn(2, 32, generator=generator).to(device)
    index = torch.tensor([[1, 1], [0, 1]], device=device)
    weights = torch.rand(2, 2, generator=generator).to(device)
    result = dispatch.experts_forward(module, hidden, index, weights)
    torch.testing.assert_close(result.double(), exact_experts(module, hidden, index, weights), rtol=1e-5, atol=1e-4)


def clamped_swiglu(y, interleaved=True, limit=1.5, alpha=1.702):
    """Apply the activation of gpt_oss."""
    gate, up = (y[..., ::2], y[..., 1::2]) if interleaved else y.chunk(2, -1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def clamped_after(y):
    """Apply SwiGLU with clamps after SiLU."""
    gate, up = y.chunk(2, -1)
    return F.silu(gate).clamp(max=1.25) * up.clamp(-1.25, 1.25)


def halves(act):
    """Return a gate that applies ``act`` to its first half."""
    return lambda y: act(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1]


GATES = {
    "silu": silu_gate,
    "gelu": halves(F.gelu),
    "gelu_tanh": halves(lambda x: F.gelu(x, approximate="tanh")),
    "quick_gelu": halves(lambda x: x * torch.sigmoid(1.702 * x)),
    "relu": halves(F.relu),
    "clamped_swiglu": clamped_swiglu,
    "clamped_after": clamped_after,
    "unknown": halves(torch.sin),
}


@pytest.mark.parametrize("name", GATES)
def test_gates(name, device, generator):
    module = Experts(32, 16, (Width.FOUR_BIT, Width.EIGHT_BIT), generator, GATES[name], group_sizes=(32, 16), bias=True)
    module.limit, module.alpha = (1.25 if name == "clamped_after" else 1.5), 1.702
    check_experts(module, 2, 1, torch.float32, device, generator)
    assert (activation_of(module) is None) == (name == "unknown")


@pytest.mark.parametrize("act", [lambda x: F.relu(x).square(), torch.tanh])
def test_experts_without_a_gate(act, device, generator):
    module = Experts(32, 16, (Width.TWO_BIT, Width.ONE_BIT), generator, act, group_sizes=(32, 16), gated=False)
    check_experts(module, 3, 2, torch.bfloat16, device, generator)


def test_norm_after_each_expert(device, generator):
    module = Experts(32, 16, (Width.TWO_BIT, Width.THREE_BIT), generator, group_sizes=(32, 16))
    module.has_post_expert_norm = True
    module.post_expert_norm = lambda y: y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
    check_experts(module, 3, 2, torch.float32, device, generator, unused=True)


def test_families_activations_are_recognized():
    """The activations of all families in the tests are recognized, without their names."""
    from gemq.kernels.activation import _recognize
    from gemq.models.structure import find_structure
    from support.families import FAMILIES, tiny

    for family in FAMILIES:
        model = tiny(family)
        _, layer = find_structure(model).moe_layers[0]
        module = model.get_submodule(layer.experts.path)
        module.down_proj.codes = torch.empty(0)  # replaces a packed projection: only its device is read
        activation = _recognize(module)
        assert activation is not None, family
        y = torch.randn(3, 64) * 5
        expected = module._apply_gate(y) if module.has_gate else module.act_fn(y)
        torch.testing.assert_close(activation(y), expected)


def test_learned_activation_is_left_to_the_module(generator):
    module = Experts(32, 32, (Width.TWO_BIT,), generator)
    module.act_fn = nn.PReLU()
    assert activation_of(module) is None


def test_gradients_equal_the_references(device, generator):
    module = Experts(32, 16, (Width.TWO_BIT, Width.TERNARY), generator, group_sizes=(32, 16), bias=True).to(device)
    linear = random_linear(32, 32, Width.FOUR_BIT, 32, generator, bias=True).to(device)
    hidden = torch.randn(3, 32, generator=generator).to(device)
    index, weights = random_routing(3, 2, 2, generator, torch.float32, device)
    gradients = []
    for call in (dispatch, reference):
        x, w = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        parameters = [*module.parameters(), *linear.parameters()]
        y = call.linear_forward(linear, call.experts_forward(module, x, index, w))
        gradients.append(torch.autograd.grad(y.square().sum(), [x, w, *parameters]))
    for result, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-3)
    for p in module.parameters():
        p.requires_grad_(False)
    assert not dispatch.experts_forward(module, hidden, index, weights).requires_grad


def test_operators_trace(device, generator):
    """Fake implementations and schemas are correct, and a compiled module has no graph break."""
    module = Experts(32, 16, (Width.TWO_BIT, Width.THREE_BIT), generator, group_sizes=(32, 16)).to(device)
    linear = random_linear(32, 32, Width.FOUR_BIT, 32, generator).to(device)
    hidden = torch.randn(2, 32, generator=generator).to(device)
    index, weights = random_routing(2, 1, 2, generator, torch.float32, device)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        operators.decode_linears,
        (hidden, [linear.codes], [linear.scales], [linear.offsets], [], 16, 32),
        test_utils=tests,
    )
    up, down = operators._projections(module, share_kernels=True)
    h = torch.randn(2, 1, 16, generator=generator).to(device)
    for routing_weights in (weights, None):
        arguments = (h, index, routing_weights, down.tensors, down.sizes)
        torch.library.opcheck(operators.decode_down, arguments, test_utils=tests)
    torch.library.opcheck(operators.decode_up, (hidden, index, up.tensors, up.sizes), test_utils=tests)
    numbers = activation_of(module).numbers()
    arguments = (hidden, index, weights, up.tensors, up.sizes, down.tensors, down.sizes, numbers)
    torch.library.opcheck(operators.decode_experts, arguments, test_utils=tests)

    def layer(x):
        return linear(module(x, index, weights))

    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(hidden), layer(hidden))


def test_a_cpu_takes_the_reference(generator, monkeypatch):
    monkeypatch.setattr(dispatch, "mode", "")
    monkeypatch.setattr(dispatch, "_load", lambda name: pytest.fail("loaded a kernel"))
    linear = random_linear(8, 32, Width.TWO_BIT, 32, generator)
    x = torch.randn(1, 32, generator=generator)
    assert torch.equal(dispatch.linear_forward(linear, x), reference.linear_forward(linear, x))


def test_fallbacks_are_counted_and_warned_about_once(device, generator, monkeypatch):
    monkeypatch.setattr(dispatch, "fallbacks", type(dispatch.fallbacks)())
    linear = random_linear(8, 32, Width.TWO_BIT, 32, generator).to(device)
    x = torch.randn(3, 32, generator=generator).to(device).double()
    with pytest.warns(UserWarning, match="float64"):
        dispatch.linear_forward(linear, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(dispatch.linear_forward(linear, x), reference.linear_forward(linear, x))
    assert list(dispatch.fallbacks.values()) == [2]


def test_no_tokens(device, generator):
    module = Experts(32, 16, (Width.TWO_BIT,), generator, group_sizes=(32, 16)).to(device)
    empty = torch.empty(0, 1, device=device)
    assert dispatch.experts_forward(module, torch.empty(0, 32, device=device), empty.long(), empty).shape == (0, 32)


def test_environment_forces_the_reference():
    code = """
import importlib, os, torch, gemq.kernels.dispatch as k
for mode in ("reference", "triton"):
    os.environ["GEMQ_KERNELS"] = mode
    importlib.reload(k)
    print(k.mode, k._choose(torch.ones(1, 1), 1).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "reference gemq.kernels.reference\ntriton gemq.kernels.decode.operators\n"


def test_linears_of_one_launch(device, generator):
    """Rows that do not fill a block, with and without biases, one row of x and several."""
    for tokens, bias, dtype in ((1, True, torch.bfloat16), (3, False, torch.float16), (9, True, torch.float32)):
        linears = [
            random_linear(rows, 256, Width.FOUR_BIT, 64, generator, bias=bias).to(device) for rows in (70, 20, 33)
        ]
        x = torch.randn(tokens, 256, generator=generator).to(device, dtype)
        tensors = [[getattr(linear, name) for linear in linears] for name in ("codes", "scales", "offsets")]
        biases = [linear.bias for linear in linears] if bias else []
        for count in (2, 3):
            result = operators.decode_linears(x, *(t[:count] for t in tensors), biases[:count], 16, 64)
            expected = [reference.linear_forward(linear, x) for linear in linears[:count]]
            truth = [linear.dequantize(torch.float64) @ x.double().T for linear in linears[:count]]
            truth = [
                y.T if linear.bias is None else y.T + linear.bias.double()
                for y, linear in zip(truth, linears, strict=False)
            ]
            assert_as_close(result, torch.cat(expected, 1), torch.cat(truth, 1))


def test_rows_that_several_programs_share(device, generator):
    """Mixtral's down projection has 112 groups. All splits of an unused slot are zero, and a bias is added once."""
    module = Experts(32, 35 * 16, (Width.TWO_BIT, Width.FOUR_BIT), generator, group_sizes=(32, 16), bias=True)
    check_experts(module, 2, 2, torch.bfloat16, device, generator, unused=True)
    assert tuning.down_splits(torch.bfloat16, 35 * 16, 16, [4]) == 3
    assert tuning.down_splits(torch.float32, 35 * 16, 16, [4]) == 1


def test_a_row_of_many_groups_in_one_program(device, generator):
    linear = random_linear(20, 70 * 32, Width.TWO_BIT, 32, generator).to(device)
    x = torch.randn(1, 70 * 32, generator=generator).to(device, torch.bfloat16)
    truth = F.linear(x.double(), linear.dequantize(torch.float64))
    assert_as_close(dispatch.linear_forward(linear, x), reference.linear_forward(linear, x), truth)


@pytest.mark.parametrize("bias", [True, False])
def test_linears_of_one_input_are_merged_when_compiled(bias, generator, monkeypatch):
    """Three linears of one input become one launch. Others keep their own, for another width or another input."""
    monkeypatch.setattr(dispatch, "mode", "triton")
    widths, rows = (
        (Width.FOUR_BIT, Width.FOUR_BIT, Width.FOUR_BIT, Width.EIGHT_BIT, Width.FOUR_BIT),
        (32, 16, 16, 16, 128),
    )
    linears = (random_linear(n, 128, w, 64, generator, bias) for n, w in zip(rows, widths, strict=True))
    q, k, v, wide, out = (linear.to(DEVICE) for linear in linears)
    counts = []

    def backend(graph, inputs):
        counts.append((merge_linears(graph), sum("decode_linears" in str(node.target) for node in graph.graph.nodes)))
        return graph.forward

    def layer(x):
        mixed = torch.cat([q(x) * 2, k(x), v(x), wide(x), x[..., :48]], -1)
        return out(mixed)

    x = torch.randn(1, 2, 128, generator=generator).to(DEVICE)
    with torch.no_grad():
        expected = layer(x)  # also runs the lazy imports, which cannot be traced
        torch.testing.assert_close(torch.compile(layer, backend=backend, fullgraph=True)(x), expected)
    assert counts == [(2, 3)]


def test_layers_that_mix_other_widths_share_a_kernel():
    assert tuning.widths_for([2, 4], 128) == tuning.widths_for([3, 8], 128) == [2, 3, 4, 8]
    assert tuning.widths_for([4, 16], 128) == [2, 3, 4, 8, 16]
    assert tuning.widths_for([4], 128) == [4]
    assert tuning.widths_for([4, 2], 64) == [2, 4]


@pytest.mark.parametrize("width", WIDTHS)
def test_one_vector_of_16_bit_floats(width, device, generator):
    """Every width in groups of 128, the size that models have, with few and many groups."""
    for groups, dtype in ((4, torch.bfloat16), (16, torch.float16)):
        linear = random_linear(40, groups * 128, width, 128, generator).to(device)
        assert tuning.vectors_cover(dtype, groups * 128, 128, [width.levels])
        x = torch.randn(1, groups * 128, generator=generator).to(device, dtype)
        result, expected = dispatch.linear_forward(linear, x), reference.linear_forward(linear, x)
        assert_as_close(result, expected, F.linear(x.double(), linear.dequantize(torch.float64)))
