"""Experts and linears for many tokens, from packed weights, on a GPU.

Legend: T tokens, K experts per token, P = T K pairs (see ``routing``), H hidden size, I intermediate size.

Experts: pairs are sorted by expert, the first product gathers their tokens and applies the gate, the second writes
where the pairs came from, and a token's pairs are summed in fixed order. Nothing waits for the GPU, no shape depends
on data, so that a CUDA graph can capture it. The last two functions know modules, the others plain tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from gemq.kernels.activation import RAW, Activation, activation_of
from gemq.kernels.grouped.dequantize import dequantize, levels_mask, width_bit
from gemq.kernels.grouped.matmul import Config, Packed, config_for, matmul
from gemq.kernels.grouped.routing import combine, sort_pairs
from gemq.quant.widths import LEVELS

if TYPE_CHECKING:
    from gemq.kernels.modules import PackedExperts, PackedLinear, PackedMatrices

LINEAR_DEQUANTIZE_ROWS = 512
"""From so many rows of x a linear is dequantized once and left to the vendor's matrix product: unpacking in the
product costs time for each tile of rows, writing the weights out costs it once."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    first: Packed,
    down: Packed,
    activation: Activation,
    config: Config | None = None,
) -> Tensor:
    """hidden [T, H], top_k_index [T, K], top_k_weights [T, K] -> [T, H] in hidden's dtype.

    Indices outside 0 ... E - 1 mark unused slots and are skipped. ``config`` is for benchmarks.
    """
    count = _count(down)
    config = config or config_for(top_k_index.numel(), count, hidden.dtype)
    routing = sort_pairs(top_k_index, count, config.block_m)
    y = matmul(hidden, first, config, routing, top_k=top_k_index.shape[1], activation=activation)
    y = matmul(y, down, config, routing, scatter=True)
    return combine(y, top_k_index, top_k_weights, count)


def linear_dequantized(x: Tensor, w: Packed) -> Tensor:
    """``linear`` through a dense copy of the matrix, which lives until this returns."""
    weight = dequantize(*w[:4], w.widths, w.rows, x.shape[1], w.group_size, x.dtype)[0]
    return F.linear(x, weight, None if w.bias is None else w.bias.to(x.dtype))


def linear(x: Tensor, w: Packed) -> Tensor:
    """x [T, columns] times one packed matrix, plus its bias: [T, rows] in x's dtype."""
    if x.dtype == torch.float32 or x.shape[0] >= LINEAR_DEQUANTIZE_ROWS:
        return linear_dequantized(x, w)
    return matmul(x, w, config_for(x.shape[0], 1, x.dtype), None)


def _count(w: Packed) -> int:
    assert w.table is not None
    return w.table.shape[0]


def packed_experts(matrices: PackedMatrices, bias: Tensor | None) -> Packed:
    mask = levels_mask(LEVELS[width] for width in set(matrices.widths))
    tensors = (matrices.codes, matrices.scales, matrices.offsets, matrices.table)
    return Packed(*tensors, bias, mask, matrices.rows, matrices.group_size)


def packed_linear(module: PackedLinear) -> Packed:
    bias: Tensor | None = module._parameters["bias"]
    mask = width_bit(LEVELS[module.width])
    return Packed(module.codes, module.scales, module.offsets, None, bias, mask, module.out_features, module.group_size)


def experts_forward(module: PackedExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As ``reference.experts_forward``, for hidden in DTYPES. No gradients."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    first = packed_experts(getattr(module, name), getattr(module, f"{name}_bias") if module.has_bias else None)
    down = packed_experts(module.down_proj, module.down_proj_bias if module.has_bias else None)
    activation = activation_of(module)
    hidden = hidden.contiguous()
    normed = getattr(module, "has_post_expert_norm", False)  # absent before Transformers 5.23
    if activation is not None and not normed:
        return experts(hidden, top_k_index, top_k_weights, first, down, activation)

    count, k = _count(down), top_k_index.shape[1]
    config = config_for(top_k_index.numel(), count, hidden.dtype)
    routing = sort_pairs(top_k_index, count, config.block_m)
    y = matmul(hidden, first, config, routing, top_k=k, activation=activation or RAW)
    if activation is None:
        y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = matmul(y.contiguous(), down, config, routing, scatter=True)
    if normed:
        y = module.post_expert_norm(y)
    return combine(y, top_k_index, top_k_weights, count)


def linear_forward(module: PackedLinear, x: Tensor) -> Tensor:
    """As ``reference.linear_forward``, for x in DTYPES. No gradients."""
    y = linear(x.reshape(-1, x.shape[-1]).contiguous(), packed_linear(module))
    return y.view(*x.shape[:-1], -1)
