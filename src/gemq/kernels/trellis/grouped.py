"""Experts with trellis codes for many tokens on a GPU.

Legend: T tokens, K experts per token, P = T K pairs (see ``kernels.grouped.routing``), H hidden size, I intermediate
size.

As ``kernels.grouped.operators``, with two rotations more: that of a token before gate and up, once for all of its
experts, and that of a pair before down. The host never waits for the GPU and no shape depends on data, so that a CUDA
graph can capture all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemq.kernels.activation import RAW, Activation, activation_of
from gemq.kernels.decode.launch import device_of
from gemq.kernels.grouped.routing import Routing, combine, sort_pairs
from gemq.kernels.trellis.launch import TrellisArguments
from gemq.kernels.trellis.matmul import TileConfig, config_for, matmul, padded_columns
from gemq.kernels.trellis.rotation import rotate_operand
from gemq.runtime.compat import transformers_private

if TYPE_CHECKING:
    from gemq.kernels.modules import PackedExperts


def product(
    x: Tensor,
    w: TrellisArguments,
    config: TileConfig,
    routing: Routing,
    top_k: int = 0,
    scatter: bool = False,
    activation: Activation = RAW,
) -> Tensor:
    """Rotate x and multiply all pairs with their expert's matrix. Arguments as for ``matmul``, x [.., columns]."""
    rotated = rotate_operand(x, padded_columns(w.columns, config))
    return matmul(rotated, w, config, routing, top_k, scatter, activation)


def experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: TrellisArguments,
    down: TrellisArguments,
    activation: Activation,
    configs: tuple[TileConfig, TileConfig] | None = None,
) -> Tensor:
    """Run routed experts with an activation that the kernels support.

    Args:
        hidden: [T, H]
        top_k_index: [T, K]; indices outside 0 ... E - 1 mark unused slots and are skipped
        top_k_weights: [T, K]
        up: gate and up projections, or up alone
        down: down projections
        activation: applied between the products
        configs: tile sizes of both products with equal ``block_m``, for benchmarks

    Returns:
        [T, H] in hidden's dtype.
    """
    num_experts = down.table.shape[0]
    config = config_for(top_k_index.numel(), num_experts, hidden.dtype)
    up_config, down_config = configs or (config, config)
    routing = sort_pairs(top_k_index, num_experts, up_config.block_m)
    y = product(hidden, up, up_config, routing, top_k=top_k_index.shape[1], activation=activation)
    y = product(y, down, down_config, routing, scatter=True)
    return combine(y, top_k_index, top_k_weights, num_experts)


@torch.library.custom_op("gemq::trellis_grouped_experts", mutates_args=())
def grouped_experts(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    up_tensors: Sequence[Tensor],
    up_sizes: Sequence[int],
    down_tensors: Sequence[Tensor],
    down_sizes: Sequence[int],
    activation: Sequence[float],
) -> Tensor:
    """Run ``experts`` as an operator.

    Args:
        hidden: [T, H]
        index: [T, K] experts
        weights: [T, K] routing weights
        up_tensors: ``TrellisArguments.tensors`` of gate and up, or of up alone
        up_sizes: ``TrellisArguments.sizes`` of these
        down_tensors: ``TrellisArguments.tensors`` of down
        down_sizes: ``TrellisArguments.sizes`` of down
        activation: the fields of an ``Activation``

    Returns:
        [T, H] in hidden's dtype.
    """
    up = TrellisArguments.from_lists(up_tensors, up_sizes)
    down = TrellisArguments.from_lists(down_tensors, down_sizes)
    with device_of(hidden):
        return experts(hidden.contiguous(), index, weights, up, down, Activation.from_numbers(activation))


@grouped_experts.register_fake
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
    """Return the shape of ``grouped_experts``."""
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def experts_forward(module: PackedExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As ``reference.experts_forward``, in float16, bfloat16 or float32. No gradients."""
    up, down = TrellisArguments.from_experts(module)
    activation = activation_of(module)
    has_norm = getattr(module, "has_post_expert_norm", False)  # absent before Transformers 5.23
    if activation is not None and not has_norm:
        lists = (up.tensors, up.sizes, down.tensors, down.sizes, activation.numbers())
        return grouped_experts(hidden, top_k_index, top_k_weights, *lists)

    num_experts, top_k = down.table.shape[0], top_k_index.shape[1]
    config = config_for(top_k_index.numel(), num_experts, hidden.dtype)
    with device_of(hidden):
        routing = sort_pairs(top_k_index, num_experts, config.block_m)
        y = product(hidden.contiguous(), up, config, routing, top_k=top_k, activation=activation or RAW)
        if activation is None:
            y = transformers_private.expert_activation(module)(y)
        y = product(y.contiguous(), down, config, routing, scatter=True)
        if has_norm:
            y = module.post_expert_norm(y)
        return combine(y, top_k_index, top_k_weights, num_experts)
