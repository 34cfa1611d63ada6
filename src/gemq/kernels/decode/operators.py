"""A few tokens through packed weights on a GPU: the operators, and modules taken apart for them.

Legend: T tokens, K experts a token, E experts, H hidden size, I intermediate size.

The operators take plain tensors and numbers, never modules; they do not wait for the device and decide
nothing from values on it, so that CUDA graphs and torch.compile take them as they are. Two launches do the
experts of a layer: gate and up of every chosen expert with the activation, then down; the sum over experts is left to
torch, since a compiler merges it with the residual connection's.
Importing this needs triton; with ``TRITON_INTERPRET=1`` set before, all of it runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemq.kernels.activation import RAW, Activation, activation_of
from gemq.kernels.decode.launch import Linears, Matrices, launch_down, launch_linears, launch_up, parts_of, widths_for
from gemq.quant.widths import LEVELS

if TYPE_CHECKING:
    from gemq.kernels.modules import PackedExperts, PackedLinear, PackedMatrices


@torch.library.custom_op("gemq::decode_experts", mutates_args=())
def decode_experts(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    up_codes: Tensor,
    up_scales: Tensor,
    up_offsets: Tensor,
    up_table: Tensor,
    up_bias: Tensor | None,
    down_codes: Tensor,
    down_scales: Tensor,
    down_offsets: Tensor,
    down_table: Tensor,
    down_bias: Tensor | None,
    up_rows: int,
    up_group_size: int,
    up_levels: Sequence[int],
    down_group_size: int,
    down_levels: Sequence[int],
    function: int,
    gated: bool,
    interleaved: bool,
    clamp: int,
    limit: float,
    alpha: float,
    shift: float,
) -> Tensor:
    """[T, H] with T up to 16, [T, K], [T, K] -> [T, K * P, H] float32: each expert's share, weighted, zeros if none, in
    P parts (``launch.parts_of``) that are to be added up.

    codes, scales, offsets, table: as in ``packed.PackedMatrices``; levels: those of the experts' widths
    function ... shift: an ``activation.Activation``
    """
    up = Matrices(up_codes, up_scales, up_offsets, up_table, up_bias, up_rows, up_group_size, up_levels)
    rows = hidden.shape[1]
    down = Matrices(down_codes, down_scales, down_offsets, down_table, down_bias, rows, down_group_size, down_levels)
    activation = Activation(function, gated, interleaved, clamp, limit, alpha, shift)
    index = index.contiguous()
    h = launch_up(hidden.contiguous(), index, up, activation)
    return launch_down(h, index, weights.contiguous(), down)


@decode_experts.register_fake
def _(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    *arguments: Any,
) -> Tensor:
    up_rows, _, _, group_size, levels, _, gated = arguments[10:17]
    parts = parts_of(hidden.dtype, up_rows // 2 if gated else up_rows, group_size, levels)
    return hidden.new_empty(index.shape[0], index.shape[1] * parts, hidden.shape[1], dtype=torch.float32)


@torch.library.custom_op("gemq::decode_up", mutates_args=())
def decode_up(
    hidden: Tensor,
    index: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor,
    table: Tensor,
    bias: Tensor | None,
    rows: int,
    group_size: int,
    levels: Sequence[int],
) -> Tensor:
    """[T, H], [T, K] -> [T, K, rows]: the first product alone. Unused slots are not written."""
    up = Matrices(codes, scales, offsets, table, bias, rows, group_size, levels)
    return launch_up(hidden.contiguous(), index.contiguous(), up, RAW)


@decode_up.register_fake
def _(
    hidden: Tensor,
    index: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor,
    table: Tensor,
    bias: Tensor | None,
    rows: int,
    *_: object,
) -> Tensor:
    return hidden.new_empty(*index.shape, rows)


@torch.library.custom_op("gemq::decode_down", mutates_args=())
def decode_down(
    h: Tensor,
    index: Tensor,
    weights: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor,
    table: Tensor,
    bias: Tensor | None,
    rows: int,
    group_size: int,
    levels: Sequence[int],
) -> Tensor:
    """[T, K, I] -> [T, K, rows] in h's dtype without weights; with them as ``decode_experts``."""
    down = Matrices(codes, scales, offsets, table, bias, rows, group_size, levels)
    return launch_down(h.contiguous(), index.contiguous(), None if weights is None else weights.contiguous(), down)


