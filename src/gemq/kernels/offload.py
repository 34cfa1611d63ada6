"""Experts in host memory, for a GPU that has no room for all of them.

The pool is one buffer on the GPU that all layers share. It begins with the codes of the resident experts. The codes of
all other experts lie in pinned host memory. Before the experts of a layer run, ``fetch`` copies the chosen ones to the
staging area, the end of the pool. Layers use it in turn, and each of their offloaded experts has a fixed place in it.
So tables of codes never change, the kernels are those of a model without offloading, and a CUDA graph may contain all
of it. Scales and offsets are small and stay on the GPU.

Must not import triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemq.errors import UserError
from gemq.kernels.modules import PackedExperts
from gemq.runtime.integers import ceil_div, round_up
from gemq.runtime.memory import gigabytes, pinned_bytes

PLACE_ALIGNMENT = 128
"""Codes start at a multiple of this many bytes, in the pool and in host memory: a request of the bus."""

COPY_UNIT = 16
"""Bytes that fetch tables count in: what a thread copies at a time."""

MAX_CHUNK_BYTES = 1 << 28
"""Largest allocation of pinned memory. PyTorch rounds them up to a power of two."""


@dataclass(frozen=True)
class Residency:
    """Where the experts of a model are.

    Attributes:
        resident_bytes: bytes of codes that stay on the GPU
        staging_bytes: bytes of the staging area
        offloaded_bytes: bytes of codes in host memory
        residents: experts on the GPU, by layer
    """

    resident_bytes: int
    staging_bytes: int
    offloaded_bytes: int
    residents: tuple[frozenset[int], ...]

    @property
    def resident_share(self) -> float:
        """Share of the experts' codes that stays on the GPU."""
        return self.resident_bytes / max(1, self.resident_bytes + self.offloaded_bytes)


def padded(count: int) -> int:
    """Return ``count`` bytes, rounded up to PLACE_ALIGNMENT."""
    return round_up(count, PLACE_ALIGNMENT)


def expert_code_bytes(module: PackedExperts) -> list[int]:
    """Return the padded bytes of the codes of each expert of a layer."""
    sizes = [0] * module.down_proj.num_experts
    for matrices in module.packed_projections().values():
        for expert in range(len(sizes)):
            sizes[expert] += padded(matrices.code_bytes(expert))
    return sizes


def choose_residents(
    sizes: Sequence[Sequence[int]], usage: Sequence[Sequence[float]], capacity: int
) -> list[frozenset[int]]:
    """Choose the experts that stay on the GPU: the most used ones of all layers.

    A byte of an expert saves as many transfers as the expert is used, whatever its size. Experts of equal usage are
    taken in turn from all layers.

    Args:
        sizes: bytes of each expert, by layer
        usage: share of a layer's tokens that each expert serves, by layer
        capacity: bytes for residents and the staging area

    Returns:
        The experts that stay on the GPU, by layer.

    Raises:
        ValueError: the capacity is less than the largest layer, which the staging area needs without residents.
    """
    offloaded = [sum(layer_sizes) for layer_sizes in sizes]
    if capacity < max(offloaded, default=0):
        raise ValueError(f"{capacity} bytes are less than a layer's {max(offloaded)}")
    order = []
    for layer, layer_sizes in enumerate(sizes):
        order += [(-usage[layer][expert], expert, layer) for expert in range(len(layer_sizes))]
    residents: list[set[int]] = [set() for _ in sizes]
    resident_bytes = 0
    for _, expert, layer in sorted(order):
        size = sizes[layer][expert]
        offloaded[layer] -= size
        if resident_bytes + size + max(offloaded) <= capacity:
            residents[layer].add(expert)
            resident_bytes += size
        else:
            offloaded[layer] += size
    return [frozenset(experts) for experts in residents]


