"""The arithmetic of routed experts, step by step and with any weights.

Transformers' own experts modules compute a whole block with their own weights. Calibration also needs the input of
``down_proj`` for its Hessian, and every pair's output with other weights. Everything that a family adds (clamps,
biases, interleaved gates, a norm after each expert) is taken from the module itself.

Shapes: T tokens, K experts per token, P = T * K pairs of token and expert, sorted by expert, E experts, H hidden size,
I intermediate size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemq.kernels.expert_inputs import first_matrix_name, identity_experts_output, routing_from_batched_rows
from gemq.models import grouped
from gemq.models.expert_parallel import ExpertSharding, sharding_of
from gemq.models.expert_routing import RoutedPairs, route, route_local, route_without_sync
from gemq.runtime.compat import transformers_private

PAIRWISE_IMPLEMENTATION = "gemq_calibration"
"""Name of ``experts_forward`` in Transformers' table of experts implementations."""

ALL_PAIRS_IMPLEMENTATION = "gemq_every_expert"
"""Name of ``all_pairs_forward`` in that table."""

MAX_ALL_PAIRS_BYTES = 1 << 28
"""Upper bound for the intermediates of ``all_pairs_forward``."""

SCALE_PROBE = 2.0**10
"""Factor with which ``scales_with_up`` tests an activation."""


@dataclass
class ExpertsCall:
    """Arguments and result of an experts module in one forward pass of a layer.

    Attributes:
        hidden: [T, H]
        top_k_index: [T, K] int64
        top_k_weights: [T, K]
        output: [T, H]
    """

    hidden: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    output: Tensor


@contextmanager
def record_experts_calls(module: Any) -> Iterator[list[ExpertsCall]]:
    """Records the calls of an experts module while the context is open.

    The arguments are read from the call itself, not from the router's output, whose order differs between families.
    """
    calls: list[ExpertsCall] = []

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        calls.append(parse_experts_call(module, args, kwargs, output))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def parse_experts_call(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor | None = None
) -> ExpertsCall:
    """Reads an experts call from its arguments. Without ``output``, that of the call is empty."""
    hidden, *routing = (*args, *kwargs.values())[:3]
    if getattr(module, "batched_rows", False):
        index, weights = routing_from_batched_rows(hidden, expert_count(module))
    else:
        index, weights = routing
    if index.is_floating_point():  # some families pass weights before indices
        index, weights = weights, index
    if output is None:
        output = hidden.new_empty(0)
    return ExpertsCall(hidden.reshape(-1, hidden.shape[-1]), index, weights, output)


def route_call(call: ExpertsCall, weights: Sequence[Tensor], experts: int) -> RoutedPairs:
    """Sorts a call's pairs by expert, without waiting for the device if products with ``weights`` can be grouped."""
    function = route_without_sync if grouped.usable(call.hidden, *weights) else route
    return function(call.top_k_index, call.top_k_weights, experts)


def route_local_call(call: ExpertsCall, local_experts: slice, weight: Tensor) -> RoutedPairs:
    """Sorts a call's pairs with local experts, numbered from the first of these, for products with ``weight``.

    Where products are grouped, nothing waits for the device, and all other pairs follow in no group.
    """
    pairs = route_local(call.top_k_index, call.top_k_weights, local_experts)
    if grouped.usable(call.hidden, weight):
        return pairs
    count = int(pairs.ends[-1])
    return RoutedPairs(
        pairs.token[:count], pairs.expert[:count], pairs.weight[:count], pairs.ends, bias_experts=pairs.bias_experts
    )


def expert_count(module: Any) -> int:
    """Returns the number of experts of an experts module, packed or not."""
    down = module.down_proj
    return int(down.shape[0] if isinstance(down, Tensor) else down.num_experts)


def oriented(module: Any, name: str) -> Tensor:
    """Returns an experts module's weight as [E, outputs, inputs], whatever the family's layout is."""
    weight = getattr(module, name)
    return weight.transpose(1, 2) if module.is_transposed else weight


