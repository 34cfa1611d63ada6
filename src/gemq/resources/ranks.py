"""Several processes that do one job together (torchrun): who does what, and how their results meet.

Micro-batches and experts are split over the ranks; rank 0 alone writes files and prints. Sums over micro-batches are
sums over shards, whose number does not depend on the ranks on a CPU, added up in one order: 1, 2 and 4 ranks give the
same bytes there. A process on its own is the case of one rank, in which nothing here does anything.

Knows tensors, no models and no stages.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gemq.errors import UserError
from gemq.resources.machine import pick_device
from gemq.resources.processes import end, end_when_told

SHARDS = 4
"""Shards of the micro-batches on a CPU. On a GPU, where sums differ from run to run anyway, each rank is one shard."""

TIMEOUT = timedelta(hours=12)
"""How long a rank waits for another: rank 0 may be solving, packing or writing. One that is gone is noticed at once."""

_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
)
_HEADER = 10  # numbers: type, dimensions, sizes


@dataclass(frozen=True)
class Ranks:
    """This process among those of its job.

    rank, count: which of how many
    device:      where this rank computes
    here:        how many of them are on this machine
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    here: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    # Who does what

    def shards(self, total: int) -> list[range]:
        """This rank's shards of ``total`` micro-batches, each the numbers of those in it; some may be empty.

        All shards in the order of the ranks are all micro-batches in their order.
        """
        count = SHARDS if self.device.type == "cpu" and SHARDS % self.count == 0 else self.count
        each = count // self.count
        numbers = range(self.rank * each, (self.rank + 1) * each)
        return [range(total * i // count, total * (i + 1) // count) for i in numbers]

    def shard_ends(self, total: int) -> list[int]:
        """After how many of this rank's micro-batches each of its shards but the last ends."""
        shards = self.shards(total)
        return [shard.stop - shards[0].start for shard in shards[:-1]]

    def own(self, total: int) -> range:
        """This rank's micro-batches of ``total``."""
        shards = self.shards(total)
        return range(shards[0].start, shards[-1].stop)

    def owner(self, number: int, total: int) -> int:
        """The rank whose micro-batch ``number`` of ``total`` is."""
        return next(r for r in range(self.count) if number in Ranks(r, self.count, self.device).own(total))

    def parts(self, total: int) -> list[slice]:
        """Each rank's part of ``total`` experts, or of anything else that no sum is over."""
        edges = [total * r // self.count for r in range(self.count + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]

    def part(self, total: int) -> slice:
        """This rank's part of ``total``."""
        return self.parts(total)[self.rank]

    # How results meet. Every rank makes the same calls in the same order

    def add_up(self, *tensors: Tensor) -> None:
        """Replaces tensors, each the sum over a rank's shards, by the sum over all ranks'."""
        for tensor in tensors if self.count > 1 else ():
            if self.count == 2 or tensor.device.type != "cpu":  # a + b is b + a
                self._run(dist.all_reduce, tensor)
                continue
            found = [torch.empty_like(tensor) for _ in range(self.count)]
            self._run(dist.all_gather, found, tensor)
            tensor.copy_(added_in_pairs(found))

    def count_up(self, number: int) -> int:
        """The sum of what every rank counted."""
        total = torch.tensor([number])
        self.add_up(total)
        return int(total)

    def most(self, tensor: Tensor) -> None:
        """Replaces whole numbers by the largest that any rank has."""
        if self.count > 1:
            self._run(dist.all_reduce, tensor, dist.ReduceOp.MAX)

    def broadcast(self, tensor: Tensor | None, source: int) -> Tensor:
        """The tensor that rank ``source`` gives, on every rank's device; the others give None."""
        if self.count == 1:
            assert tensor is not None
            return tensor
        header = torch.zeros(_HEADER, dtype=torch.int64)
        if self.rank == source:
            assert tensor is not None
            tensor = tensor.detach().to(self.device).contiguous()
            header[: 2 + tensor.dim()] = torch.tensor([_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape])
        self._run(dist.broadcast, header, source)
        kind, dimensions, *sizes = header.tolist()
        if self.rank != source:
            tensor = torch.empty(sizes[:dimensions], dtype=_DTYPES[kind], device=self.device)
        assert tensor is not None
        self.overwrite(tensor, source)
        return tensor

    def join(self, part: Tensor, total: int, dimension: int = 0) -> Tensor:
        """The whole of which every rank has its part (see ``parts``) along a dimension."""
        if self.count == 1:
            return part
        parts = self.parts(total)
        found = [
            self.broadcast(part if r == self.rank else None, r)
            for r in range(self.count)
            if parts[r].start < parts[r].stop
        ]
        return torch.cat(found, dimension)

    def share(self, own: Sequence[Tensor], total: int) -> Iterator[Tensor]:
        """A tensor for every micro-batch, one after the other, from those of each rank's own. To be used up."""
        start = self.own(total).start
        for i in range(total):
            owner = self.owner(i, total)
            yield self.broadcast(own[i - start] if owner == self.rank else None, owner)

    def fill(self, whole: Tensor, rows: Sequence[slice]) -> None:
        """Completes ``whole`` [rows, ...], of which each rank has the rows ``rows[rank]``."""
        for source, some in enumerate(rows if self.count > 1 else ()):
            if some.stop > some.start:
                self.overwrite(whole[some], source)

    def agree(self, run: Callable[[], Any]) -> Any:
        """What ``run`` gives on rank 0: plain values. Its UserError is raised on every rank."""
        if self.count == 1:
            return run()
        told: dict[str, Any] = {}
        if self.first:
            try:
                told = {"value": run()}
            except UserError as error:
                told = {"error": str(error)}
        text = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
        size = torch.tensor([len(text)])
        self._run(dist.broadcast, size, 0)  # on the CPU: no GPU has to wait for this
        text = text if self.first else torch.empty(int(size), dtype=torch.uint8)
        self._run(dist.broadcast, text, 0)
        told = json.loads(bytes(text.tolist()))
        if "error" in told:
            raise UserError(told["error"])
        return told["value"]

    def overwrite(self, tensor: Tensor, source: int) -> None:
        """Replaces a contiguous tensor, of the same shape and type on every rank, by that of rank ``source``."""
        if tensor.numel() and self.count > 1:
            flat = tensor.view(-1).view(torch.uint8)  # every backend takes bytes
            self._run(dist.broadcast, flat, source)

    @staticmethod
    def _run(call: Callable[..., object], *arguments: object) -> None:
        try:
            call(*arguments)
        except RuntimeError as error:  # the backend's, when the other end is gone
            end(str(error))


ALONE = Ranks()


def added_in_pairs(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors: neighbours first, then neighbours of these sums. Overwrites them."""
    found = list(parts)
    while len(found) > 1:
        pairs = [a.add_(b) for a, b in zip(found[::2], found[1::2], strict=False)]
        found = pairs + found[2 * len(pairs) :]
    return found[0]


class ShardedSum:
    """Adds up tensors as ``added_in_pairs`` does while it holds few of them: ``total`` after one ``add`` a shard."""

    def __init__(self) -> None:
        self._sums: list[tuple[int, list[Tensor]]] = []  # shards in each, and its tensors

    def add(self, tensors: Sequence[Tensor]) -> None:
        """One shard's sums, which are overwritten later."""
        size, found = 1, list(tensors)
        while self._sums and self._sums[-1][0] == size:
            _, before = self._sums.pop()
            found = [a.add_(b) for a, b in zip(before, found, strict=True)]
            size *= 2
        self._sums.append((size, found))

    def total(self) -> list[Tensor]:
        _, found = self._sums.pop()
        while self._sums:  # a number of shards that is no power of two
            _, before = self._sums.pop()
            found = [a.add_(b) for a, b in zip(before, found, strict=True)]
        return found


def start_ranks(device: str) -> Ranks:
    """This process's rank. Joins the others when torchrun has started it; otherwise it is alone.

    device: as the user gave it; on GPUs each rank gets its own
    Raises UserError when there are fewer GPUs than ranks.
    """
    picked = pick_device(device)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Ranks(device=picked)
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if picked.type == "cuda":
        gpus = torch.cuda.device_count()
        if gpus < here:
            raise UserError(f"{here} processes and {gpus} GPUs: give torchrun --nproc-per-node {gpus}")
        picked = torch.device("cuda", local)
        torch.cuda.set_device(picked)
        # torchrun gives each process one thread, through which all files would go. On a CPU threads decide the bytes.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
    end_when_told()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    return Ranks(rank, count, picked, here)


def leave_ranks() -> None:
    """Lets the other ranks go on without this one: at the end of a job."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
