"""Experts with trellis codes for a few tokens on a GPU, as operators of ``torch.library``.

Legend: T tokens, K experts per token, E experts, H hidden size, I intermediate size, S splits of a row.

As in ``kernels.decode.operators``, the operators take plain tensors and numbers, do not wait for the device and decide
nothing from values on it. A layer takes four launches: rotation of the tokens, gate and up, activation and rotation,
down. The sum over experts is left to torch.

Importing this module needs triton. With ``TRITON_INTERPRET=1`` set before, everything runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from gemq.kernels.activation import RAW, Activation, activation_of
from gemq.kernels.activation_triton import kernel_arguments
from gemq.kernels.decode import bit_fields, launch
from gemq.kernels.trellis.decode import rotate_kernel, rows_kernel
from gemq.kernels.trellis.tuning import RowsConfig, num_splits, rotation_blocks, rows_config
from gemq.quant.rotation import block_side
from gemq.runtime.compat import transformers_private

if TYPE_CHECKING:
    from gemq.kernels.modules import PackedExperts
    from gemq.kernels.trellis.experts import TrellisMatrices


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


def launch_rotation(y: Tensor, columns: int, activation: Activation = RAW) -> tuple[Tensor, Tensor]:
    """Add splits, apply an activation and rotate.

    Args:
        y: [X, S, columns], or [X, S, 2 * columns] if the activation is gated
        columns: columns of the result
        activation: applied to the sums

    Returns:
        The rotated vectors [X, columns] and the sums of their blocks [X, columns / side], float32.
    """
    vectors, splits = y.shape[:2]
    side = block_side(columns)
    blocks = min(rotation_blocks(side), triton.next_power_of_2(columns // side))
    out = torch.empty(vectors, columns, dtype=torch.float32, device=y.device)
    sums = torch.empty(vectors, columns // side, dtype=torch.float32, device=y.device)
    numbers, constants = kernel_arguments(activation)
    with launch.device_of(y):
        rotate_kernel[(vectors, triton.cdiv(columns // side, blocks))](
            y,
            out,
            sums,
            *numbers,
            **constants,
            COLUMNS=columns,
            SIDE=side,
            BLOCKS=blocks,
            SPLITS=splits,
            **_pdl_constants(y.device),
            num_warps=1,
        )
    return out, sums


def launch_rows(
    rotated: tuple[Tensor, Tensor],
    index: Tensor,
    weights: Tensor | None,
    w: TrellisArguments,
    dtype: torch.dtype,
    config: RowsConfig | None = None,
    splits: int | None = None,
) -> Tensor:
    """Multiply the chosen experts' matrices with rotated vectors.

    Args:
        rotated: from ``launch_rotation``, for each token or for each pair of token and expert
        index: [T, K] experts; indices outside 0 ... E - 1 mark unused slots
        weights: [T, K] routing weights, or None
        w: matrices
        dtype: of the activations: float32 is computed more exactly
        config: launch options, for benchmarks
        splits: programs that share a row, for benchmarks

    Returns:
        [T, K * S, rows] float32. Unused slots are zero with weights, and not written without.
    """
    x, sums = rotated
    tokens, slots = index.shape
    pairs = tokens * slots
    config = config or rows_config(tokens, slots, dtype)
    splits = splits or num_splits(pairs, w.rows, w.columns)
    out = torch.empty(tokens, slots * splits, w.rows, dtype=torch.float32, device=x.device)
    with launch.device_of(x):
        rows_kernel[(pairs, triton.cdiv(w.rows // 16, config.tile_rows), splits)](
            x,
            sums,
            index,
            x if weights is None else weights,
            w.codes,
            w.scales,
            w.table,
            x if w.bias is None else w.bias,
            out,
            pairs,
            w.rows,
            w.table.shape[0],
            TOP_K=slots,
            PER_PAIR=x.shape[0] == pairs and slots > 1,
            HAS_BIAS=w.bias is not None,
            WEIGHTED=weights is not None,
            PADDED_PAIRS=triton.next_power_of_2(pairs),
            COLUMNS=w.columns,
            SIDE=block_side(w.columns),
            SPLITS=splits,
            STATE_BITS=w.state_bits,
            N=config.pairs,
            R=config.tile_rows,
            J=config.tiles,
            FOLDED=config.folded,
            PORTABLE=launch.operand(x) == int(bit_fields.PORTABLE),
            PREFETCH=config.prefetch,
            **_pdl_constants(x.device, config.pdl),
            num_warps=config.num_warps,
        )
    return out


def _pdl_constants(device: torch.device, is_wanted: bool = True) -> dict[str, Any]:
    """Return the constant and the launch option for kernels that start while the previous one ends."""
    pdl = is_wanted and launch.supports_pdl(device)
    return {"PDL": pdl, "launch_pdl": True} if pdl else {"PDL": False}


@torch.library.custom_op("gemq::trellis_experts", mutates_args=())
def trellis_experts(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    up_tensors: Sequence[Tensor],
    up_sizes: Sequence[int],
    down_tensors: Sequence[Tensor],
    down_sizes: Sequence[int],
    activation: Sequence[float],
) -> Tensor:
    """Run the chosen experts of up to 16 tokens.

    Args:
        hidden: [T, H]
        index: [T, K] experts; indices outside 0 ... E - 1 mark unused slots
        weights: [T, K] routing weights
        up_tensors: ``TrellisArguments.tensors`` of gate and up, or of up alone
        up_sizes: ``TrellisArguments.sizes`` of these
        down_tensors: ``TrellisArguments.tensors`` of down
        down_sizes: ``TrellisArguments.sizes`` of down
        activation: the fields of an ``Activation``

    Returns:
        [T, K * S, H] float32: each slot's weighted output in S terms of a sum, zero in unused slots.
    """
    up = TrellisArguments.from_lists(up_tensors, up_sizes)
    down = TrellisArguments.from_lists(down_tensors, down_sizes)
    index, dtype = index.contiguous(), hidden.dtype
    rotated = launch_rotation(hidden.contiguous().unsqueeze(1), up.columns)
    y = launch_rows(rotated, index, None, up, dtype)
    y = y.view(index.numel(), -1, up.rows)
    rotated = launch_rotation(y, down.columns, Activation.from_numbers(activation))
    return launch_rows(rotated, index, weights.contiguous(), down, dtype)


@trellis_experts.register_fake
def _(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    up_tensors: Sequence[Tensor],
    up_sizes: Sequence[int],
    down_tensors: Sequence[Tensor],
    down_sizes: Sequence[int],
    activation: Sequence[float],
) -> Tensor:
    """Return the shape of ``trellis_experts``."""
    return _result_shape(hidden, index, TrellisArguments.from_lists(down_tensors, down_sizes))


@torch.library.custom_op("gemq::trellis_rows", mutates_args=())
def trellis_rows(
    x: Tensor, index: Tensor, weights: Tensor | None, tensors: Sequence[Tensor], sizes: Sequence[int]
) -> Tensor:
    """Compute one of the two products alone.

    Args:
        x: [T, columns], or [T, K, columns] with an input for each slot
        index: [T, K] experts
        weights: [T, K] routing weights, or None
        tensors: ``TrellisArguments.tensors``
        sizes: ``TrellisArguments.sizes``

    Returns:
        [T, K * S, rows] float32: terms of a sum for each slot. Unused slots are zero with weights, and not written
        without.
    """
    w = TrellisArguments.from_lists(tensors, sizes)
    rotated = launch_rotation(x.contiguous().view(-1, 1, w.columns), w.columns)
    return launch_rows(rotated, index.contiguous(), None if weights is None else weights.contiguous(), w, x.dtype)


@trellis_rows.register_fake
def _(x: Tensor, index: Tensor, weights: Tensor | None, tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return the shape of ``trellis_rows``."""
    return _result_shape(x, index, TrellisArguments.from_lists(tensors, sizes))


