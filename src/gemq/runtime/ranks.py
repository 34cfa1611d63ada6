"""Data-parallel processes of one job, started by torchrun: who computes what, and the collectives between them.

Micro-batches, experts and layers are divided among ranks. Rank 0 prints, and writes what all ranks computed together.
Sums over micro-batches are accumulated in the order of the micro-batches, so that they do not depend on the number of
ranks. A single process is the case of one rank, in which every collective returns its input.

If a process dies, torchrun sends SIGTERM to the others. A thread of each (``cli/rank_exit.py``) then prints one line
and ends its process. A collective may notice first, and raises ``RankLostError``.

Must not import models or stages.
"""

from __future__ import annotations

import itertools
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
from gemq.runtime.exchange_buffer import TensorLayout, buffer_offsets
from gemq.runtime.integers import ceil_div
from gemq.runtime.processes import RankLostError, ranks_started

TIMEOUT = timedelta(hours=12)
"""Timeout of a collective. Rank 0 may be solving, packing or writing.

A process that died is noticed earlier: torchrun then sends SIGTERM to the others (``cli/rank_exit.py``).
"""

GPU_BATCHES_PER_FORWARD, MIN_FORWARDS = 4, 16
"""Micro-batches in one forward of a layer on a GPU, as long as at least ``MIN_FORWARDS`` forwards remain to divide."""

MAX_EXCHANGE_BYTES = 1 << 29
"""Upper bound for one all-gather. Larger exchanges amortize launch and synchronization."""


