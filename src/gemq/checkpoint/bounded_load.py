"""Fits a packed model into a bound of GPU memory: experts without room there go to pinned host memory.

The bound counts everything: weights, the staging area of offloaded experts, the cache and temporary tensors of a text,
and what CUDA takes. ``kernels.offload`` moves the experts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gemq.errors import UserError, short_repr
from gemq.kernels.modules import PackedExperts
from gemq.kernels.offload import Residency, expert_code_bytes, offload_experts
from gemq.kernels.trellis.experts import TrellisMatrices
from gemq.models.cache_size import cache_size
from gemq.models.prefill_memory import prefill_bytes
from gemq.models.source import max_seq_len
from gemq.models.structure import find_structure
from gemq.recipe_values import parse_size
from gemq.runtime.fallbacks import record
from gemq.runtime.memory import CONTEXT_BYTES, DEFAULT_CONTEXT, LIBRARY_BYTES, gigabytes

ALLOCATION_FILE = "allocation.json"


def memory_bound(gpu_memory: int | str, device: torch.device) -> int:
    """Return a bound in bytes.

    Args:
        gpu_memory: bytes, or a text such as ``8GB``
        device: where the model is to run

    Raises:
        UserError: it is no size, or there is no such GPU memory.
    """
    if isinstance(gpu_memory, str):
        try:
            gpu_memory = parse_size(gpu_memory)
        except UserError as error:
            raise UserError(f"gpu_memory: {error}") from error
    if isinstance(gpu_memory, bool) or not isinstance(gpu_memory, int) or gpu_memory < 1:
        raise UserError(f"gpu_memory cannot be {short_repr(gpu_memory)}: give bytes, or a text such as 8GB")
    if device.type != "cuda":
        raise UserError(f"--gpu-memory (gpu_memory) bounds a GPU and the model is loaded on {device}: leave it out")
    total = torch.cuda.get_device_properties(device).total_memory
    if gpu_memory > total:
        raise UserError(f"--gpu-memory {gigabytes(gpu_memory)} is more than the {gigabytes(total)} of {device}")
    return gpu_memory


PREFILL_MARGIN = 1.25
"""Prompts have taken up to a tenth more than their estimate, and graphs of prompts keep memory. What is left over holds
experts, so that too small an estimate would end in a lack of memory."""


def fit_into(
    model: Any,
    skeleton: Any,
    directory: Path,
    modules: Sequence[PackedExperts],
    bound: int,
    context: int | None,
    batch: int,
    device: torch.device,
) -> Residency:
    """Move a model to the GPU so that it takes at most ``bound`` bytes there.

    Its parameters need no gradients from then on, since offloaded experts cannot be trained.

    Args:
        model: a packed model on the CPU
        skeleton: the same model in full precision on the meta device, which the cache is measured with
        directory: of the checkpoint
        modules: the packed experts of all layers
        bound: bytes
        context: tokens of a text, prompt and answer, that has to fit
        batch: texts at the same time
        device: the GPU

    Returns:
        Where the experts are.

    Raises:
        UserError: not even one layer's experts fit next to everything else, or host memory is too small.
    """
    longest = max_seq_len(model.config)
    context = min(DEFAULT_CONTEXT, longest) if context is None else min(context, longest)
    sizes = [expert_code_bytes(module) for module in modules]
    structure, dtype = find_structure(skeleton), model.dtype
    cache = batch * cache_size(skeleton, structure, dtype).unbounded_bytes(context)  # a static cache keeps all tokens
    config, has_trellis = model.config.get_text_config(), isinstance(modules[0].down_proj, TrellisMatrices)
    prefill = prefill_bytes(structure, config, dtype, batch * context, batch, has_trellis=has_trellis)
    prefill = int(prefill * PREFILL_MARGIN)
    remainder = CONTEXT_BYTES + LIBRARY_BYTES + bytes_without_codes(model, modules) + prefill
    largest_layer = max(sum(layer_sizes) for layer_sizes in sizes)
    needed = remainder + cache + largest_layer
    if needed > bound:
        raise UserError(
            f"--gpu-memory {gigabytes(bound)} is too small: one layer's experts take {gigabytes(largest_layer)}, the "
            f"cache of {batch * context:,} tokens {gigabytes(cache)}, everything else {gigabytes(remainder)}; give at "
            f"least {gigabytes(needed)}"
        )
    usage = expert_usage(directory, [len(layer_sizes) for layer_sizes in sizes])
    model.requires_grad_(False)
    residency = offload_experts(modules, usage, bound - remainder - cache, device)
    model.to(device)
    if hasattr(model, "hf_device_map"):
        model.hf_device_map = {"": device}
    return residency


def bytes_without_codes(model: Any, modules: Sequence[PackedExperts]) -> int:
    """Return the bytes of all weights but the experts' codes, on a GPU."""
    codes: set[int] = set()
    for module in modules:
        codes.update(id(matrices.codes) for matrices in module.packed_projections().values())
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for key, tensor in tensors.items() if key not in codes)


def expert_usage(directory: Path, counts: Sequence[int]) -> list[list[float]]:
    """Return the share of a layer's calibration tokens that each expert served, by layer with experts.

    Without such counts next to the weights all experts are taken as equally used, and a fallback is counted.

    Args:
        directory: of the checkpoint
        counts: experts of each layer with experts
    """
    try:
        values = json.loads((directory / ALLOCATION_FILE).read_text(encoding="utf-8"))
        layers = [layer for layer in values["tokens"] if layer]
        if [len(layer) for layer in layers] != list(counts):
            raise ValueError(f"{ALLOCATION_FILE} is that of another model")
        return [[float(tokens) / max(1.0, sum(layer)) for tokens in layer] for layer in layers]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        record("usage_unknown", error)
        return [[1.0 / count] * count for count in counts]
