"""Launches of the decode kernels on tensors.

``tuning`` chooses the design and the block sizes; a caller may pass a config instead. Layers with the common widths
share their kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from gemq.kernels.activation import RAW, Activation
from gemq.kernels.activation_triton import kernel_arguments
from gemq.kernels.decode import bit_fields, tensor_core, vector_kernels
from gemq.kernels.decode.fixed_point import num_lanes
from gemq.kernels.decode.packed_arguments import FusedLinears, PackedArguments
from gemq.kernels.decode.tuning import (
    MAX_VECTOR_PRODUCTS,
    LaunchConfig,
    TensorCoreConfig,
    VectorConfig,
    down_splits,
    linear_vector_config,
    tensor_core_config,
    vector_config,
    vectors_cover,
)
from gemq.kernels.layout_check import check_layout


def launch_up(
    hidden: Tensor,
    index: Tensor,
    up: PackedArguments,
    activation: Activation,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Multiply hidden states with the chosen experts' first matrices.

    Args:
        hidden: [T, H]
        index: [T, K] experts; indices outside 0 ... E - 1 mark unused pairs
        up: gate and up projections, or up alone
        activation: applied to the products
        config: launch options, for benchmarks

    Returns:
        [T, K, rows], or [T, K, rows / 2] if the activation is gated. Unused pairs are not written.
    """
    tokens, top_k = index.shape
    columns = hidden.shape[1]
    groups = columns // up.group_size
    out = hidden.new_empty(tokens, top_k, up.rows // 2 if activation.gated else up.rows)
    if config is None and vectors_cover(hidden.dtype, columns, up.group_size, up.levels):
        config = vector_config(tokens * top_k, groups)
    if isinstance(config, VectorConfig):
        _launch_vectors(hidden, index, None, up, out, activation, config)
        return out
    max_active = min(up.num_experts, tokens * top_k)
    config = config or tensor_core_config(up.rows, groups, max_active, hidden.dtype)
    numbers, constants = kernel_arguments(activation)
    with device_of(hidden):
        tensor_core.experts_up_kernel[(max_active, triton.cdiv(up.rows, config.block_rows))](
            hidden,
            index,
            *up.kernel_pointers(hidden),
            out,
            tokens,
            up.rows,
            up.num_experts,
            *numbers,
            **constants,
            **_routing_constants(index, up.num_experts),
            **_tensor_core_constants(hidden, up.group_size, config),
            HAS_BIAS=up.bias is not None,
            COMPILED_LEVELS=tuple(up.levels),
        )
    return out


def launch_down(
    h: Tensor,
    index: Tensor,
    weights: Tensor | None,
    down: PackedArguments,
    config: LaunchConfig | None = None,
    pdl: bool = True,
) -> Tensor:
    """Multiply the chosen experts' activations with their second matrices.

    Args:
        h: [T, K, I]
        index: [T, K] experts; indices outside 0 ... E - 1 mark unused pairs
        weights: [T, K] routing weights, or None
        down: down projections
        config: launch options, for benchmarks
        pdl: whether the kernel may load its codes while the previous one ends, on GPUs that support this

    Returns:
        Without weights [T, K, rows] in h's dtype. With weights [T, K * S, rows] float32, each pair's weighted output
        in S terms of a sum (``tuning.down_splits``), zero in unused pairs.
    """
    tokens, top_k = index.shape
    columns = h.shape[2]
    groups = columns // down.group_size
    dtype = h.dtype if weights is None else torch.float32
    if config is None and vectors_cover(h.dtype, columns, down.group_size, down.levels):
        config = vector_config(tokens * top_k, groups, is_down=True, pdl=pdl)
    if isinstance(config, VectorConfig):
        splits = 1 if weights is None else down_splits(h.dtype, columns, down.group_size, down.levels)
        out = torch.empty(tokens, top_k * splits, down.rows, dtype=dtype, device=h.device)
        _launch_vectors(h, index, weights, down, out, RAW, config)
        return out
    max_active = min(down.num_experts, tokens * top_k)
    config = config or tensor_core_config(down.rows, groups, max_active, h.dtype)
    out = torch.zeros(tokens, top_k, down.rows, dtype=dtype, device=h.device)
    with device_of(h):
        tensor_core.experts_down_kernel[(max_active, triton.cdiv(down.rows, config.block_rows))](
            h,
            index,
            h if weights is None else weights,
            *down.kernel_pointers(h),
            out,
            tokens,
            down.rows,
            down.num_experts,
            **_routing_constants(index, down.num_experts),
            **_tensor_core_constants(h, down.group_size, config),
            HAS_BIAS=down.bias is not None,
            WEIGHTED=weights is not None,
            COMPILED_LEVELS=tuple(down.levels),
        )
    return out


def launch_linears(x: Tensor, w: FusedLinears, config: LaunchConfig | None = None) -> Tensor:
    """Multiply x [T, columns] with one to three matrices: [T, rows of all]. ``config`` is for benchmarks."""
    tokens, columns = x.shape
    rows = sum(w.rows)
    out = x.new_empty(tokens, rows)
    is_small = tokens * rows * columns < MAX_VECTOR_PRODUCTS
    if config is None and is_small and vectors_cover(x.dtype, columns, w.group_size, [w.levels]):
        config = linear_vector_config(tokens)
    if isinstance(config, VectorConfig):
        with device_of(x):
            kernel = vector_kernels.linears_vectors_kernel[(tokens, w.num_blocks(config.block_rows))](
                x,
                *w.kernel_pointers(x),
                out,
                *w.padded_rows,
                HAS_BIAS=bool(w.biases),
                LEVELS=w.levels,
                **_vector_constants(x, w.group_size, [w.levels], 1, config),
            )
        check_vector_layout(kernel)
        return out
    config = config or tensor_core_config(rows, columns // w.group_size, 1, x.dtype)
    with device_of(x):
        tensor_core.linears_kernel[(w.num_blocks(config.block_rows),)](
            x,
            *w.kernel_pointers(x),
            out,
            tokens,
            *w.padded_rows,
            **_tensor_core_constants(x, w.group_size, config),
            HAS_BIAS=bool(w.biases),
            BLOCK_TOKENS=_padded_tokens(tokens),
            LEVELS=w.levels,
        )
    return out


def _launch_vectors(
    x: Tensor,
    index: Tensor,
    weights: Tensor | None,
    w: PackedArguments,
    out: Tensor,
    activation: Activation,
    config: VectorConfig,
) -> None:
    """Launch the vector kernel of experts on x [T, columns], or [T, K, columns] with a row for each pair."""
    tokens, top_k = index.shape
    splits = out.shape[1] // top_k
    numbers, constants = kernel_arguments(activation)
    grid = (tokens * top_k, triton.cdiv(w.rows, config.block_rows), splits)
    with device_of(x):
        kernel = vector_kernels.experts_vectors_kernel[grid](
            x,
            index,
            x if weights is None else weights,
            *w.kernel_pointers(x),
            out,
            w.rows,
            w.num_experts,
            *numbers,
            **constants,
            TOP_K=top_k,
            PER_PAIR=x.dim() == 3,
            HAS_BIAS=w.bias is not None,
            WEIGHTED=weights is not None,
            COMPILED_LEVELS=tuple(w.levels),
            SPLITS=splits,
            **_vector_constants(x, w.group_size, w.levels, splits, config),
        )
    check_vector_layout(kernel)


def _vector_constants(
    x: Tensor, group_size: int, levels: Sequence[int], splits: int, config: VectorConfig
) -> dict[str, Any]:
    """Return the constants and launch options that all vector kernels share."""
    groups = x.shape[-1] // group_size
    split_groups = triton.cdiv(groups, splits)
    lanes = min(num_lanes(count, group_size, split_groups, config.columns_per_lane) for count in levels)
    constants: dict[str, Any] = {
        "PORTABLE": operand(x) == int(bit_fields.PORTABLE),
        "GROUP_SIZE": group_size,
        "NUM_GROUPS": groups,
        "BLOCK_ROWS": config.block_rows,
        "COLUMNS_PER_LANE": config.columns_per_lane,
        "PDL": config.pdl and supports_pdl(x.device),
        # With more threads than rows times lanes, Triton would distribute single words of a load over threads.
        "num_warps": max(1, min(config.num_warps, lanes * config.block_rows // 32)),
        "maxnreg": config.max_registers,
    }
    if constants["PDL"]:
        constants["launch_pdl"] = True
    return constants


def _tensor_core_constants(x: Tensor, group_size: int, config: TensorCoreConfig) -> dict[str, Any]:
    """Return the constants and launch options that all kernels on the tensor cores share."""
    return {
        "GROUP_SIZE": group_size,
        "NUM_GROUPS": x.shape[-1] // group_size,
        "BLOCK_ROWS": config.block_rows,
        "STEP_GROUPS": config.groups_per_step,
        "OPERAND": operand(x),
        "num_warps": config.num_warps,
    }


def _routing_constants(index: Tensor, experts: int) -> dict[str, int | bool]:
    """Return the constants of the tensor core kernels that depend on the routing [T, K]."""
    tokens, top_k = index.shape
    padded_tokens = _padded_tokens(tokens)
    return {
        "TOP_K": top_k,
        "PADDED_PAIRS": triton.next_power_of_2(padded_tokens * top_k),
        "PADDED_EXPERTS": triton.next_power_of_2(experts),
        "BY_PAIR": tokens * top_k <= experts,
        "BLOCK_TOKENS": padded_tokens,
    }


def _padded_tokens(tokens: int) -> int:
    """Return the columns of a tensor core tile for a number of tokens."""
    return 8 if tokens <= 8 else 16


def operand(x: Tensor) -> int:
    """Return the format of tensor core operands (see ``bit_fields``) for x's device and dtype.

    PORTABLE is for the interpreter and for GPUs that cannot run NVIDIA's assembly.
    """
    if x.device.type != "cuda" or torch.version.hip is not None:
        return int(bit_fields.PORTABLE)
    operands = {torch.bfloat16: bit_fields.BF16, torch.float16: bit_fields.FP16, torch.float32: bit_fields.SPLIT}
    return int(operands[x.dtype])


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Make x's GPU the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


@cache
def supports_pdl(device: torch.device) -> bool:
    """Whether a kernel may start while the previous one ends (programmatic dependent launch): from Hopper on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def check_vector_layout(kernel: Any) -> None:
    """Check that the words of the last axis lie next to each other in the registers of one thread, see ``dots``."""
    check_layout(kernel, r"dp4a.* -> tensor<(?:\d+x)*(\d+)", _has_neighboring_words)


def _has_neighboring_words(words: int, layout: str) -> bool:
    """Whether a layout gives all words of the last axis to one thread."""
    return words == 1 or (f"sizePerThread = [1, 1, {words}]" in layout and "order = [2" in layout)
