"""The memory traffic that bounds a decoder's speed: weight bytes per decode step, and the device's copy bandwidth.

A step reads every dense weight once, and every routed expert that at least one of its tokens chose. The choices are
measured. Not counted are the embedding, of which a step reads one row per token (unless it is the output matrix as
well), keys and values, and activations.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from gemq.decoding.decoder import Decoder
from gemq.kernels.expert_codes import ExpertCodes
from gemq.kernels.modules import PackedExperts
from gemq.models.experts import expert_count, record_experts_calls
from gemq.models.structure import is_experts

COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
"""Size of the tensor that is copied to measure the bandwidth."""

COPIES_PER_RUN = 4
NUM_RUNS = 7
NUM_WARM_UP_RUNS = 2

PACKED_BUFFERS = ("codes", "scales", "offsets")
"""Buffers of packed modules that hold weights."""


def dense_bytes(model: Any) -> int:
    """Returns the bytes of all weights except routed experts and an embedding that is not tied to the output."""
    skipped: set[int] = set()
    for module in model.modules():
        if _is_experts(module):
            skipped.update(id(tensor) for tensor in _weights(module))
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        skipped.add(id(embedding.weight))
    dense = {id(tensor): tensor for tensor in _weights(model) if id(tensor) not in skipped}
    return sum(tensor.nbytes for tensor in dense.values())


def expert_bytes(experts: Any) -> list[int]:
    """Returns the bytes of each routed expert of one experts module."""
    count = expert_count(experts)
    stacked = [parameter for parameter in experts.parameters() if parameter.shape[:1] == (count,)]
    unpacked_bytes = sum(parameter.nbytes for parameter in stacked) // count
    sizes = [unpacked_bytes] * count
    for matrices in experts.children():
        if isinstance(matrices, ExpertCodes):
            for expert in range(count):
                sizes[expert] += matrices.matrix(expert).nbytes
    return sizes


@torch.no_grad()
def bytes_per_step(decoder: Decoder, steps: int = 8) -> float:
    """Returns the mean bytes of weights that a decode step reads. Runs the decoder for ``steps`` steps.

    Call it before ``decoder.prepare``: the experts chosen inside a CUDA graph cannot be recorded.
    """
    modules = [module for module in decoder.model.modules() if _is_experts(module)]
    sizes = [torch.tensor(expert_bytes(module)) for module in modules]
    bytes_read = []
    for _ in range(steps):
        with ExitStack() as stack:
            calls = [stack.enter_context(record_experts_calls(module)) for module in modules]
            decoder.step()
        step_bytes = 0
        for module_sizes, module_calls in zip(sizes, calls, strict=True):
            chosen = module_calls[0].top_k_index.unique().cpu()
            chosen = chosen[chosen < len(module_sizes)]  # larger indices mark unused slots
            step_bytes += int(module_sizes[chosen].sum())
        bytes_read.append(step_bytes)
    return dense_bytes(decoder.model) + mean(bytes_read)


def copy_bandwidth(device: torch.device) -> float:
    """Returns the bytes per second that the device reads plus writes while it copies: the median of several runs."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(NUM_RUNS):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(COPIES_PER_RUN):
            target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes * COPIES_PER_RUN / median(seconds[NUM_WARM_UP_RUNS:])


def synchronize(device: torch.device) -> None:
    """Waits for the work launched on a GPU. Does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _is_experts(module: nn.Module) -> bool:
    """Whether a module holds routed experts, packed or not."""
    return isinstance(module, PackedExperts) or is_experts(module)


def _weights(module: nn.Module) -> list[Tensor]:
    """Returns all parameters, and the buffers in which packed modules hold their weights."""
    weights: list[Tensor] = list(module.parameters())
    for submodule in module.modules():
        for name, buffer in submodule.named_buffers(recurse=False):
            if name in PACKED_BUFFERS:
                weights.append(buffer)
    return weights
