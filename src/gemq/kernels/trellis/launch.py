"""Launches of the kernels in ``trellis.decode`` on tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from gemq.kernels.activation import RAW, Activation
from gemq.kernels.activation_triton import kernel_arguments
from gemq.kernels.decode import bit_fields, launch
from gemq.kernels.trellis.decode import rotate_kernel, rows_kernel
from gemq.kernels.trellis.tuning import PRODUCT, ProductConfig, num_splits
from gemq.quant.rotation import block_side

if TYPE_CHECKING:
    from gemq.kernels.modules import PackedExperts
    from gemq.kernels.trellis.experts import TrellisMatrices

_checked_kernels: set[str] = set()
"""Hashes of compiled kernels that have passed ``_check_layout``."""


class TrellisArguments(NamedTuple):
    """One projection of all experts as operators take it: ``tensors`` and ``sizes``.

    Attributes:
        codes: uint8
        scales: [E, rows] uint8
        table: [E, 2] int32
        bias: [E, rows], or None
        rows: rows of each matrix
        columns: columns of each matrix
        state_bits: bits of a state
    """

    codes: Tensor
    scales: Tensor
    table: Tensor
    bias: Tensor | None
    rows: int
    columns: int
    state_bits: int

    @classmethod
    def from_module(cls, matrices: TrellisMatrices, bias: Tensor | None) -> TrellisArguments:
        """Return the matrices of a module with the bias [E, rows] of the projection."""
        tensors = (matrices.codes, matrices.scales, matrices.table, bias)
        return cls(*tensors, matrices.rows, matrices.columns, matrices.state_bits)

    @classmethod
    def from_experts(cls, module: PackedExperts) -> tuple[TrellisArguments, TrellisArguments]:
        """Return gate and up (or up alone), and down, each with its bias."""
        up_name = "gate_up_proj" if module.has_gate else "up_proj"
        up_bias = getattr(module, f"{up_name}_bias") if module.has_bias else None
        down_bias = module.down_proj_bias if module.has_bias else None
        up = cls.from_module(getattr(module, up_name), up_bias)
        return up, cls.from_module(module.down_proj, down_bias)

    @classmethod
    def from_lists(cls, tensors: Sequence[Tensor], sizes: Sequence[int]) -> TrellisArguments:
        """Restore the matrices from ``tensors`` and ``sizes``."""
        codes, scales, table = tensors[:3]
        return cls(codes, scales, table, tensors[3] if len(tensors) > 3 else None, *sizes)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors as an operator's argument. The bias is absent if there is none."""
        tensors = [self.codes, self.scales, self.table]
        return tensors if self.bias is None else [*tensors, self.bias]

    @property
    def sizes(self) -> list[int]:
        """The integers as an operator's argument."""
        return [self.rows, self.columns, self.state_bits]


class RotatedVectors(NamedTuple):
    """Inputs of ``launch_rows``.

    Attributes:
        values: [terms, X, C] float16; the vectors are the sum of the terms times ``factors``
        factors: [X] float32
        sums: [X, C / side] float32, of the blocks of the first term
    """

    values: Tensor
    factors: Tensor
    sums: Tensor


