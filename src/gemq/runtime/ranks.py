"""Several processes that do one job together (torchrun): who does what, and how their results meet.

Micro-batches, experts and layers are split over the ranks; rank 0 alone prints, and writes what all have made together.
Ranks take micro-batches in turns and stay in step, and what is summed over micro-batches is added up in their order,
whoever ran them: such a sum does not depend on how many ranks there are. A process on its own is the case of one rank,
in which nothing here does anything.

Knows tensors, no models and no stages.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gemq.errors import UserError
from gemq.runtime.device import pick_device
from gemq.runtime.processes import end, end_when_told

TIMEOUT = timedelta(hours=12)
"""How long a rank waits for another: rank 0 may be solving, packing or writing. One that is gone is noticed at once."""

AT_ONCE, LEAST_TURNS = 4, 16
"""Micro-batches that go through a layer of a GPU at once, if ranks then still take so many turns."""

SHARED = 1 << 29
"""Bytes that ranks give each other at once, all together: their processors meet once for all of it."""

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


def neighbours(total: int, at_once: int) -> int:
    """How many of ``total`` micro-batches go through a layer together, ``at_once`` at most: see ``Ranks.together``."""
    return max(1, min(at_once, total // LEAST_TURNS))


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

    @property
    def at_once(self) -> int:
        """Micro-batches that go through a layer at once where nothing is trained, at most.

        On a GPU, several: launching the kernels of one takes longer than they do.
        """
        return 1 if self.device.type == "cpu" else AT_ONCE

    def together(self, total: int) -> int:
        """How many neighbours among ``total`` micro-batches a rank has: those that go through a layer at once.

        Does not depend on how many ranks there are, as results would then. Few enough that each has its share.
        """
        return neighbours(total, self.at_once)

    def own(self, total: int) -> list[int]:
        """This rank's micro-batches of ``total``."""
        return [number for number in range(total) if self.owner(number, total) == self.rank]

    def owner(self, number: int, total: int) -> int:
        """The rank whose micro-batch ``number`` of ``total`` is."""
        return number // self.together(total) % self.count

    @property
    def deals(self) -> bool:
        """Whether ranks train in a way that rounds otherwise than one would: on GPUs, each of which does so anyhow."""
        return self.count > 1 and self.device.type != "cpu"

    def parts(self, total: int) -> list[slice]:
        """Each rank's part of ``total`` experts, or of anything else that no sum is over."""
        edges = [total * r // self.count for r in range(self.count + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]

    def part(self, total: int) -> slice:
        """This rank's part of ``total``."""
        return self.parts(total)[self.rank]

    # How results meet. Every rank makes the same calls in the same order

    def add_up(self, *tensors: Tensor) -> None:
        """Replaces each tensor by the sum of every rank's."""
        for tensor in tensors if self.count > 1 else ():
            if self.count == 2 or tensor.device.type != "cpu":  # a + b is b + a
                self._run(dist.all_reduce, tensor)
                continue
            first, *others = self.spread(tensor.unsqueeze(0))
            tensor.copy_(sum(others, start=first))

    def add_up_together(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of every rank's tensors, in one exchange for each type."""
        if self.count == 1 or not tensors:
            return list(tensors)
        sums: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            some = [(place, tensor) for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
            whole = torch.cat([tensor.flatten() for _, tensor in some])
            self.add_up(whole)
            parts = whole.split([tensor.numel() for _, tensor in some])
            sums.update((place, part.view_as(tensor)) for (place, tensor), part in zip(some, parts, strict=True))
        return [sums[place] for place in range(len(tensors))]

    def spread(self, rows: Tensor) -> Tensor:
        """All ranks' rows, rank by rank. Every rank has as many."""
        if self.count == 1:
            return rows
        whole = rows.new_empty(self.count * len(rows), *rows.shape[1:])
        self._run(_named("all_gather_single", "all_gather_into_tensor"), whole, rows.contiguous())
        return whole

    def collect(self, rows: Tensor) -> Tensor:
        """The opposite of ``spread``: of every rank's sum over all rows, the part of these that is this rank's."""
        if self.count == 1:
            return rows
        if rows.device.type == "cpu":  # gloo adds up in no fixed order
            self.add_up(rows)
            return rows.chunk(self.count)[self.rank]
        own = rows.new_empty(len(rows) // self.count, *rows.shape[1:])
        self._run(_named("reduce_scatter_single", "reduce_scatter_tensor"), own, rows.contiguous())
        return own

    def count_up(self, number: int) -> int:
        """The sum of what every rank counted."""
        total = torch.tensor([number])
        self.add_up(total)
        return int(total)

    def broadcast(self, tensor: Tensor | None, source: int) -> Tensor:
        """The tensor that rank ``source`` gives, on every rank's device; the others give None."""
        if self.count == 1:
            assert tensor is not None
            return tensor
        if tensor is not None:
            tensor = tensor.detach().to(self.device).contiguous()
        header = _header(tensor)
        self._run(dist.broadcast, header, source)
        if self.rank != source:
            kind, dimensions, *sizes = header.tolist()
            tensor = torch.empty(sizes[:dimensions], dtype=_DTYPES[kind], device=self.device)
        assert tensor is not None
        self.overwrite(tensor, source)
        return tensor

    def gather(
        self, tensors: Sequence[Tensor | None], notes: Sequence[int] = ()
    ) -> list[tuple[list[Tensor | None], list[int]]]:
        """Every rank's tensors, on every rank's device, and its notes, rank by rank.

        All ranks give as many tensors, each of any shape and type or None, and as many notes, which are whole numbers.
        """
        if self.count == 1:
            return [(list(tensors), list(notes))]
        mine = [None if t is None else t.detach().to(self.device).contiguous() for t in tensors]
        own = torch.cat([torch.tensor(notes, dtype=torch.int64), *map(_header, mine)])
        headers = self.spread(own).chunk(self.count)
        each = [header[len(notes) :].unflatten(0, (len(mine), _HEADER)).tolist() for header in headers]
        # all in one call, as bytes at multiples of 16: a call takes longer than most of what it carries
        places = [list(itertools.accumulate((-(-_bytes_of(h) // 16) * 16 for h in one), initial=0)) for one in each]
        most = max(ends[-1] for ends in places)
        sent = torch.empty(most, dtype=torch.uint8, device=self.device)
        for tensor, start in zip(mine, places[self.rank], strict=False):
            if tensor is not None:
                sent[start : start + tensor.nbytes].copy_(tensor.view(-1).view(torch.uint8))
        received = self.spread(sent).chunk(self.count) if most else [sent] * self.count
        return [
            ([_taken(whole, start, h) for start, h in zip(ends, one, strict=False)], header[: len(notes)].tolist())
            for whole, ends, one, header in zip(received, places, each, headers, strict=True)
        ]

    def join(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The wholes of which every rank has its ``parts`` of the first dimension.

        All in one exchange, since ranks wait for each other in each.
        """
        if self.count == 1:
            return list(parts)
        every = (tensors for tensors, _ in self.gather(parts))
        return [torch.cat([t for t in each if t is not None]) for each in zip(*every, strict=True)]

    def share(self, own: Sequence[Tensor], total: int) -> Iterator[Tensor]:
        """A tensor for every micro-batch, one after the other, from those of each rank's own. To be used up."""
        if self.count == 1:
            yield from own
            return
        turn = self.together(total)
        each = self.agree(lambda: own[0].nbytes)
        turns = SHARED // max(1, each * turn * self.count)  # of each rank in one exchange
        turns = max(1, min(turns, -(-total // (turn * self.count))))
        numbers = self.own(total)
        for start in range(0, total, turns * turn * self.count):
            some = range(start, min(start + turns * turn * self.count, total))
            mine: list[Tensor | None] = [own[place] for place, number in enumerate(numbers) if number in some]
            mine += [None] * (turns * turn - len(mine))
            given = [iter(tensors) for tensors, _ in self.gather(mine)]
            for number in some:
                tensor = next(given[self.owner(number, total)])
                assert tensor is not None
                yield tensor

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

    def each(self, run: Callable[[], Any]) -> None:
        """Runs something on every rank; a UserError of one is raised on all."""
        told = ""
        try:
            run()
        except UserError as error:
            if self.count == 1:
                raise
            told = str(error)
        text = torch.frombuffer(bytearray(told.encode()), dtype=torch.uint8) if told else None
        for (given,), _ in self.gather([text]) if self.count > 1 else ():
            if given is not None:
                raise UserError(bytes(given.tolist()).decode())

    def overwrite(self, tensor: Tensor, source: int) -> None:
        """Replaces a contiguous tensor, of the same shape and type on every rank, by that of rank ``source``."""
        if tensor.numel() and self.count > 1:
            flat = tensor.view(-1).view(torch.uint8)  # every backend takes bytes
            self._run(dist.broadcast, flat, source)

    @staticmethod
    def _run(call: Callable[..., object], *arguments: object) -> None:
        try:
            while _first_uses and any(isinstance(x, Tensor) and x.is_cuda for x in arguments):
                _first_uses.pop().result()
            call(*arguments)
        except RuntimeError as error:  # the backend's, when the other end is gone
            end(str(error))


ALONE = Ranks()


def _named(name: str, before: str) -> Callable[..., object]:
    """A collective by its name since torch 2.13, which tells users of the one from ``before``."""
    found: Callable[..., object] = getattr(dist, name, None) or getattr(dist, before)
    return found


def _header(tensor: Tensor | None) -> Tensor:
    """What tells a tensor's type and shape, int64 [_HEADER]: a type of -1 for None."""
    header = torch.full((_HEADER,), -1, dtype=torch.int64)
    if tensor is not None:
        header[: 2 + tensor.dim()] = torch.tensor([_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape])
    return header


def _bytes_of(header: list[int]) -> int:
    """A tensor's bytes, from its header; none for None."""
    kind, dimensions, *sizes = header
    return 0 if kind < 0 else math.prod(sizes[:dimensions]) * _DTYPES[kind].itemsize


def _taken(whole: Tensor, start: int, header: list[int]) -> Tensor | None:
    """The tensor whose bytes begin at ``start`` of ``whole``, from its header."""
    kind, dimensions, *sizes = header
    if kind < 0:
        return None
    return whole[start : start + _bytes_of(header)].view(_DTYPES[kind]).view(sizes[:dimensions])


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
    if picked.type == "cuda":
        _first_uses.append(ThreadPoolExecutor(1).submit(_meet_first, picked))
    return Ranks(rank, count, picked, here)


_first_uses: list[Future[None]] = []
"""What has to end before ranks meet on their GPUs."""


def _meet_first(device: torch.device) -> None:
    """NCCL connects the ranks, which takes most of a second. Meanwhile the job reads files."""
    torch.cuda.set_device(device)
    dist.all_reduce(torch.zeros(1, device=device))


def leave_ranks() -> None:
    """Lets the other ranks go on without this one: at the end of a job."""
    for first in _first_uses:
        first.exception()  # a job that ended before ranks had met
    _first_uses.clear()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