def expert_weight(module: Any, name: str) -> Tensor:
    """Returns ``oriented`` outside autograd."""
    return oriented(module, name).detach()


def up_rows(module: Any, weight: Tensor, transposed: bool | None = None) -> Tensor:
    """Returns a view of the rows of an experts module's first matrix that are multiplied with the gate.

    Args:
        module: has a gate
        weight: [E, 2 I, C], or [E, C, 2 I] if transposed
        transposed: by default as the module's weights are

    Returns:
        [E, I, C], or [E, C, I].
    """
    dim = -1 if (module.is_transposed if transposed is None else transposed) else -2
    size = weight.shape[dim] // 2
    if getattr(module, "is_concatenated", True):
        return weight.narrow(dim, size, size)
    return weight[..., 1::2] if dim == -1 else weight[..., 1::2, :]


def scales_with_up(module: Any) -> bool:
    """Returns whether the input of ``down_proj`` is linear in the up rows. A clamp or an addition makes it not so."""
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(4, 64, generator=generator) * torch.logspace(-3, 3, 4).unsqueeze(1)
    up_columns = slice(32, None) if getattr(module, "is_concatenated", True) else slice(1, None, 2)
    scaled = gate_up.clone()
    scaled[:, up_columns] *= SCALE_PROBE
    try:
        gate = transformers_private.expert_activation(module)
        return torch.equal(gate(scaled), gate(gate_up) * SCALE_PROBE)
    except (RuntimeError, NotImplementedError):  # an activation with parameters on another device
        return False


def apply_first(module: Any, name: str, weight: Tensor, x: Tensor, pairs: RoutedPairs) -> Tensor:
    """Computes the input of ``down_proj``.

    Args:
        module: the experts module, for its bias and gate
        name: of the first matrix
        weight: its weights [E, rows, H]
        x: inputs [P, H]
        pairs: the pairs of x

    Returns:
        [P, I].
    """
    return _activate(module, _expert_linear(x, weight, _bias(module, name, pairs), pairs), x, weight)


def apply_first_with_slopes(
    module: Any, name: str, weight: Tensor, x: Tensor, pairs: RoutedPairs
) -> tuple[Tensor, Tensor]:
    """Computes the input of ``down_proj``, and its derivatives by the outputs of the first matrix.

    Each of these outputs enters one of the inputs, so that one number for each is enough (``unit_of_row``).

    Returns:
        [P, I], and derivatives [P, rows].
    """
    output = _expert_linear(x, weight, _bias(module, name, pairs), pairs).detach()
    with torch.enable_grad():
        leaf = output.requires_grad_()
        h = _activate(module, leaf, x, weight)
        (slopes,) = torch.autograd.grad(h.sum(), leaf)
    return h.detach(), slopes


