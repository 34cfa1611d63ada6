"""Random packed matrices and experts for tests of kernels, and their exact outputs in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gemq.kernels.modules import PackedExperts, PackedLinear, PackedMatrices
from gemq.quant.grid import Quantized
from gemq.quant.packing import PackedMatrix
from gemq.quant.widths import Width


def random_matrix(rows: int, columns: int, width: Width, group_size: int, generator: torch.Generator) -> PackedMatrix:
    """Return a matrix with every code value. Weights spread by about 0.3 around a random offset in each group."""
    codes = torch.randint(0, width.levels, (rows, columns), generator=generator).to(torch.uint8)
    shape = (rows, columns // group_size)
    scales = (torch.rand(shape, generator=generator) + 0.5) / width.levels
    offsets = -scales * width.max_code * (0.2 + 0.6 * torch.rand(shape, generator=generator))
    return PackedMatrix.pack(Quantized(codes, scales, offsets), width)


def random_matrices(
    rows: int, columns: int, widths: Sequence[Width], group_size: int, generator: torch.Generator
) -> PackedMatrices:
    """Return the same projection of several experts."""
    matrices = [random_matrix(rows, columns, width, group_size, generator) for width in widths]
    return PackedMatrices(matrices)


def random_linear(
    rows: int, columns: int, width: Width, group_size: int, generator: torch.Generator, bias: bool = False
) -> PackedLinear:
    """Return a packed linear, optionally with a random bias."""
    linear = nn.Linear(columns, rows, bias=bias, device="meta")
    if bias:
        linear.bias = nn.Parameter(torch.randn(rows, generator=generator))
    return PackedLinear.from_linear(linear, random_matrix(rows, columns, width, group_size, generator))


class Experts(PackedExperts):
    """Packed experts with an arbitrary activation ``gate``: [..., rows] -> [..., inner]."""

    def __init__(
        self,
        hidden: int,
        inner: int,
        widths: Sequence[Width],
        generator: torch.Generator,
        gate: Callable[[Tensor], Tensor] | None = None,
        group_sizes: tuple[int, int] = (32, 32),
        bias: bool = False,
        gated: bool = True,
    ) -> None:
        super().__init__()
        self.has_gate, self.has_bias, self.has_post_expert_norm = gated, bias, False
        rows = 2 * inner if gated else inner
        name = "gate_up_proj" if gated else "up_proj"
        setattr(self, name, random_matrices(rows, hidden, widths, group_sizes[0], generator))
        self.down_proj = random_matrices(hidden, inner, widths[::-1], group_sizes[1], generator)
        if bias:
            setattr(self, f"{name}_bias", nn.Parameter(torch.randn(len(widths), rows, generator=generator)))
            self.down_proj_bias = nn.Parameter(torch.randn(len(widths), hidden, generator=generator))
        self._gate = gate or silu_gate
        self.act_fn = self._gate

    def _apply_gate(self, y: Tensor) -> Tensor:
        return self._gate(y)


def silu_gate(y: Tensor) -> Tensor:
    """Apply the SwiGLU activation."""
    gate, up = y.chunk(2, -1)
    return nn.functional.silu(gate) * up


def random_routing(
    tokens: int, slots: int, experts: int, generator: torch.Generator, dtype: torch.dtype, device: Any
) -> tuple[Tensor, Tensor]:
    """Return distinct experts for each token, and weights."""
    index = torch.stack([torch.randperm(experts, generator=generator)[:slots] for _ in range(tokens)])
    return index.to(device), torch.rand(tokens, slots, generator=generator).to(device, dtype)


def exact_experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return the experts' output in float64 without intermediate rounding. Only unpacking is shared with kernels."""
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    matrices = getattr(module, up_name)
    bias = getattr(module, f"{up_name}_bias") if module.has_bias else None
    out = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for t in range(hidden.shape[0]):
        for k in range(index.shape[1]):
            e = int(index[t, k])
            if not 0 <= e < matrices.num_experts:
                continue
            y = matrices.dequantize(e, torch.float64) @ hidden[t].double()
            if bias is not None:
                y = y + bias[e].double()
            y = module.down_proj.dequantize(e, torch.float64) @ module._apply_gate(y)
            if module.has_bias:
                y = y + module.down_proj_bias[e].double()
            if module.has_post_expert_norm:
                y = module.post_expert_norm(y)
            out[t] += weights[t, k].double() * y
    return out


def assert_as_close(result: Tensor, reference: Tensor, truth: Tensor) -> None:
    """Check that the error of ``result`` is at most a small multiple of the reference's error (its rounding noise)."""
    assert result.dtype == reference.dtype
    assert result.shape == reference.shape
    noise = (reference.double() - truth).abs().max()
    floor = torch.finfo(result.dtype).eps * truth.abs().max()
    assert (result.double() - truth).abs().max() <= 16 * (noise + floor)


def few_programs(rows: int, groups: int, matrices: int, dtype: torch.dtype, block_rows: int = 64) -> Any:
    """Replacement of ``launch.tensor_core_config``. A program's time in the interpreter hardly depends on its tiles."""
    from gemq.kernels.decode.tuning import TensorCoreConfig  # triton may be missing

    return TensorCoreConfig(block_rows, min(8, 1 << (groups - 1).bit_length()), 4)
