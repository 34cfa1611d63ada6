"""Kernels for many tokens against the reference and against float64.

Without a GPU they run in Triton's interpreter, which truncates bfloat16 instead of rounding it.
"""

from __future__ import annotations

from support.interpreted import DEVICE  # first: skips the module where triton is missing

# isort: split
import pytest
import torch
from torch import nn

from gemq.kernels import reference
from gemq.kernels.activation import CLAMP_BEFORE, GELU, GELU_TANH, RELU_SQUARED, SILU, Activation, activation_of
from gemq.kernels.grouped import operators
from gemq.kernels.grouped.dequantize import dequantize
from gemq.kernels.grouped.routing import combine, sort_pairs
from gemq.kernels.modules import PackedExperts, PackedLinear, PackedMatrices, make_packed
from gemq.kernels.training.differentiable_dequantize import KernelCodes, TorchCodes
from gemq.models.structure import find_structure
from gemq.quant.grid import Quantized
from gemq.quant.packing import PackedMatrix
from gemq.quant.widths import Width, group_size_for
from support.families import TOY, tiny

torch.set_num_threads(1)
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MIXED = (*Width, Width.TWO_BIT)


def random_matrix(rows: int, columns: int, width: Width, group: int) -> PackedMatrix:
    codes = torch.randint(0, width.levels, (rows, columns), dtype=torch.uint8)
    scales = (0.5 + torch.rand(rows, columns // group)) / width.levels
    offsets = -0.5 + 0.2 * torch.randn(rows, columns // group)
    return PackedMatrix.pack(Quantized(codes, scales, offsets), width).map(lambda t: t.to(DEVICE))


def random_matrices(rows: int, columns: int, widths: tuple[Width, ...], group: int) -> PackedMatrices:
    return PackedMatrices([random_matrix(rows, columns, w, group) for w in widths])


class Experts(PackedExperts):
    """SwiGLU experts without options. Tests change the attributes that they test."""

    has_gate, has_bias = True, False

    def __init__(self, hidden: int, inner: int, widths: tuple[Width, ...], group: int, down_group: int = 0):
        super().__init__()
        self.act_fn = nn.SiLU()
        self.gate_up_proj = random_matrices(2 * inner, hidden, widths, group)
        self.down_proj = random_matrices(hidden, inner, widths, down_group or group)

    def _apply_gate(self, y: torch.Tensor) -> torch.Tensor:
        gate, up = y.chunk(2, dim=-1)
        return self.act_fn(gate) * up


def routed(tokens: int, experts: int, k: int, hidden: int, dtype: torch.dtype, seed: int = 0):
    """Return inputs with uneven routing. The first expert gets no token."""
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.linspace(0.2, 3, experts)
    popularity[0] = 1e-9
    index = torch.multinomial(popularity.expand(tokens, -1), k, generator=generator)
    index[index == 0] = experts  # unlikely to be drawn
    unused = torch.tensor([-1, experts + 1, 2**31 - 1, -(2**31)])  # -1 marks padding tokens in vLLM
    index[-1] = unused.repeat(k)[:k]
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    weights = torch.rand(tokens, k, generator=generator)
    return x.to(DEVICE), index.to(DEVICE), weights.to(DEVICE)


def assert_close_to_truth(module, x, index, weights):
    """Check that errors against float64 are at most a small multiple of the reference's."""
    with torch.no_grad():
        y = operators.experts_forward(module, x, index, weights)
        plain = reference.experts_forward(module, x, index, weights)
        truth = reference.experts_forward(module, x.double(), index, weights.double())
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert_errors(y, plain, truth)


def assert_errors(y, plain, truth):
    """Check that the relative error of y is at most a small multiple of the error of ``plain``."""
    error, plain_error = ((t.double() - truth).norm() / truth.norm() for t in (y, plain))
    slack = 5 if DEVICE == "cpu" and y.dtype == BF16 else 1.5
    assert error <= slack * plain_error + 1e-6, f"relative error {error:.2e}, reference {plain_error:.2e}"


@pytest.mark.parametrize("group", [16, 64, 256])
def test_dequantize_equals_the_reference(group):
    matrices = random_matrices(9, 2 * group, MIXED, group)
    for dtype in (FP32, FP16):
        dense = dequantize(operators.packed_experts(matrices, None), 2 * group, dtype)
        for e in range(len(MIXED)):
            expected = matrices.dequantize(e, dtype)
            if dtype == FP32:
                assert torch.equal(dense[e], expected)
            else:  # the last bits before rounding may differ
                torch.testing.assert_close(dense[e], expected, rtol=2**-10, atol=1e-5)


@pytest.mark.parametrize("group", [16, 256])
def test_weights_and_gradients_of_grids_equal_the_reference(group):
    matrices = random_matrices(70, 2 * group, MIXED, group)
    packed = [matrices.matrix(e) for e in range(len(MIXED))]
    torch_codes, kernel_codes = TorchCodes(packed), KernelCodes(packed)
    grids = [matrix.grids() for matrix in packed]
    scales, offsets = (torch.stack(tensors) for tensors in zip(*grids, strict=True))
    expected = torch_codes.weights(scales, offsets, FP32)
    assert torch.equal(kernel_codes.weights(scales, offsets, FP32), expected)
    rounded = kernel_codes.weights(scales, offsets, FP16)
    torch.testing.assert_close(rounded.float(), expected, rtol=2**-10, atol=1e-4)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected_gradients = torch_codes.grid_gradients(gradient)
    for result, expected_gradient in zip(kernel_codes.grid_gradients(gradient), expected_gradients, strict=True):
        torch.testing.assert_close(result, expected_gradient, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize(
    ("tokens", "k", "experts", "block"), [(1, 1, 1, 16), (17, 3, 5, 16), (40, 2, 130, 32), (1100, 4, 6, 16)]
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pairs_are_sorted_by_expert(tokens, k, experts, block, dtype):
    generator = torch.Generator().manual_seed(tokens)
    index = torch.randint(0, experts + 2, (tokens, k), generator=generator, dtype=dtype)
    index[index == experts // 2] = experts  # an expert without pairs, and unused slots
    padding = torch.rand(tokens, generator=generator) < 0.3
    index[padding] = -1
    routing = sort_pairs(index.to(DEVICE), experts, block)
    flat = index.flatten()
    flat[flat < 0] = experts
    counts = torch.bincount(flat, minlength=experts)[:experts]
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    assert routing.starts.tolist() == starts.tolist()
    used = int(starts[-1])
    assert routing.order[:used].tolist() == flat.argsort(stable=True)[:used].tolist()
    expected = [-1] * (-(-tokens * k // block) + experts)
    for e, count in enumerate(counts.tolist()):
        for tile in range(-(-count // block)):
            expected[int(starts[e]) // block + e + tile] = e
    assert routing.tiles.tolist() == expected


def test_combine_leaves_out_unused_slots():
    index = torch.tensor([[0, 5], [9, 5], [1, 0], [-1, -1]], device=DEVICE)
    y = torch.randn(8, 40, device=DEVICE)
    weights = torch.rand(4, 2, device=DEVICE)
    expected = y.view(4, 2, 40) * weights[..., None] * ((index >= 0) & (index < 5))[..., None]
    y[[1, 2, 3, 6, 7]] = torch.nan  # unwritten memory may hold NaN
    torch.testing.assert_close(combine(y, index, weights, 5), expected.sum(1))


@pytest.mark.parametrize("width", Width)
def test_one_width(width):
    module = Experts(128, 64, (width,) * 4, 32)
    assert_close_to_truth(module, *routed(17, 4, 2, 128, FP16, seed=int(10 * width.value)))


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [*((tokens, dtype) for tokens in (17, 33, 300) for dtype in (FP16, BF16)), (17, FP32), (60, FP32)],
)
def test_mixed_widths(tokens, dtype):
    """Every tile configuration of 16-bit floats. In float32, which has one, experts with one tile and with two."""
    module = Experts(128, 64, MIXED, 64)
    assert_close_to_truth(module, *routed(tokens, 7, 3 if tokens < 300 else 1, 128, dtype, seed=tokens))


@pytest.mark.parametrize("group", [16, 64, 256])
def test_group_sizes_and_odd_rows(group):
    """80 inner rows do not fill a tile. The group sizes of the two products differ."""
    hidden = max(group, 64)
    module = Experts(hidden, 80, MIXED, group, down_group=16)
    assert_close_to_truth(module, *routed(19, 7, 2, hidden, FP16, seed=group))


def test_every_expert_crowded_and_most_empty():
    x, _, weights = routed(70, 7, 1, 64, FP16)
    module = Experts(64, 64, MIXED, 64)
    assert_close_to_truth(module, x, torch.full((70, 1), 3, device=DEVICE), weights)
    for unused in (7, -1):
        index = torch.full((70, 1), unused, device=DEVICE)
        assert torch.equal(operators.experts_forward(module, x, index, weights), torch.zeros_like(x))


def test_results_do_not_change_between_runs_or_with_strides():
    module = Experts(64, 64, MIXED, 64)
    x, index, weights = routed(40, 7, 2, 64, FP16)
    y = operators.experts_forward(module, x, index, weights)
    wide = torch.randn(40, 128, device=DEVICE).half()
    wide[:, ::2] = x
    assert torch.equal(operators.experts_forward(module, wide[:, ::2], index.T.contiguous().T, weights), y)


def packed_family(family: str) -> PackedExperts:
    """Return an experts module of a real family, with random packed projections of mixed widths."""
    model = tiny(family)
    _, layer = find_structure(model).moe_layers[0]
    module = model.get_submodule(layer.experts.path)
    make_packed(module, [matrix.name for matrix in layer.experts.matrices])
    for matrix in layer.experts.matrices:
        group = group_size_for(matrix.columns, 64)
        widths = MIXED[: layer.experts.count]
        setattr(module, matrix.name, random_matrices(matrix.rows, matrix.columns, widths, group))
    return module.to(DEVICE)


@pytest.mark.parametrize(
    ("family", "activation"),
    [
        ("mixtral", Activation(SILU, gated=True)),
        (TOY, Activation(GELU, gated=True)),
        ("gpt_oss", Activation(SILU, True, True, CLAMP_BEFORE, limit=7.0, alpha=1.702, shift=1.0)),
        ("nemotron_h", Activation(RELU_SQUARED, gated=False)),
    ],
)
def test_families(family, activation):
    """Activations, clamps, row orders and biases of real families."""
    module = packed_family(family)
    assert activation_of(module) == activation
    x, index, weights = routed(20, module.down_proj.num_experts, 2, 64, FP32)
    assert_close_to_truth(module, 3 * x, index, weights)


def test_an_unknown_activation_is_applied_by_the_module():
    class SineGate(Experts):
        def _apply_gate(self, y):
            gate, up = y.chunk(2, dim=-1)
            return torch.sin(gate) * up

    module = SineGate(64, 32, MIXED, 32)
    assert activation_of(module) is None
    assert_close_to_truth(module, *routed(20, 7, 2, 64, FP16))


def test_a_norm_after_the_experts_and_an_approximate_gelu():
    module = Experts(64, 32, MIXED, 32)
    module.act_fn = nn.GELU(approximate="tanh")
    module.has_post_expert_norm = True
    module.post_expert_norm = nn.RMSNorm(64, dtype=FP16, device=DEVICE)
    nn.init.uniform_(module.post_expert_norm.weight)
    assert activation_of(module) == Activation(GELU_TANH, gated=True)
    assert_close_to_truth(module, *routed(20, 7, 2, 64, FP16))


@pytest.mark.parametrize("width", Width)
@pytest.mark.parametrize(
    ("dtype", "tokens"), [(FP32, 17), (FP16, 33), (BF16, 17), (FP16, operators.LINEAR_DEQUANTIZE_ROWS)]
)
def test_linears(width, dtype, tokens):
    linear = nn.Linear(128, 50, bias=width != 4, device=DEVICE)
    module = PackedLinear.from_linear(linear, random_matrix(50, 128, width, 64))
    x = torch.randn(1, tokens, 128, device=DEVICE).to(dtype)
    with torch.no_grad():
        y, plain, truth = operators.linear_forward(module, x), module(x), reference.linear_forward(module, x.double())
    assert y.dtype == dtype
    assert y.shape == (1, tokens, 50)
    assert_errors(y, plain, truth)
