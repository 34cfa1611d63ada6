"""Experts and linears for a few tokens on a GPU, as operators of ``torch.library``.

Legend: T tokens, K experts per token, E experts, H hidden size, I intermediate size.

The operators take plain tensors and numbers, never modules. They do not wait for the device and decide nothing from
values on it, so that CUDA graphs and torch.compile can contain them. A layer's experts take two launches: gate and up
of every chosen expert with the activation, then down. The sum over experts is left to torch, since a compiler fuses it
with the residual connection.

Importing this module needs triton. With ``TRITON_INTERPRET=1`` set before, everything runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemq.kernels.activation import RAW, Activation, activation_of
from gemq.kernels.decode.launch import launch_down, launch_linears, launch_up
from gemq.kernels.decode.norms import sum_shares
from gemq.kernels.decode.packed_arguments import FusedLinears, PackedArguments
from gemq.kernels.decode.tuning import down_splits, widths_for
from gemq.kernels.expert_inputs import projections_with_bias
from gemq.kernels.fetch import wait_for_down
from gemq.runtime.compat import transformers_private

if TYPE_CHECKING:
    from gemq.kernels.modules import PackedExperts, PackedLinear


@torch.library.custom_op("gemq::decode_experts", mutates_args=())
def decode_experts(
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
        index: [T, K] experts; indices outside 0 ... E - 1 mark unused pairs
        weights: [T, K] routing weights
        up_tensors: ``PackedArguments.tensors`` of gate and up, or of up alone
        up_sizes: ``PackedArguments.sizes`` of these
        down_tensors: ``PackedArguments.tensors`` of down
        down_sizes: ``PackedArguments.sizes`` of down
        activation: the fields of an ``Activation``

    Returns:
        [T, K * S, H] float32: each pair's weighted output in S terms of a sum (``tuning.down_splits``), zero in unused
        pairs.
    """
    up = PackedArguments.from_lists(up_tensors, up_sizes)
    down = PackedArguments.from_lists(down_tensors, down_sizes)
    index = index.contiguous()
    h = launch_up(hidden.contiguous(), index, up, Activation.from_numbers(activation))
    return launch_down(h, index, weights.contiguous(), down, pdl=not wait_for_down(hidden.device))


@decode_experts.register_fake
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
    """Return the shape of ``decode_experts``."""
    up = PackedArguments.from_lists(up_tensors, up_sizes)
    down = PackedArguments.from_lists(down_tensors, down_sizes)
    inner = up.rows // 2 if Activation.from_numbers(activation).gated else up.rows
    splits = down_splits(hidden.dtype, inner, down.group_size, down.levels)
    return hidden.new_empty(index.shape[0], index.shape[1] * splits, down.rows, dtype=torch.float32)


