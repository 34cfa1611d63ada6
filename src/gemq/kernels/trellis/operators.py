"""Experts with trellis codes for a few tokens on a GPU, as operators of ``torch.library``.

Legend: T tokens, K experts per token, E experts, H hidden size, I intermediate size, S splits of a row. A pair is one
token and one of its K experts. ``launch.Slots`` groups pairs by expert.

As in ``kernels.decode.operators``, the operators take plain tensors and numbers, do not wait for the device and decide
nothing from values on it. A layer takes four launches: rotation of the tokens, gate and up, activation and rotation,
down. The sum over experts is left to torch.

Importing this module needs triton. With ``TRITON_INTERPRET=1`` set before, everything runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemq.kernels.activation import Activation, activation_of
from gemq.kernels.decode.norms import sum_shares
from gemq.kernels.fetch import wait_for_down
from gemq.kernels.trellis.launch import Slots, TrellisArguments, launch_rotation, launch_rows
from gemq.kernels.trellis.tuning import num_splits
from gemq.runtime.compat import transformers_private

if TYPE_CHECKING:
    from gemq.kernels.modules import PackedExperts


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
        index: [T, K] experts; indices outside 0 ... E - 1 mark unused pairs
        weights: [T, K] routing weights
        up_tensors: ``TrellisArguments.tensors`` of gate and up, or of up alone
        up_sizes: ``TrellisArguments.sizes`` of these
        down_tensors: ``TrellisArguments.tensors`` of down
        down_sizes: ``TrellisArguments.sizes`` of down
        activation: the fields of an ``Activation``

    Returns:
        [T, K * S, H] float32: each pair's weighted output in S terms of a sum, zero for unused pairs.
    """
    up = TrellisArguments.from_lists(up_tensors, up_sizes)
    down = TrellisArguments.from_lists(down_tensors, down_sizes)
    index, dtype = index.contiguous(), hidden.dtype
    experts = down.table.shape[0]
    slots = Slots.empty(index, experts)
    rotated = launch_rotation(hidden.contiguous().unsqueeze(1), up.columns, dtype, slots=slots, experts=experts)
    y = launch_rows(rotated, slots, None, up)
    y = y.view(index.numel(), -1, up.rows)
    is_waiting = wait_for_down(hidden.device)
    rotated = launch_rotation(y, down.columns, dtype, Activation.from_numbers(activation), pdl=not is_waiting)
    return launch_rows(rotated, slots, weights.contiguous(), down, are_slots_ready=True)


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
        x: [T, columns], or [T, K, columns] with an input for each pair
        index: [T, K] experts
        weights: [T, K] routing weights, or None
        tensors: ``TrellisArguments.tensors``
        sizes: ``TrellisArguments.sizes``

    Returns:
        [T, K * S, rows] float32: terms of a sum for each pair. Unused pairs are zero with weights, and not written
        without.
    """
    w = TrellisArguments.from_lists(tensors, sizes)
    index = index.contiguous()  # before the rotation, during which ``rows_kernel`` reads it
    weights = None if weights is None else weights.contiguous()
    experts = w.table.shape[0]
    slots = Slots.empty(index, experts)
    is_waiting = wait_for_down(x.device)
    rotated = launch_rotation(
        x.contiguous().view(-1, 1, w.columns), w.columns, x.dtype, slots=slots, experts=experts, pdl=not is_waiting
    )
    return launch_rows(rotated, slots, weights, w)


@trellis_rows.register_fake
def _(x: Tensor, index: Tensor, weights: Tensor | None, tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return the shape of ``trellis_rows``."""
    return _result_shape(x, index, TrellisArguments.from_lists(tensors, sizes))


def _result_shape(x: Tensor, index: Tensor, w: TrellisArguments) -> Tensor:
    """Return an empty result of ``launch_rows``."""
    tokens, top_k = index.shape
    splits = num_splits(tokens * top_k, w.rows, w.columns)
    return x.new_empty(tokens, top_k * splits, w.rows, dtype=torch.float32)


def expert_shares(module: PackedExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor | None:
    """As ``decode.operators.expert_shares``."""
    activation = activation_of(module)
    if activation is None or getattr(module, "has_post_expert_norm", False):
        return None
    up, down = TrellisArguments.from_experts(module)
    tensors = (up.tensors, up.sizes, down.tensors, down.sizes)
    return trellis_experts(hidden, top_k_index, top_k_weights, *tensors, activation.numbers())


def experts_forward(module: PackedExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As ``reference.experts_forward``, for 1 to 16 tokens in float16, bfloat16 or float32."""
    shares = expert_shares(module, hidden, top_k_index, top_k_weights)
    if shares is not None:
        return sum_shares(shares, hidden.dtype)
    has_norm = getattr(module, "has_post_expert_norm", False)
    up, down = TrellisArguments.from_experts(module)

    def sum_terms(terms: Tensor) -> Tensor:
        """Add the splits of each pair."""
        return terms.unflatten(1, (top_k_index.shape[1], -1)).sum(2).to(hidden.dtype)

    y = sum_terms(trellis_rows(hidden, top_k_index, None, up.tensors, up.sizes))
    y = transformers_private.expert_activation(module)(y).to(hidden.dtype)
    if not has_norm:
        return trellis_rows(y, top_k_index, top_k_weights, down.tensors, down.sizes).sum(1).to(hidden.dtype)
    y = module.post_expert_norm(sum_terms(trellis_rows(y, top_k_index, None, down.tensors, down.sizes)))
    y = (y * top_k_weights[..., None]).float()
    is_used = ((top_k_index >= 0) & (top_k_index < down.table.shape[0]))[..., None]
    return torch.where(is_used, y, 0.0).sum(1).to(hidden.dtype)
