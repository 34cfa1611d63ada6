"""Random experts with trellis codes for tests of kernels. Widths are in eighths of a bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gemq.kernels.trellis.experts import TrellisMatrices
from gemq.quant.grid import encode_scales
from gemq.quant.trellis_matrix import TrellisMatrix
from gemq.quant.widths import TrellisWidth, Width
from support.packed_cases import Experts, silu_gate


def random_trellis(
    rows: int, columns: int, widths: Sequence[int], state_bits: int, generator: torch.Generator
) -> TrellisMatrices:
    """Return the same projection of several experts. A product with a unit Gaussian has a variance of about one."""
    matrices = []
    for eighths in widths:
        shape = (rows // 16, columns // 16 * 4 * eighths)
        codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        scales = encode_scales((0.5 + torch.rand(rows, generator=generator)) * columns**-0.5)
        matrices.append(TrellisMatrix(codes, scales, TrellisWidth(eighths), state_bits))
    return TrellisMatrices(matrices)


class TrellisExperts(Experts):
    """Experts with random trellis codes and an arbitrary activation ``gate``: [..., rows] -> [..., inner]."""

    def __init__(
        self,
        hidden: int,
        inner: int,
        widths: Sequence[int],
        state_bits: int,
        generator: torch.Generator,
        gate: Callable[[Tensor], Tensor] = silu_gate,
        bias: bool = False,
        gated: bool = True,
    ) -> None:
        super().__init__(16, 16, (Width.TWO_BIT,), generator, gate, (16, 16), False, gated)
        rows = 2 * inner if gated else inner
        name = "gate_up_proj" if gated else "up_proj"
        setattr(self, name, random_trellis(rows, hidden, widths, state_bits, generator))
        self.down_proj = random_trellis(hidden, inner, widths[::-1], state_bits, generator)
        self.has_bias = bias
        if bias:
            setattr(self, f"{name}_bias", nn.Parameter(torch.randn(len(widths), rows, generator=generator)))
            self.down_proj_bias = nn.Parameter(torch.randn(len(widths), hidden, generator=generator))
