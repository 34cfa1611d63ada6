"""Trellis experts for many tokens, and dense decoding, against the reference and against float64.

Without a GPU they run in Triton's interpreter, which truncates bfloat16 instead of rounding it.
"""

from __future__ import annotations

from support.interpreted import DEVICE  # first: skips the module where triton is missing

# isort: split
import pytest
import torch

from gemq.kernels.activation import SILU, Activation
from gemq.kernels.trellis.dense import FlatCodes, trellis_weight
from gemq.kernels.trellis.dense_kernel import dense, scale_gradients
from gemq.kernels.trellis.grouped import experts
from gemq.kernels.trellis.matmul import TrellisWeights
from gemq.quant.trellis_matrix import TrellisMatrix
from gemq.quant.widths import TrellisWidth

torch.set_num_threads(1)
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MIXED = (1, 1.125, 2, 2.5, 3.875, 4)


def random_matrices(rows: int, columns: int, widths: tuple[float, ...], state_bits: int = 12) -> list[TrellisMatrix]:
    """Return matrices of random codes."""
    matrices = []
    for number in widths:
        width = TrellisWidth(int(8 * number))
        codes = torch.randint(0, 256, (rows // 16, columns // 4 * width.eighths), dtype=torch.uint8)
        scales = torch.randint(140, 160, (rows,), dtype=torch.uint8)
        matrices.append(TrellisMatrix(codes, scales, width, state_bits).map(lambda t: t.to(DEVICE)))
    return matrices


def flat_weights(matrices: list[TrellisMatrix], bias: torch.Tensor | None = None) -> TrellisWeights:
    flat, table = [], []
    for matrix in matrices:
        table.append([matrix.width.eighths, sum(map(len, flat)) // 16])
        codes = matrix.codes.flatten()
        flat.append(torch.cat([codes, codes.new_zeros(-len(codes) % 16)]))
    scales = torch.stack([matrix.scales for matrix in matrices])
    table = torch.tensor(table, device=DEVICE)
    return TrellisWeights(
        torch.cat(flat), scales, table, bias, scales.shape[1], matrices[0].columns, matrices[0].state_bits
    )


def routed(tokens: int, count: int, k: int, hidden: int, dtype: torch.dtype):
    """Return inputs with uneven routing. The first expert gets no token."""
    generator = torch.Generator().manual_seed(tokens)
    popularity = torch.linspace(0.2, 3, count)
    popularity[0] = 1e-9
    index = torch.multinomial(popularity.expand(tokens, -1), k, generator=generator)
    index[index == 0] = count  # unlikely to be drawn
    index[-1] = -1  # the mark of padding tokens in vLLM
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    weights = torch.rand(tokens, k, generator=generator)
    return x.to(DEVICE), index.to(DEVICE), weights.to(DEVICE)


def plain_experts(x, index, weights, up, down, activation, biases=(None, None)):
    """Compute experts one at a time from dequantized weights in x's dtype."""
    out = torch.zeros_like(x)
    for e, (up_matrix, down_matrix) in enumerate(zip(up, down, strict=True)):
        token, slot = torch.where(index == e)
        y = x[token] @ up_matrix.dequantize(FP32).to(x.dtype).T
        if biases[0] is not None:
            y = y + biases[0][e].to(x.dtype)
        y = activation(y) @ down_matrix.dequantize(FP32).to(x.dtype).T
        if biases[1] is not None:
            y = y + biases[1][e].to(x.dtype)
        out.index_add_(0, token, (y * weights[token, slot, None]).to(x.dtype))
    return out


def check(tokens, dtype, hidden, inner, activation, config=None, state_bits=12, bias=False):
    gated = 2 if activation.gated else 1
    up = random_matrices(gated * inner, hidden, MIXED, state_bits)
    down = random_matrices(hidden, inner, MIXED, state_bits)
    biases = (None, None)
    if bias:
        biases = tuple(torch.randn(len(MIXED), rows, device=DEVICE).to(dtype) for rows in (gated * inner, hidden))
    x, index, weights = routed(tokens, len(MIXED), 2, hidden, dtype)
    configs = None if config is None else (config, config)
    y = experts(x, index, weights, flat_weights(up, biases[0]), flat_weights(down, biases[1]), activation, configs)
    plain = plain_experts(x, index, weights, up, down, activation, biases)
    truth = plain_experts(x.double(), index, weights.double(), up, down, activation, biases)
    assert y.dtype == dtype
    error, plain_error = ((t.double() - truth).norm() / truth.norm() for t in (y, plain))
    slack = 5 if DEVICE == "cpu" and dtype == BF16 else 1.5
    print(f"{error:.2e} {plain_error:.2e}")
    assert error <= slack * plain_error + 1e-6, f"relative error {error:.2e}, reference {plain_error:.2e}"


SWIGLU = Activation(SILU, gated=True)


@pytest.mark.parametrize(
    ("tokens", "dtype"), [(17, BF16), (17, FP16), (17, FP32), (40, FP16), (120, FP16), (300, FP16)]
)
def test_mixed_widths(tokens, dtype):
    check(tokens, dtype, 128, 64, SWIGLU)


@pytest.mark.parametrize("state_bits", [8, 16])
def test_state_bits(state_bits):
    check(19, FP16, 64, 64, SWIGLU, state_bits=state_bits)


def test_sizes_that_fill_no_block():
    check(19, FP16, 48, 80, SWIGLU)


@pytest.mark.parametrize("columns", [128, 48])
@pytest.mark.parametrize("rotated", [True, False])
def test_dense_matrices_and_gradients_of_scales_equal_the_reference(columns, rotated):
    matrices = random_matrices(80, columns, MIXED)
    w = flat_weights(matrices)
    scales = torch.rand(len(MIXED), 80, device=DEVICE)
    unscaled = torch.stack([m.unscaled() if rotated else m.values() for m in matrices])
    tensors = (w.codes, w.table)
    values = dense(*tensors, None, 80, columns, 12, False, FP16)
    torch.testing.assert_close(values.float(), torch.stack([m.values() for m in matrices]), rtol=2**-10, atol=1e-5)
    weights = dense(*tensors, scales, 80, columns, 12, rotated, FP32)
    torch.testing.assert_close(weights, unscaled * scales[..., None], rtol=1e-5, atol=1e-5)
    gradient = torch.randn(unscaled.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = (gradient * unscaled).sum(-1)
    torch.testing.assert_close(scale_gradients(gradient, *tensors, 12, rotated), expected, rtol=1e-4, atol=1e-3)

    scales.requires_grad_()
    weights = trellis_weight(FlatCodes(*tensors, columns, 12), scales, rotated)
    torch.testing.assert_close(weights.detach(), unscaled * scales.detach()[..., None], rtol=1e-5, atol=1e-5)
    weights.backward(gradient)
    torch.testing.assert_close(scales.grad, expected, rtol=1e-4, atol=1e-3)