@torch.library.custom_op("gemq::decode_up", mutates_args=())
def decode_up(hidden: Tensor, index: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Compute the first product alone, without an activation.

    Args:
        hidden: [T, H]
        index: [T, K] experts
        tensors: ``PackedArguments.tensors``
        sizes: ``PackedArguments.sizes``

    Returns:
        [T, K, rows]. Unused pairs are not written.
    """
    up = PackedArguments.from_lists(tensors, sizes)
    return launch_up(hidden.contiguous(), index.contiguous(), up, RAW)


@decode_up.register_fake
def _(hidden: Tensor, index: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return the shape of ``decode_up``."""
    return hidden.new_empty(*index.shape, PackedArguments.from_lists(tensors, sizes).rows)


@torch.library.custom_op("gemq::decode_down", mutates_args=())
def decode_down(
    h: Tensor, index: Tensor, weights: Tensor | None, tensors: Sequence[Tensor], sizes: Sequence[int]
) -> Tensor:
    """Compute the second product alone.

    Args:
        h: [T, K, I]
        index: [T, K] experts
        weights: [T, K] routing weights, or None
        tensors: ``PackedArguments.tensors``
        sizes: ``PackedArguments.sizes``

    Returns:
        [T, K, rows] in h's dtype without weights; with them as ``decode_experts``.
    """
    down = PackedArguments.from_lists(tensors, sizes)
    weights = None if weights is None else weights.contiguous()
    return launch_down(h.contiguous(), index.contiguous(), weights, down, pdl=not wait_for_down(h.device))


@decode_down.register_fake
def _(h: Tensor, index: Tensor, weights: Tensor | None, tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return the shape of ``decode_down``."""
    down = PackedArguments.from_lists(tensors, sizes)
    if weights is None:
        return h.new_empty(*index.shape, down.rows)
    splits = down_splits(h.dtype, h.shape[2], down.group_size, down.levels)
    return h.new_empty(index.shape[0], index.shape[1] * splits, down.rows, dtype=torch.float32)


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
    """Multiply up to 16 rows of x with one to three matrices of the same columns and width.

    Args:
        x: [T, columns]
        codes: codes of each matrix, as in ``modules.PackedLinear``
        scales: scales of each matrix
        offsets: offsets of each matrix
        biases: bias of each matrix, or empty
        levels: levels of the width
        group_size: columns that share a scale

    Returns:
        [T, rows of all matrices]
    """
    return launch_linears(x.contiguous(), FusedLinears(codes, scales, offsets, biases, levels, group_size))


@decode_linears.register_fake
def _(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    offsets: Sequence[Tensor],
    biases: Sequence[Tensor],
    levels: int,
    group_size: int,
) -> Tensor:
    """Return the shape of ``decode_linears``."""
    w = FusedLinears(codes, scales, offsets, biases, levels, group_size)
    return x.new_empty(x.shape[0], sum(w.rows))


def _projections(module: PackedExperts, share_kernels: bool) -> tuple[PackedArguments, PackedArguments]:
    """Return gate and up (or up alone), and down, each with its bias.

    Args:
        share_kernels: whether kernels are compiled for the common widths instead of those that occur
    """
    projections = []
    for matrices, bias in projections_with_bias(module):
        levels = widths_for(matrices.levels, matrices.group_size) if share_kernels else matrices.levels
        projections.append(PackedArguments.from_module(matrices, bias, levels))
    up, down = projections
    return up, down


def expert_shares(module: PackedExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor | None:
    """Return the terms of ``experts_forward``'s sum, [T, S, H] float32.

    Returns None for experts with a norm, or with an activation that the kernels do not support.
    """
    activation = activation_of(module)
    if activation is None or getattr(module, "has_post_expert_norm", False):
        return None
    up, down = _projections(module, share_kernels=True)
    return decode_experts(
        hidden, top_k_index, top_k_weights, up.tensors, up.sizes, down.tensors, down.sizes, activation.numbers()
    )


def experts_forward(module: PackedExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As ``reference.experts_forward``, for 1 to 16 tokens in float16, bfloat16 or float32."""
    shares = expert_shares(module, hidden, top_k_index, top_k_weights)
    if shares is not None:
        return sum_shares(shares, hidden.dtype)
    up, down = _projections(module, share_kernels=False)
    y = decode_up(hidden, top_k_index, up.tensors, up.sizes)
    y = transformers_private.expert_activation(module)(y)
    y = y.to(hidden.dtype)
    if not getattr(module, "has_post_expert_norm", False):
        return decode_down(y, top_k_index, top_k_weights, down.tensors, down.sizes).sum(1).to(hidden.dtype)
    y = module.post_expert_norm(decode_down(y, top_k_index, None, down.tensors, down.sizes))
    y = (y * top_k_weights[..., None]).float()
    is_used = ((top_k_index >= 0) & (top_k_index < down.num_experts))[..., None]
    return torch.where(is_used, y, 0.0).sum(1).to(hidden.dtype)


def linear_forward(module: PackedLinear, x: Tensor) -> Tensor:
    """As ``reference.linear_forward``, for 1 to 16 rows of x."""
    y = decode_linears(
        x.reshape(-1, module.in_features),
        [module.codes],
        [module.scales],
        [module.offsets],
        [] if module.bias is None else [module.bias],
        module.levels,
        module.group_size,
    )
    return y.view(*x.shape[:-1], module.out_features)