def _result_shape(x: Tensor, index: Tensor, w: TrellisArguments) -> Tensor:
    """Return an empty result of ``launch_rows``."""
    tokens, slots = index.shape
    splits = num_splits(tokens * slots, w.rows, w.columns)
    return x.new_empty(tokens, slots * splits, w.rows, dtype=torch.float32)


def _projections(module: PackedExperts) -> tuple[TrellisArguments, TrellisArguments]:
    """Return gate and up (or up alone), and down, each with its bias."""
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up_bias = getattr(module, f"{up_name}_bias") if module.has_bias else None
    down_bias = module.down_proj_bias if module.has_bias else None
    up = TrellisArguments.from_module(getattr(module, up_name), up_bias)
    return up, TrellisArguments.from_module(module.down_proj, down_bias)


def experts_forward(module: PackedExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As ``reference.experts_forward``, for 1 to 16 tokens in float16, bfloat16 or float32."""
    activation = activation_of(module)
    has_norm = getattr(module, "has_post_expert_norm", False)
    up, down = _projections(module)
    if activation is not None and not has_norm:
        tensors = (up.tensors, up.sizes, down.tensors, down.sizes)
        terms = trellis_experts(hidden, top_k_index, top_k_weights, *tensors, activation.numbers())
        return terms.sum(1).to(hidden.dtype)

    def sum_terms(terms: Tensor) -> Tensor:
        """Add the splits of each slot."""
        return terms.unflatten(1, (top_k_index.shape[1], -1)).sum(2).to(hidden.dtype)

    y = sum_terms(trellis_rows(hidden, top_k_index, None, up.tensors, up.sizes))
    y = transformers_private.expert_activation(module)(y).to(hidden.dtype)
    if not has_norm:
        return trellis_rows(y, top_k_index, top_k_weights, down.tensors, down.sizes).sum(1).to(hidden.dtype)
    y = module.post_expert_norm(sum_terms(trellis_rows(y, top_k_index, None, down.tensors, down.sizes)))
    y = (y * top_k_weights[..., None]).float()
    is_used = ((top_k_index >= 0) & (top_k_index < down.table.shape[0]))[..., None]
    return torch.where(is_used, y, 0.0).sum(1).to(hidden.dtype)