def unit_of_row(module: Any, rows: int) -> Tensor:
    """Returns which input of ``down_proj`` each row of the first matrix enters: [rows] int64."""
    row = torch.arange(rows)
    if not module.has_gate:
        return row
    return row % (rows // 2) if getattr(module, "is_concatenated", True) else row // 2


def _activate(module: Any, output: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Applies the activation and the gate to outputs of the first matrix ``weight`` for inputs ``x``."""
    if module.has_gate and grouped.usable(x, weight):
        return grouped.gate(module, output)
    activated: Tensor = transformers_private.expert_activation(module)(output)
    return activated


def apply_down(module: Any, weight: Tensor, h: Tensor, pairs: RoutedPairs) -> Tensor:
    """Computes each pair's output [P, H], not yet multiplied by its routing weight.

    Args:
        module: the experts module, for its bias and norm
        weight: of ``down_proj`` [E, H, I]
        h: inputs [P, I]
        pairs: the pairs of h
    """
    output = _expert_linear(h, weight, _bias(module, "down_proj", pairs), pairs)
    return module.post_expert_norm(output) if getattr(module, "has_post_expert_norm", False) else output


def _bias(module: Any, name: str, pairs: RoutedPairs) -> Tensor | None:
    """Returns the biases [E, rows] of a matrix; None if the module has none."""
    if not module.has_bias:
        return None
    bias = getattr(module, f"{name}_bias")
    return bias if pairs.bias_experts is None else bias[pairs.bias_experts]


def _expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: RoutedPairs) -> Tensor:
    """Applies each expert's linear to its pairs: [P, columns] -> [P, rows]."""
    if grouped.usable(x, weight):
        output = grouped.linear(x, weight, pairs.ends)
        return output if bias is None else output + bias[pairs.expert]
    counts = pairs.counts
    max_count = max(counts, default=0)
    if x.device.type == "cuda" and len(counts) * max_count <= 4 * len(x):
        # one batched product over padded slices: small experts on a GPU are bound by launches, not by arithmetic
        starts = F.pad(pairs.ends[:-1], (1, 0))
        slot = torch.arange(len(x), device=x.device) + (pairs.expert * max_count - starts[pairs.expert])
        padded = x.new_zeros(len(counts) * max_count, x.shape[1]).index_copy(0, slot, x).unflatten(0, (-1, max_count))
        output = torch.bmm(padded, weight.transpose(1, 2)).flatten(0, 1).index_select(0, slot)
        return output if bias is None else output + bias[pairs.expert]
    return grouped.looped_linear(x, weight, bias, counts)


def experts_forward(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Computes an experts block [T, H] -> [T, H], as a Transformers experts implementation. Differentiable in weights.

    Sums over a token's experts in a fixed order. Faster here than Transformers' own ``grouped_mm``: on a CPU, where
    that loops, and for float32 on a GPU.
    """
    weights = _weights(module)
    sharding = sharding_of(module)
    count = len(weights[1]) if sharding is None else sharding.count
    if sharding is not None:
        top_k_index = sharding.broadcast_routing(top_k_index)
    if grouped.usable(hidden, *weights):
        if sharding is None:
            pairs = route_without_sync(top_k_index, top_k_weights, count)
        else:
            all_index = sharding.all_gather(top_k_index)
            pairs = route_local(all_index, sharding.gather_weights(top_k_weights), sharding.local_experts)
        output = _grouped_block(module, hidden, pairs, sharding)
    else:
        pairs = route(top_k_index, top_k_weights, count)
        if sharding is None:
            output = _pair_outputs(module, weights, hidden.index_select(0, pairs.token), pairs)
        else:
            output = _sharded_pair_outputs(module, weights, hidden, pairs, sharding)
        output = output * pairs.weight.unsqueeze(1)
        output = torch.zeros_like(hidden).index_add(0, pairs.token, output.to(hidden.dtype))
    if getattr(module, "passes_on", False):
        output = output + identity_experts_output(hidden, top_k_index, top_k_weights, count)
    return output


def _weights(module: Any) -> tuple[Tensor, Tensor]:
    """Returns the module's first and second matrices, each [E, outputs, inputs]."""
    return oriented(module, first_matrix_name(module)), oriented(module, "down_proj")


def _pair_outputs(module: Any, weights: tuple[Tensor, Tensor], x: Tensor, pairs: RoutedPairs) -> Tensor:
    """Computes both matrices of every pair: [P, H] -> [P, H]."""
    h = apply_first(module, first_matrix_name(module), weights[0], x, pairs)
    return apply_down(module, weights[1], h, pairs)


def _sharded_pair_outputs(
    module: Any, weights: tuple[Tensor, Tensor], hidden: Tensor, pairs: RoutedPairs, sharding: ExpertSharding
) -> Tensor:
    """Returns every pair's output [P, H] on every rank, of hidden states [T, H] and this rank's experts."""
    rows_by_rank = sharding.rows_by_rank(pairs.counts)
    x = sharding.local_pairs(hidden.index_select(0, pairs.token), rows_by_rank)
    output = _pair_outputs(module, weights, x, pairs.stack_copies(sharding.local_experts, 1))
    if not len(x):  # without a pair the experts get zero gradients, as an expert without pairs does on one rank
        output = output + x.sum() + 0 * sum(weight.sum() for weight in weights)
    return sharding.gather_pairs(output, rows_by_rank)


def _grouped_block(module: Any, hidden: Tensor, pairs: RoutedPairs, sharding: ExpertSharding | None) -> Tensor:
    """Computes every token's weighted sum over its experts [T, H] by grouped products, without waiting for the GPU.

    Args:
        module: the experts module
        hidden: [T, H]
        pairs: all pairs, or those of this rank if there is a sharding
        sharding: reduces the sums over ranks
    """
    from gemq.kernels.training.expert_ops import (  # triton comes with torch for CUDA, not for CPUs
        RankPairs,
        combine,
        gather,
    )

    assert pairs.positions is not None
    shared = None if sharding is None else RankPairs(pairs.ends[-1:], sharding.all_gather, sharding.reduce)
    x = gather(hidden, pairs.token, pairs.positions, shared)
    output = _pair_outputs(module, _weights(module), x, pairs)
    return combine(output.to(hidden.dtype), pairs.weight, pairs.token, pairs.positions, shared)


def all_pairs_forward(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Computes an experts block with every expert on every token, so that nothing waits for the GPU.

    For decode steps of few tokens, which read all experts anyway. Uses one batched product on a GPU. Large inputs and
    sharded experts go to ``experts_forward``.
    """
    weights = _weights(module)
    num_tokens, num_experts = len(hidden), len(weights[0])
    intermediate_bytes = num_tokens * num_experts * sum(weights[0].shape[1:]) * hidden.itemsize
    if sharding_of(module) is not None or intermediate_bytes > MAX_ALL_PAIRS_BYTES:
        return experts_forward(module, hidden, top_k_index, top_k_weights)
    expert_ids = torch.arange(num_experts, device=hidden.device)
    routing_weights = hidden.new_zeros(num_tokens, num_experts + 1)
    routing_weights.scatter_add_(1, top_k_index.clamp(max=num_experts), top_k_weights.to(hidden.dtype))
    routing_weights = routing_weights[:, :num_experts]
    pairs = RoutedPairs(
        token=torch.arange(num_tokens, device=hidden.device).repeat(num_experts),
        expert=expert_ids.repeat_interleave(num_tokens, output_size=num_tokens * num_experts),
        weight=routing_weights.T.reshape(-1),
        ends=((expert_ids + 1) * num_tokens).int(),
    )
    pairs.counts = [num_tokens] * num_experts
    output = _pair_outputs(module, weights, hidden.repeat(num_experts, 1), pairs) * pairs.weight.unsqueeze(1)
    output = output.view(num_experts, num_tokens, -1).sum(0)
    if getattr(module, "passes_on", False):
        output = output + identity_experts_output(hidden, top_k_index, top_k_weights, num_experts)
    return output.to(hidden.dtype)


def use_experts_forward(model: Any) -> None:
    """Makes a model's experts modules run ``experts_forward``. Families without the interface keep their own."""
    transformers_private.register_experts(PAIRWISE_IMPLEMENTATION, experts_forward)
    model.set_experts_implementation(PAIRWISE_IMPLEMENTATION)


def use_fast_experts(model: Any) -> None:
    """Selects experts that a CUDA graph can capture, for full-precision generation on a GPU.

    In bfloat16 this is Transformers' ``grouped_mm``. In other types that waits for the device and loops over experts.
    """
    parameter = next(model.parameters())
    if not parameter.is_cuda:
        return
    transformers_private.register_experts(ALL_PAIRS_IMPLEMENTATION, all_pairs_forward)
    model.set_experts_implementation("grouped_mm" if parameter.dtype == torch.bfloat16 else ALL_PAIRS_IMPLEMENTATION)