@decode_down.register_fake
def _(
    h: Tensor,
    index: Tensor,
    weights: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor,
    table: Tensor,
    bias: Tensor | None,
    rows: int,
    group_size: int,
    levels: Sequence[int],
) -> Tensor:
    if weights is None:
        return h.new_empty(*index.shape, rows)
    parts = parts_of(h.dtype, h.shape[2], group_size, levels)
    return h.new_empty(index.shape[0], index.shape[1] * parts, rows, dtype=torch.float32)


@torch.library.custom_op("gemq::decode_linears", mutates_args=())
def decode_linears(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    offsets: Sequence[Tensor],
    biases: Sequence[Tensor],
    levels: int,
    group_size: int,
) -> Tensor:
    """[T, columns] with T up to 16 -> [T, rows of all], of one to three matrices of the same columns and width.

    codes, scales, offsets: as in ``packed.PackedLinear``; biases: as many, or none
    """
    return launch_linears(x.contiguous(), Linears(codes, scales, offsets, biases, levels, group_size))


@decode_linears.register_fake
def _(x: Tensor, codes: Sequence[Tensor], *_: object) -> Tensor:
    return x.new_empty(x.shape[0], sum(one.shape[0] for one in codes))


def _tensors(matrices: PackedMatrices) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return matrices.codes, matrices.scales, matrices.offsets, matrices.table


def _projections(module: PackedExperts) -> tuple[PackedMatrices, Tensor | None, PackedMatrices, Tensor | None]:
    """Gate and up, or up alone, and down, each with its bias."""
    first, down = module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj
    if not module.has_bias:
        return first, None, down, None
    return first, module.gate_up_proj_bias if module.has_gate else module.up_proj_bias, down, module.down_proj_bias


def expert_shares(module: PackedExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor | None:
    """What ``experts_forward`` adds up, [T, S, H] float32; None of experts with a norm or an unusual activation."""
    activation = activation_of(module)
    if activation is None or getattr(module, "has_post_expert_norm", False):
        return None
    first, first_bias, down, down_bias = _projections(module)
    levels, down_levels = widths_for(first.levels, first.group_size), widths_for(down.levels, down.group_size)
    sizes = (first.rows, first.group_size, levels, down.group_size, down_levels)
    arguments = (*_tensors(first), first_bias, *_tensors(down), down_bias, *sizes, *activation)
    return decode_experts(hidden, top_k_index, top_k_weights, *arguments)


def experts_forward(module: PackedExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As ``reference.experts_forward``, for 1 to 16 tokens in float16, bfloat16 or float32."""
    shares = expert_shares(module, hidden, top_k_index, top_k_weights)
    if shares is not None:
        return shares.sum(1).to(hidden.dtype)
    first, first_bias, down, down_bias = _projections(module)
    up_arguments = (*_tensors(first), first_bias)
    down_arguments = (*_tensors(down), down_bias)
    y = decode_up(hidden, top_k_index, *up_arguments, first.rows, first.group_size, first.levels)
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = y.to(hidden.dtype)
    down_sizes = (down.rows, down.group_size, down.levels)
    if not getattr(module, "has_post_expert_norm", False):
        return decode_down(y, top_k_index, top_k_weights, *down_arguments, *down_sizes).sum(1).to(hidden.dtype)
    y = module.post_expert_norm(decode_down(y, top_k_index, None, *down_arguments, *down_sizes))
    y = (y * top_k_weights[..., None]).float()
    used = ((top_k_index >= 0) & (top_k_index < down.num_experts))[..., None]
    return torch.where(used, y, 0.0).sum(1).to(hidden.dtype)


def linear_forward(module: PackedLinear, x: Tensor) -> Tensor:
    """As ``reference.linear_forward``, for 1 to 16 rows of x."""
    tensors = ([module.codes], [module.scales], [module.offsets], [] if module.bias is None else [module.bias])
    y = decode_linears(x.reshape(-1, module.in_features), *tensors, LEVELS[module.width], module.group_size)
    return y.view(*x.shape[:-1], module.out_features)