def launch_rotation(
    y: Tensor, columns: int, dtype: torch.dtype, activation: Activation = RAW, pdl: bool = True
) -> RotatedVectors:
    """Add splits, apply an activation and rotate.

    Args:
        y: [X, S, columns], or [X, S, 2 * columns] if the activation is gated
        columns: columns of the result
        dtype: of the activations: float32 takes two terms of float16
        activation: applied to the sums
        pdl: whether the kernel may start while the previous one ends, on GPUs that support this
    """
    vectors, splits = y.shape[:2]
    side = block_side(columns)
    terms = 2 if dtype == torch.float32 else 1
    values = torch.empty(terms, vectors, columns, dtype=torch.float16, device=y.device)
    factors = torch.empty(vectors, dtype=torch.float32, device=y.device)
    sums = torch.empty(vectors, columns // side, dtype=torch.float32, device=y.device)
    numbers, constants = kernel_arguments(activation)
    with launch.device_of(y):
        rotate_kernel[(vectors,)](
            y,
            values,
            factors,
            sums,
            vectors,
            *numbers,
            **constants,
            COLUMNS=columns,
            SIDE=side,
            SPLITS=splits,
            TERMS=terms,
            **_pdl_constants(y.device, pdl),
            num_warps=4 if columns <= 4096 else 16,
        )
    return RotatedVectors(values, factors, sums)


def launch_rows(
    x: RotatedVectors,
    index: Tensor,
    weights: Tensor | None,
    w: TrellisArguments,
    config: ProductConfig | None = None,
    splits: int | None = None,
) -> Tensor:
    """Multiply the chosen experts' matrices with rotated vectors.

    Args:
        x: a vector for each token, or for each pair of token and expert
        index: [T, K] experts; indices outside 0 ... E - 1 mark unused slots
        weights: [T, K] routing weights, or None
        w: matrices
        config: launch options, for benchmarks
        splits: programs that share a row, for benchmarks

    Returns:
        [T, K * S, rows] float32. Unused slots are zero with weights, and not written without.
    """
    tokens, slots = index.shape
    pairs = tokens * slots
    terms, vectors, _ = x.values.shape
    config = config or PRODUCT
    splits = splits or num_splits(pairs, w.rows, w.columns)
    out = torch.empty(tokens, slots * splits, w.rows, dtype=torch.float32, device=index.device)
    with launch.device_of(out):
        kernel = rows_kernel[(pairs, triton.cdiv(w.rows // 16, config.tile_rows), splits)](
            *x,
            index,
            out if weights is None else weights,
            w.codes,
            w.scales,
            w.table,
            out if w.bias is None else w.bias,
            out,
            vectors,
            pairs,
            w.rows,
            w.table.shape[0],
            TOP_K=slots,
            PER_PAIR=vectors == pairs and slots > 1,
            HAS_BIAS=w.bias is not None,
            WEIGHTED=weights is not None,
            PADDED_PAIRS=1 if tokens == 1 else triton.next_power_of_2(pairs),
            COLUMNS=w.columns,
            SIDE=block_side(w.columns),
            SPLITS=splits,
            STATE_BITS=w.state_bits,
            R=config.tile_rows,
            J=config.steps,
            TERMS=terms,
            CENTERED=config.centered or terms > 1,
            PORTABLE=launch.operand(out) == int(bit_fields.PORTABLE),
            PREFETCH=config.prefetch,
            **_pdl_constants(out.device, config.pdl),
            num_warps=config.num_warps,
        )
    check_layout(kernel)
    return out


def _pdl_constants(device: torch.device, is_wanted: bool = True) -> dict[str, Any]:
    """Return the constant and the launch option for kernels that start while the previous one ends."""
    pdl = is_wanted and launch.supports_pdl(device)
    return {"PDL": pdl, "launch_pdl": True} if pdl else {"PDL": False}


def check_layout(kernel: Any) -> None:
    """Check that element i of the first axis lies in thread i of a warp, as the assembly in ``fragments`` expects.

    Triton does not guarantee this layout, but has used it so far.

    Raises:
        RuntimeError: if the layout differs
    """
    if kernel is None or kernel.hash in _checked_kernels:  # the interpreter returns None
        return
    text = kernel.asm["ttgir"]
    for name in set(re.findall(r"elementwise_inline_asm .*mma\.sync.* -> tensor<32x\d+x\d+xf32, (#\w+)>", text)):
        layout = re.search(rf"^{name} = (.*)$", text, re.MULTILINE)
        assert layout, name
        is_blocked = "threadsPerWarp = [32, 1, 1]" in layout[1]
        is_linear = "lane = [[1, 0, 0], [2, 0, 0], [4, 0, 0], [8, 0, 0], [16, 0, 0]]" in layout[1]
        if not is_blocked and not is_linear:
            raise RuntimeError(
                f"Triton {triton.__version__} distributes weights to threads in an order that gemq's kernels do not "
                "support: set GEMQ_KERNELS=reference, or install triton 3.6"
            )
    _checked_kernels.add(kernel.hash)
