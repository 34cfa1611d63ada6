"""Experts and linears for many tokens on a GPU, computed from packed weights.

Legend: T tokens, K experts per token, P = T K pairs (see ``routing``), H hidden size, I intermediate size.

Pairs are sorted by expert. The first product gathers their tokens and applies the gate. The second product writes each
pair's output to the pair's position in the input order. A token's pairs are then summed in a fixed order. The host
never waits for the GPU and no shape depends on data, so that a CUDA graph can capture all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from gemq.kernels.activation import RAW, Activation, activation_of
from gemq.kernels.expert_inputs import projections_with_bias
from gemq.kernels.grouped.dequantize import PackedWeights, dequantize
from gemq.kernels.grouped.matmul import TileConfig, config_for, matmul
from gemq.kernels.grouped.routing import combine, sort_pairs
from gemq.kernels.grouped.unpack import levels_mask, width_bit
from gemq.runtime.compat import transformers_private

if TYPE_CHECKING:
    from gemq.kernels.modules import PackedExperts, PackedLinear, PackedMatrices

LINEAR_DEQUANTIZE_ROWS = 512
"""From this many rows of x, a linear is dequantized once and multiplied by the vendor's kernel. The fused product
unpacks the weights again for each tile of rows, whereas writing them out costs a fixed time."""


def experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: PackedWeights,
    down: PackedWeights,
    activation: Activation,
    config: TileConfig | None = None,
) -> Tensor:
    """Run routed experts with an activation that the kernels support.

    Args:
        hidden: [T, H]
        top_k_index: [T, K]; indices outside 0 ... E - 1 mark unused slots and are skipped
        top_k_weights: [T, K]
        up: gate and up projections, or up alone
        down: down projections
        activation: applied between the products
        config: tile sizes, for benchmarks

    Returns:
        [T, H] in hidden's dtype.
    """
    num_experts = _num_experts(down)
    config = config or config_for(top_k_index.numel(), num_experts, hidden.dtype)
    routing = sort_pairs(top_k_index, num_experts, config.block_m)
    y = matmul(hidden, up, config, routing, top_k=top_k_index.shape[1], activation=activation)
    y = matmul(y, down, config, routing, scatter=True)
    return combine(y, top_k_index, top_k_weights, num_experts)


def linear_dequantized(x: Tensor, w: PackedWeights) -> Tensor:
    """As ``linear``, with a dense copy of the matrix that is freed on return."""
    weight = dequantize(w, x.shape[1], x.dtype)[0]
    return F.linear(x, weight, None if w.bias is None else w.bias.to(x.dtype))


def linear(x: Tensor, w: PackedWeights) -> Tensor:
    """Multiply x [T, columns] with one packed matrix and add its bias: [T, rows] in x's dtype."""
    if x.dtype == torch.float32 or x.shape[0] >= LINEAR_DEQUANTIZE_ROWS:
        return linear_dequantized(x, w)
    return matmul(x, w, config_for(x.shape[0], 1, x.dtype), None)


def _num_experts(w: PackedWeights) -> int:
    """Return the number of matrices in the table."""
    assert w.table is not None
    return w.table.shape[0]


def packed_experts(matrices: PackedMatrices, bias: Tensor | None) -> PackedWeights:
    """Return the tensors of one projection of all experts, and its bias [E, rows]."""
    return PackedWeights(
        matrices.codes,
        matrices.scales,
        matrices.offsets,
        matrices.table,
        bias,
        levels_mask(matrices.levels),
        matrices.rows,
        matrices.group_size,
    )


def packed_linear(module: PackedLinear) -> PackedWeights:
    """Return the tensors of a packed linear."""
    bias: Tensor | None = module.bias
    return PackedWeights(
        module.codes,
        module.scales,
        module.offsets,
        None,
        bias,
        width_bit(module.levels),
        module.out_features,
        module.group_size,
    )


def experts_forward(module: PackedExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As ``reference.experts_forward``, in float16, bfloat16 or float32. No gradients."""
    up, down = (packed_experts(matrices, bias) for matrices, bias in projections_with_bias(module))
    activation = activation_of(module)
    hidden = hidden.contiguous()
    has_norm = getattr(module, "has_post_expert_norm", False)  # absent before Transformers 5.23
    if activation is not None and not has_norm:
        return experts(hidden, top_k_index, top_k_weights, up, down, activation)

    num_experts = _num_experts(down)
    config = config_for(top_k_index.numel(), num_experts, hidden.dtype)
    routing = sort_pairs(top_k_index, num_experts, config.block_m)
    y = matmul(hidden, up, config, routing, top_k=top_k_index.shape[1], activation=activation or RAW)
    if activation is None:
        y = transformers_private.expert_activation(module)(y)
    y = matmul(y.contiguous(), down, config, routing, scatter=True)
    if has_norm:
        y = module.post_expert_norm(y)
    return combine(y, top_k_index, top_k_weights, num_experts)


def linear_forward(module: PackedLinear, x: Tensor) -> Tensor:
    """As ``reference.linear_forward``, in float16, bfloat16 or float32. No gradients."""
    y = linear(x.reshape(-1, x.shape[-1]).contiguous(), packed_linear(module))
    return y.view(*x.shape[:-1], -1)