class PinnedMemory:
    """Pinned host memory.

    Args:
        total: bytes that will be allocated
        is_pinned: whether to pin it, which needs a GPU
    """

    def __init__(self, total: int, is_pinned: bool) -> None:
        self._chunk: Tensor | None = None
        self._total = self._remaining = total
        self._is_pinned = is_pinned
        self._end = 0

    def allocate(self, count: int) -> list[Tensor]:
        """Return ``count`` bytes in pieces of at most MAX_CHUNK_BYTES. Raises UserError if the system has none."""
        return [self._piece(min(count - start, MAX_CHUNK_BYTES)) for start in range(0, count, MAX_CHUNK_BYTES)]

    def _piece(self, count: int) -> Tensor:
        """Return ``count`` bytes, at most MAX_CHUNK_BYTES, of the current allocation or of a new one."""
        count = padded(count)
        if self._chunk is None or self._end + count > self._chunk.numel():
            chunk_bytes = pinned_bytes(max(count, min(self._remaining, MAX_CHUNK_BYTES)))
            try:
                self._chunk = torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)
            except RuntimeError as error:
                raise UserError(
                    f"{gigabytes(chunk_bytes)} of host memory cannot be pinned (experts without room on the GPU still "
                    f"need {gigabytes(self._remaining)} of {gigabytes(self._total)}): free some, or raise "
                    "--gpu-memory (gpu_memory)"
                ) from error
            self._end = 0
        piece = self._chunk[self._end : self._end + count]
        self._end += count
        self._remaining -= count
        return piece


def offload_experts(
    modules: Sequence[PackedExperts],
    usage: Sequence[Sequence[float]],
    capacity: int,
    device: torch.device,
) -> Residency:
    """Move the codes of experts to a pool on the GPU and to pinned host memory.

    Everything else, such as scales, stays where it is: the caller moves it.

    Args:
        modules: the packed experts of all layers, on the CPU
        usage: as for ``choose_residents``
        capacity: bytes for residents and the staging area
        device: the GPU

    Raises:
        ValueError: as for ``choose_residents``.
        UserError: there is not enough host memory.
    """
    sizes = [expert_code_bytes(module) for module in modules]
    residents = choose_residents(sizes, usage, capacity)
    resident_bytes, staging_bytes, offloaded_bytes = 0, 0, 0
    for layer_sizes, experts in zip(sizes, residents, strict=True):
        layer_resident = sum(layer_sizes[expert] for expert in experts)
        resident_bytes += layer_resident
        offloaded_bytes += sum(layer_sizes) - layer_resident
        staging_bytes = max(staging_bytes, sum(layer_sizes) - layer_resident)

    pool = torch.empty(resident_bytes + staging_bytes, dtype=torch.uint8, device=device)
    host = PinnedMemory(offloaded_bytes, device.type == "cuda")
    end = 0
    for module, experts in zip(modules, residents, strict=True):
        end = _offload_layer(module, experts, pool, end, resident_bytes, host)
    return Residency(resident_bytes, staging_bytes, offloaded_bytes, tuple(residents))


def _offload_layer(
    module: PackedExperts, residents: frozenset[int], pool: Tensor, end: int, staging: int, host: PinnedMemory
) -> int:
    """Move the codes of one layer.

    Args:
        module: the layer's experts
        residents: those that stay on the GPU
        pool: the pool
        end: bytes of the pool that other layers use
        staging: first byte of the staging area
        host: where the others go

    Returns:
        The bytes of the pool that are used now.
    """
    projections = module.packed_projections()
    largest = max(matrices.code_bytes(e) for matrices in projections.values() for e in range(matrices.num_experts))
    max_pieces = ceil_div(largest, MAX_CHUNK_BYTES)
    fetch_table = torch.zeros(module.down_proj.num_experts, len(projections) * max_pieces, 3, dtype=torch.int64)
    for number, matrices in enumerate(projections.values()):
        starts: list[int] = []
        host_codes: dict[int, list[Tensor]] = {}
        for expert in range(matrices.num_experts):
            codes = matrices.matrix(expert).codes.flatten()
            if expert in residents:
                starts.append(end)
                pool[end : end + codes.numel()].copy_(codes)
                end += padded(codes.numel())
                continue
            starts.append(staging)
            host_codes[expert] = host.allocate(codes.numel())
            sources = codes.split(MAX_CHUNK_BYTES)
            for row, (piece, source) in enumerate(zip(host_codes[expert], sources, strict=True), number * max_pieces):
                piece[: source.numel()].copy_(source)
                units = ceil_div(source.numel(), COPY_UNIT)
                fetch_table[expert, row] = torch.tensor([piece.data_ptr(), staging // COPY_UNIT, units])
                staging += padded(source.numel())
        matrices.place_codes(pool, starts, host_codes)
    module.register_buffer("fetch_table", fetch_table.to(pool.device), persistent=False)
    return end
