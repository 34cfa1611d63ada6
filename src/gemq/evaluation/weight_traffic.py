"""How many bytes of weights a decode step reads, and how fast a device copies: what bounds a decoder's speed.

A step reads every dense weight once and each routed expert that any of its tokens chose once. Which those are is
watched, not assumed. Left out: the embedding (one row a token; counted where it is the output matrix too), keys and
values, activations.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from gemq.decoding.decoder import Decoder
from gemq.kernels.modules import PackedExperts, PackedMatrices
from gemq.models.experts import expert_count, watch_experts
from gemq.models.structure import is_experts

COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
COPIES = 4


def dense_bytes(model: Any) -> int:
    """Bytes of all weights but routed experts and an embedding that is nothing else."""
    skipped = {id(t) for m in model.modules() if _has_experts(m) for t in _tensors(m)}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        skipped.add(id(embedding.weight))
    return sum(t.nbytes for t in {id(t): t for t in _tensors(model)}.values() if id(t) not in skipped)


def expert_bytes(experts: Any) -> list[int]:
    """Bytes of each routed expert of one experts module."""
    packed = [m for m in experts.children() if isinstance(m, PackedMatrices)]
    count = expert_count(experts)
    shared = sum(p.nbytes for p in experts.parameters() if p.shape[:1] == (count,)) // count
    return [shared + sum(t.nbytes for m in packed for t in m.matrix(e)) for e in range(count)]


@torch.no_grad()
def bytes_per_step(decoder: Decoder, steps: int = 8) -> float:
    """Mean over the ``steps`` next steps. Call it before ``prepare``: what a graph chooses cannot be watched."""
    experts = [m for m in decoder.model.modules() if _has_experts(m)]
    sizes = [torch.tensor(expert_bytes(m)) for m in experts]
    read = []
    for _ in range(steps):
        with ExitStack() as stack:
            calls = [stack.enter_context(watch_experts(m)) for m in experts]
            decoder.step()
        chosen = [found[0].top_k_index.unique().cpu() for found in calls]
        read.append(sum(int(size[e[e < len(size)]].sum()) for size, e in zip(sizes, chosen, strict=True)))
    return dense_bytes(decoder.model) + mean(read)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that the device reads and writes together while it copies; the median of several copies."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(7):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(COPIES):
            target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes * COPIES / median(seconds[2:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _has_experts(module: nn.Module) -> bool:
    return isinstance(module, PackedExperts) or is_experts(module)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters, and what packed modules hold in buffers."""
    buffers = [
        b for m in module.modules() for n, b in m.named_buffers(recurse=False) if n in ("codes", "scales", "offsets")
    ]
    return [*module.parameters(), *buffers]