def batches_per_forward(total: int, limit: int) -> int:
    """Return how many of ``total`` micro-batches share a forward: at most ``limit``, and leaving ``MIN_FORWARDS``."""
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
        """Return how many consecutive micro-batches, of ``total``, one rank runs in one forward.

        Independent of the number of ranks, since results depend on it.
        """
        return batches_per_forward(total, self.max_batches_per_forward)

    def local_batches(self, total: int) -> list[int]:
        """Return the indices of this rank's micro-batches."""
        return [index for index in range(total) if self.owner(index, total) == self.rank]

    def owner(self, index: int, total: int) -> int:
        """Return the rank that runs micro-batch ``index`` of ``total``."""
        return index // self.batches_per_forward(total) % self.count

    @property
    def shards_windows(self) -> bool:
        """Whether training divides windows among ranks. Done on GPUs only, as its rounding differs from one rank's."""
        return self.count > 1 and self.device.type != "cpu"

    def slices(self, total: int) -> list[slice]:
        """Divide ``total`` experts, or other items that are not summed over, into one range for each rank."""
        edges = [total * rank // self.count for rank in range(self.count + 1)]
        return [slice(start, stop) for start, stop in itertools.pairwise(edges)]

    def local_slice(self, total: int) -> slice:
        """Return this rank's range of ``total`` items."""
        return self.slices(total)[self.rank]

    # Collectives

    def all_reduce(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over ranks, in place."""
        if self.count == 1:
            return
        for tensor in tensors:
            if self.count == 2 or tensor.device.type != "cpu":  # the sum of two terms does not depend on their order
                self._run(dist.all_reduce, tensor)
            else:  # gloo adds in no fixed order
                rows = self.all_gather(tensor.unsqueeze(0))
                tensor.copy_(sum(rows[1:], start=rows[0]))

    def all_reduce_coalesced(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sum of each tensor over ranks, with one exchange for each dtype."""
        if self.count == 1 or not tensors:
            return list(tensors)
        sums = list(tensors)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            indices = [index for index, tensor in enumerate(tensors) if tensor.dtype == dtype]
            flat = torch.cat([tensors[index].flatten() for index in indices])
            self.all_reduce(flat)
            chunks = flat.split([tensors[index].numel() for index in indices])
            for index, chunk in zip(indices, chunks, strict=True):
                sums[index] = chunk.view_as(tensors[index])
        return sums

    def all_gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks [count * R, ...], in the order of ranks. ``rows`` is [R, ...] on every rank."""
        if self.count == 1:
            return rows
        result = rows.new_empty(self.count * len(rows), *rows.shape[1:])
        self._run(_collective("all_gather_single", "all_gather_into_tensor"), result, rows.contiguous())
        return result

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        """Return this rank's [R, ...] of the sum over ranks of ``rows`` [count * R, ...], the gradient of a gather."""
        if self.count == 1:
            return rows
        if rows.device.type == "cpu":  # gloo adds in no fixed order
            self.all_reduce(rows)
            return rows.chunk(self.count)[self.rank]
        result = rows.new_empty(len(rows) // self.count, *rows.shape[1:])
        self._run(_collective("reduce_scatter_single", "reduce_scatter_tensor"), result, rows.contiguous())
        return result

    def all_reduce_int(self, value: int) -> int:
        """Return the sum of an integer over ranks."""
        total = torch.tensor([value])
        self.all_reduce(total)
        return int(total)

    def broadcast(self, tensor: Tensor | None, source: int) -> Tensor:
        """Return the tensor of rank ``source``, on every rank's device. Other ranks pass None."""
        if self.count == 1:
            assert tensor is not None
            return tensor
        layout = None
        if self.rank == source:
            assert tensor is not None
            tensor = tensor.detach().to(self.device).contiguous()
            layout = TensorLayout.of(tensor)
        layout = self._broadcast_object(layout, source)
        if self.rank != source:
            tensor = torch.empty(layout.shape, dtype=layout.dtype, device=self.device)
        assert tensor is not None
        self.broadcast_into(tensor, source)
        return tensor

    def broadcast_into(self, tensor: Tensor, source: int) -> None:
        """Overwrite a contiguous tensor, of one shape and dtype on all ranks, by that of rank ``source``."""
        if tensor.numel() and self.count > 1:
            flat = tensor.view(-1).view(torch.uint8)  # every backend takes bytes
            self._run(dist.broadcast, flat, source)

    def broadcast_slices(self, tensor: Tensor, rows: Sequence[slice]) -> None:
        """Complete ``tensor`` [N, ...], of which rank r has the rows ``rows[r]``."""
        if self.count == 1:
            return
        for source, rank_rows in enumerate(rows):
            if rank_rows.stop > rank_rows.start:
                self.broadcast_into(tensor[rank_rows], source)

    def all_gather_tensors(
        self, tensors: Sequence[Tensor | None], integers: Sequence[int] = ()
    ) -> list[tuple[list[Tensor | None], list[int]]]:
        """Return the tensors and integers of all ranks, in the order of ranks, on this rank's device.

        All tensors of a rank travel in one exchange, since a collective takes longer than transferring most of them.

        Args:
            tensors: of any shape and dtype, or None; as many on every rank
            integers: as many on every rank
        """
        if self.count == 1:
            return [(list(tensors), list(integers))]
        contiguous = [None if t is None else t.detach().to(self.device).contiguous() for t in tensors]
        layouts = [None if t is None else TensorLayout.of(t) for t in contiguous]
        headers = self._all_gather_object((layouts, list(integers)))
        size = max(buffer_offsets(rank_layouts)[-1] for rank_layouts, _ in headers)
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        for tensor, start in zip(contiguous, buffer_offsets(layouts), strict=False):
            if tensor is not None:
                buffer[start : start + tensor.nbytes].copy_(tensor.view(-1).view(torch.uint8))
        buffers = self.all_gather(buffer).chunk(self.count) if size else [buffer] * self.count
        results = []
        for rank_buffer, (rank_layouts, rank_integers) in zip(buffers, headers, strict=True):
            starts = buffer_offsets(rank_layouts)[:-1]
            rank_tensors = [
                None if layout is None else layout.view(rank_buffer, start)
                for layout, start in zip(rank_layouts, starts, strict=True)
            ]
            results.append((rank_tensors, rank_integers))
        return results

    def all_gather_cat(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Concatenate each tensor over ranks along its first dimension. One exchange for all of them."""
        if self.count == 1:
            return list(tensors)
        by_rank = [rank_tensors for rank_tensors, _ in self.all_gather_tensors(tensors)]
        return [torch.cat([t for t in same_tensor if t is not None]) for same_tensor in zip(*by_rank, strict=True)]

    def gather_micro_batches(self, local: Sequence[Tensor], total: int) -> Iterator[Tensor]:
        """Yield the tensor of every micro-batch in order, gathered from its owner.

        Runs collectives, so every rank must exhaust the iterator.

        Args:
            local: tensors of this rank's micro-batches, all of one shape
            total: number of micro-batches of all ranks
        """
        if self.count == 1:
            yield from local
            return
        batches_per_exchange = self._batches_per_exchange(local, total)
        indices = self.local_batches(total)
        for start in range(0, total, batches_per_exchange):
            batches = range(start, min(start + batches_per_exchange, total))
            sent: list[Tensor | None] = [local[row] for row, index in enumerate(indices) if index in batches]
            sent += [None] * (batches_per_exchange // self.count - len(sent))
            received = [iter(tensors) for tensors, _ in self.all_gather_tensors(sent)]
            for index in batches:
                tensor = next(received[self.owner(index, total)])
                assert tensor is not None
                yield tensor

    def _batches_per_exchange(self, local: Sequence[Tensor], total: int) -> int:
        """Return how many micro-batches of all ranks one exchange takes: as many for each rank."""
        batches_per_round = self.batches_per_forward(total) * self.count
        batch_bytes = self.run_on_first(lambda: local[0].nbytes)
        rounds = MAX_EXCHANGE_BYTES // max(1, batch_bytes * batches_per_round)
        total_rounds = ceil_div(total, batches_per_round)
        return max(1, min(rounds, total_rounds)) * batches_per_round

    def run_on_first(self, run: Callable[[], Any]) -> Any:
        """Call ``run`` on rank 0 and broadcast its result, which is pickled. Its UserError is raised on all ranks."""
        if self.count == 1:
            return run()
        value, message = None, None
        if self.is_first:
            try:
                value = run()
            except UserError as error:
                message = str(error)
        value, message = self._broadcast_object((value, message), 0)
        if message is not None:
            raise UserError(message)
        return value

    def run_on_all(self, run: Callable[[], Any]) -> None:
        """Call ``run`` on every rank. A UserError of one rank is raised on all."""
        if self.count == 1:
            run()
            return
        message = None
        try:
            run()
        except UserError as error:
            message = str(error)
        for rank_message in self._all_gather_object(message):
            if rank_message is not None:
                raise UserError(rank_message)

    def _broadcast_object(self, value: Any, source: int) -> Any:
        """Return the pickled ``value`` of rank ``source``. Goes through host memory: no GPU has to wait for it."""
        values = [value]
        self._run(dist.broadcast_object_list, values, source)
        return values[0]

    def _all_gather_object(self, value: Any) -> list[Any]:
        """Return the pickled ``value`` of every rank, in the order of ranks. Goes through host memory."""
        values: list[Any] = [None] * self.count
        self._run(dist.all_gather_object, values, value)
        return values

    @staticmethod
    def _run(collective: Callable[..., object], *arguments: object) -> None:
        """Run a collective, once the GPUs are connected if it needs them.

        Raises:
            RankLostError: the backend reports that another process cannot be reached.
            torch.OutOfMemoryError: this process has too little GPU memory for it.
        """
        try:
            while _warm_ups and any(isinstance(x, Tensor) and x.is_cuda for x in arguments):
                _warm_ups.pop().result()
            collective(*arguments)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if "out of memory" in str(error):  # NCCL allocates outside of PyTorch, and has no error of its own for this
                raise torch.OutOfMemoryError(str(error)) from error
            raise RankLostError(str(error)) from error


SINGLE = Ranks()
"""A job of one process on the CPU."""


def _collective(name: str, old_name: str) -> Callable[..., object]:
    """Return a collective by its name since torch 2.13, which deprecates ``old_name``."""
    function: Callable[..., object] = getattr(dist, name, None) or getattr(dist, old_name)
    return function


def start_ranks(device: str) -> Ranks:
    """Join the process group if torchrun started this process.

    Args:
        device: as the user named it. With GPUs, each rank gets one.

    Raises:
        UserError: there are fewer GPUs than processes on this machine.
    """
    picked = pick_device(device)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Ranks(device=picked)
    rank = int(os.environ["RANK"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if picked.type == "cuda":
        gpus = torch.cuda.device_count()
        if gpus < local_count:
            raise UserError(f"{local_count} processes and {gpus} GPUs: give torchrun --nproc-per-node {gpus}")
        picked = torch.device("cuda", local_rank)
        torch.cuda.set_device(picked)
        # torchrun sets one thread a process, too few to read files. On a CPU the number of threads decides the bytes.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_count))
    ranks_started.set()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    if picked.type == "cuda":
        _warm_ups.append(ThreadPoolExecutor(1).submit(_connect, picked))
    return Ranks(rank, count, picked, local_count)


_warm_ups: list[Future[None]] = []
"""First collectives on GPUs, which must end before others start."""


def _connect(device: torch.device) -> None:
    """Let NCCL connect the ranks, which takes most of a second, while the job reads files."""
    torch.cuda.set_device(device)
    dist.all_reduce(torch.zeros(1, device=device))


def leave_ranks() -> None:
    """Leave the process group at the end of a job, so that other ranks do not wait for this one."""
    for warm_up in _warm_ups:
        warm_up.exception()  # the job may have ended before the ranks were connected
    _warm_ups.clear()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
