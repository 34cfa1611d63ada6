"""Data-parallel processes of one job, started by torchrun: who computes what, and the collectives between them.

Micro-batches, experts and layers are divided among ranks. Rank 0 prints, and writes what all ranks computed together.
Sums over micro-batches are accumulated in the order of the micro-batches, so that they do not depend on the number of
ranks. A single process is the case of one rank, in which every collective returns its input.

Must not import models or stages.
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
from gemq.runtime.processes import end, end_on_sigterm

TIMEOUT = timedelta(hours=12)
"""Timeout of a collective. Rank 0 may be solving, packing or writing. A process that died is noticed at once."""

GPU_BATCHES_PER_FORWARD, MIN_FORWARDS = 4, 16
"""Micro-batches in one forward of a layer on a GPU, as long as at least ``MIN_FORWARDS`` forwards remain to divide."""

MAX_EXCHANGE_BYTES = 1 << 29
"""Upper bound for one all-gather. Larger exchanges amortise launch and synchronisation."""

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
_HEADER = 10
"""Integers that describe a tensor: index of the dtype, number of dimensions, sizes."""


def batches_per_forward(total: int, limit: int) -> int:
    """Micro-batches in one forward of a layer: at most ``limit``, and few enough for ``MIN_FORWARDS`` forwards."""
    return max(1, min(limit, total // MIN_FORWARDS))


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of its job. All ranks call the same collectives in the same order.

    Attributes:
        rank: index of this process
        count: number of processes
        device: where this process computes
        local_count: number of processes on this machine
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local_count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    # Division of work

    @property
    def max_batches_per_forward(self) -> int:
        """Upper bound for micro-batches in one forward where nothing is trained.

        A GPU takes several: launching the kernels of one micro-batch takes longer than running them.
        """
        return 1 if self.device.type == "cpu" else GPU_BATCHES_PER_FORWARD

    def batches_per_forward(self, total: int) -> int:
        """Consecutive micro-batches, of ``total``, that one rank runs in one forward.

        Independent of the number of ranks, since results depend on it.
        """
        return batches_per_forward(total, self.max_batches_per_forward)

    def local_batches(self, total: int) -> list[int]:
        """Indices of this rank's micro-batches."""
        return [index for index in range(total) if self.owner(index, total) == self.rank]

    def owner(self, index: int, total: int) -> int:
        """The rank that runs micro-batch ``index`` of ``total``."""
        return index // self.batches_per_forward(total) % self.count

    @property
    def shards_windows(self) -> bool:
        """Whether training divides windows among ranks, which rounds differently from one rank. GPUs do it."""
        return self.count > 1 and self.device.type != "cpu"

    def slices(self, total: int) -> list[slice]:
        """Each rank's range of ``total`` experts, or of other items that are not summed over."""
        edges = [total * r // self.count for r in range(self.count + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]

    def local_slice(self, total: int) -> slice:
        """This rank's range of ``total``."""
        return self.slices(total)[self.rank]

    # Collectives

    def all_reduce(self, *tensors: Tensor) -> None:
        """Replaces each tensor by its sum over ranks, in place."""
        for tensor in tensors if self.count > 1 else ():
            if self.count == 2 or tensor.device.type != "cpu":  # addition of two terms commutes
                self._run(dist.all_reduce, tensor)
                continue
            first, *others = self.all_gather(tensor.unsqueeze(0))
            tensor.copy_(sum(others, start=first))

    def all_reduce_coalesced(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over ranks, with one exchange for each dtype."""
        if self.count == 1 or not tensors:
            return list(tensors)
        sums: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            group = [(index, tensor) for index, tensor in enumerate(tensors) if tensor.dtype == dtype]
            flat = torch.cat([tensor.flatten() for _, tensor in group])
            self.all_reduce(flat)
            parts = flat.split([tensor.numel() for _, tensor in group])
            sums.update((index, part.view_as(tensor)) for (index, tensor), part in zip(group, parts, strict=True))
        return [sums[index] for index in range(len(tensors))]

    def all_gather(self, rows: Tensor) -> Tensor:
        """Rows of all ranks [count * R, ...], in the order of ranks. ``rows`` is [R, ...] on every rank."""
        if self.count == 1:
            return rows
        result = rows.new_empty(self.count * len(rows), *rows.shape[1:])
        self._run(_collective("all_gather_single", "all_gather_into_tensor"), result, rows.contiguous())
        return result

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        """This rank's part [R, ...] of the sum over ranks of ``rows`` [count * R, ...]; gradient of ``all_gather``."""
        if self.count == 1:
            return rows
        if rows.device.type == "cpu":  # gloo adds in no fixed order
            self.all_reduce(rows)
            return rows.chunk(self.count)[self.rank]
        result = rows.new_empty(len(rows) // self.count, *rows.shape[1:])
        self._run(_collective("reduce_scatter_single", "reduce_scatter_tensor"), result, rows.contiguous())
        return result

    def all_reduce_int(self, value: int) -> int:
        """The sum of an integer over ranks."""
        total = torch.tensor([value])
        self.all_reduce(total)
        return int(total)

    def broadcast(self, tensor: Tensor | None, source: int) -> Tensor:
        """The tensor of rank ``source``, on every rank's device. Other ranks pass None."""
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
        self.broadcast_into(tensor, source)
        return tensor

    def broadcast_into(self, tensor: Tensor, source: int) -> None:
        """Overwrites a contiguous tensor, of one shape and dtype on all ranks, by that of rank ``source``."""
        if tensor.numel() and self.count > 1:
            flat = tensor.view(-1).view(torch.uint8)  # every backend takes bytes
            self._run(dist.broadcast, flat, source)

    def broadcast_slices(self, tensor: Tensor, rows: Sequence[slice]) -> None:
        """Completes ``tensor`` [N, ...], of which rank r has the rows ``rows[r]``."""
        for source, part in enumerate(rows if self.count > 1 else ()):
            if part.stop > part.start:
                self.broadcast_into(tensor[part], source)

    def all_gather_tensors(
        self, tensors: Sequence[Tensor | None], integers: Sequence[int] = ()
    ) -> list[tuple[list[Tensor | None], list[int]]]:
        """The tensors and integers of all ranks, in the order of ranks, on this rank's device.

        Args:
            tensors: of any shape and dtype, or None; as many on every rank
            integers: as many on every rank
        """
        if self.count == 1:
            return [(list(tensors), list(integers))]
        local = [None if t is None else t.detach().to(self.device).contiguous() for t in tensors]
        header = torch.cat([torch.tensor(integers, dtype=torch.int64), *map(_header, local)])
        headers = self.all_gather(header).chunk(self.count)
        layouts = [h[len(integers) :].unflatten(0, (len(local), _HEADER)).tolist() for h in headers]
        # one exchange of bytes, aligned to 16: a collective takes longer than transferring most of these tensors
        offsets = [list(itertools.accumulate((-(-_bytes(h) // 16) * 16 for h in one), initial=0)) for one in layouts]
        size = max(ends[-1] for ends in offsets)
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        for tensor, start in zip(local, offsets[self.rank], strict=False):
            if tensor is not None:
                buffer[start : start + tensor.nbytes].copy_(tensor.view(-1).view(torch.uint8))
        received = self.all_gather(buffer).chunk(self.count) if size else [buffer] * self.count
        return [
            ([_unpack(data, start, h) for start, h in zip(ends, one, strict=False)], h0[: len(integers)].tolist())
            for data, ends, one, h0 in zip(received, offsets, layouts, headers, strict=True)
        ]

    def all_gather_cat(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor concatenated over ranks along its first dimension. One exchange for all of them."""
        if self.count == 1:
            return list(parts)
        by_rank = (tensors for tensors, _ in self.all_gather_tensors(parts))
        return [torch.cat([t for t in tensors if t is not None]) for tensors in zip(*by_rank, strict=True)]

    def gather_micro_batches(self, local: Sequence[Tensor], total: int) -> Iterator[Tensor]:
        """Yields the tensor of every micro-batch in order, gathered from its owner.

        Runs collectives, so every rank must exhaust the iterator.

        Args:
            local: tensors of this rank's micro-batches, all of one shape
            total: number of micro-batches of all ranks
        """
        if self.count == 1:
            yield from local
            return
        group = self.batches_per_forward(total)
        size = self.run_on_first(lambda: local[0].nbytes)
        groups = MAX_EXCHANGE_BYTES // max(1, size * group * self.count)  # of one rank in one exchange
        groups = max(1, min(groups, -(-total // (group * self.count))))
        indices = self.local_batches(total)
        for start in range(0, total, groups * group * self.count):
            batches = range(start, min(start + groups * group * self.count, total))
            sent: list[Tensor | None] = [local[place] for place, index in enumerate(indices) if index in batches]
            sent += [None] * (groups * group - len(sent))
            received = [iter(tensors) for tensors, _ in self.all_gather_tensors(sent)]
            for index in batches:
                tensor = next(received[self.owner(index, total)])
                assert tensor is not None
                yield tensor

    def run_on_first(self, run: Callable[[], Any]) -> Any:
        """Runs ``run`` on rank 0 and broadcasts its result, JSON values. Its UserError is raised on all ranks."""
        if self.count == 1:
            return run()
        outcome: dict[str, Any] = {}
        if self.is_first:
            try:
                outcome = {"value": run()}
            except UserError as error:
                outcome = {"error": str(error)}
        text = torch.tensor(list(json.dumps(outcome).encode()), dtype=torch.uint8)
        size = torch.tensor([len(text)])
        self._run(dist.broadcast, size, 0)  # on the CPU: no GPU has to wait for this
        text = text if self.is_first else torch.empty(int(size), dtype=torch.uint8)
        self._run(dist.broadcast, text, 0)
        outcome = json.loads(bytes(text.tolist()))
        if "error" in outcome:
            raise UserError(outcome["error"])
        return outcome["value"]

    def run_on_all(self, run: Callable[[], Any]) -> None:
        """Runs ``run`` on every rank. A UserError of one rank is raised on all."""
        message = ""
        try:
            run()
        except UserError as error:
            if self.count == 1:
                raise
            message = str(error)
        text = torch.frombuffer(bytearray(message.encode()), dtype=torch.uint8) if message else None
        for (received,), _ in self.all_gather_tensors([text]) if self.count > 1 else ():
            if received is not None:
                raise UserError(bytes(received.tolist()).decode())

    @staticmethod
    def _run(collective: Callable[..., object], *arguments: object) -> None:
        try:
            while _warm_ups and any(isinstance(x, Tensor) and x.is_cuda for x in arguments):
                _warm_ups.pop().result()
            collective(*arguments)
        except RuntimeError as error:  # the backend's, when another process has ended
            end(str(error))


SINGLE = Ranks()
"""A job of one process on the CPU."""


def _collective(name: str, old_name: str) -> Callable[..., object]:
    """A collective by its name since torch 2.13, which deprecates ``old_name``."""
    function: Callable[..., object] = getattr(dist, name, None) or getattr(dist, old_name)
    return function


def _header(tensor: Tensor | None) -> Tensor:
    """Dtype and shape of a tensor, int64 [_HEADER]. None has the dtype -1."""
    header = torch.full((_HEADER,), -1, dtype=torch.int64)
    if tensor is not None:
        header[: 2 + tensor.dim()] = torch.tensor([_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape])
    return header


def _bytes(header: list[int]) -> int:
    """Size of a tensor in bytes, from its header. 0 for None."""
    kind, dimensions, *sizes = header
    return 0 if kind < 0 else math.prod(sizes[:dimensions]) * _DTYPES[kind].itemsize


def _unpack(data: Tensor, start: int, header: list[int]) -> Tensor | None:
    """The tensor whose bytes begin at ``start`` of ``data`` (uint8), from its header."""
    kind, dimensions, *sizes = header
    if kind < 0:
        return None
    return data[start : start + _bytes(header)].view(_DTYPES[kind]).view(sizes[:dimensions])


def start_ranks(device: str) -> Ranks:
    """Joins the process group if torchrun started this process.

    Args:
        device: as the user named it. With GPUs, each rank gets one.

    Raises:
        UserError: there are fewer GPUs than processes on this machine.
    """
    picked = pick_device(device)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Ranks(device=picked)
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    local_count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if picked.type == "cuda":
        gpus = torch.cuda.device_count()
        if gpus < local_count:
            raise UserError(f"{local_count} processes and {gpus} GPUs: give torchrun --nproc-per-node {gpus}")
        picked = torch.device("cuda", local)
        torch.cuda.set_device(picked)
        # torchrun sets one thread a process, too few to read files. On a CPU the number of threads decides the bytes.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_count))
    end_on_sigterm()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    if picked.type == "cuda":
        _warm_ups.append(ThreadPoolExecutor(1).submit(_connect, picked))
    return Ranks(rank, count, picked, local_count)


_warm_ups: list[Future[None]] = []
"""First collectives on GPUs, which must end before others start."""


def _connect(device: torch.device) -> None:
    """Lets NCCL connect the ranks, which takes most of a second, while the job reads files."""
    torch.cuda.set_device(device)
    dist.all_reduce(torch.zeros(1, device=device))


def leave_ranks() -> None:
    """Leaves the process group at the end of a job, so that other ranks do not wait for this one."""
    for warm_up in _warm_ups:
        warm_up.exception()  # the job may have ended before the ranks were connected
    _warm_ups.clear()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
