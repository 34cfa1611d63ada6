"""Stages as the user sees them: a bar with time left, and what each stage took in seconds and memory.

Knows nothing of what the stages do.
"""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gemq.display import printable


class Tick(Protocol):
    """Moves a stage's bar: one step on, or to ``done`` of ``total``."""

    def __call__(self, done: int | None = None, total: int | None = None) -> None: ...


@dataclass
class StageCost:
    """What a stage took. A resumed stage adds to what it took before."""

    seconds: float = 0.0
    peak_gpu_bytes: int = 0
    peak_host_bytes: int = 0


@dataclass
class Monitor:
    """Shows stages on ``console`` (None: silent) and keeps what they cost."""

    console: Console | None = None
    stages: dict[str, StageCost] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)
    """Seconds that each stage of the whole job is expected to take: only their ratios count."""

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[Tick]:
        """One stage of ``steps`` steps; the block calls the yielded function after each."""
        cost = self.stages.setdefault(name, StageCost())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        try:
            with _HostPeak() as host, self._bar(name, steps) as tick:
                yield tick
        finally:
            cost.seconds += time.perf_counter() - begin
            cost.peak_host_bytes = max(cost.peak_host_bytes, host.peak)
            if torch.cuda.is_available():
                cost.peak_gpu_bytes = max(cost.peak_gpu_bytes, torch.cuda.max_memory_allocated())

    def seconds_left(self, name: str, seconds: float, share: float) -> float | None:
        """Seconds until the whole job ends, while stage ``name`` has taken ``seconds`` for a ``share`` of its steps.

        The stages to come are expected to be as much slower than expected as those so far were. None: not known.
        """
        if name not in self.expected or not share:
            return None
        done = [n for n in self.stages if n in self.expected and n != name]
        measured = sum(self.stages[n].seconds for n in done) + seconds
        expected = sum(self.expected[n] for n in done) + share * self.expected[name]
        order = list(self.expected)
        to_come = sum(self.expected[n] for n in order[order.index(name) + 1 :] if n not in self.stages)
        slower = measured / expected if expected > 0 else 1.0
        return seconds * (1 - share) / share + to_come * slower

    @contextmanager
    def _bar(self, name: str, steps: int) -> Iterator[Tick]:
        if self.console is None:
            yield lambda done=None, total=None: None
            return
        columns = (
            TextColumn("{task.description:<22}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[job]}", markup=False),
        )
        begin = time.perf_counter()
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(printable(name), total=steps, job="")

            def tick(done: int | None = None, total: int | None = None) -> None:
                if done is None:
                    progress.advance(task)
                else:
                    progress.update(task, completed=done, total=total)
                shown = progress.tasks[0]
                share = shown.completed / shown.total if shown.total else 0.0
                left = self.seconds_left(name, time.perf_counter() - begin, share)
                if left is not None:
                    progress.update(task, job=f"all: {timedelta(seconds=round(left))} left")

            yield tick


class _HostPeak:
    """Most memory that this process takes while the context is open: ``peak`` bytes, anonymous and pinned.

    Mapped files do not count: the kernel lets go of them when it wants to. Sampled, since the kernel keeps no record
    of the anonymous part alone.
    """

    SECONDS = 0.05

    def __init__(self) -> None:
        self.peak = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gemq-memory", daemon=True)

    def __enter__(self) -> _HostPeak:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._end.wait(self.SECONDS):
            self._sample()

    def _sample(self) -> None:
        self.peak = max(self.peak, host_bytes())


def host_bytes() -> int:
    """Bytes of this process's anonymous memory, and of PyTorch's pinned memory."""
    pinned = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) if torch.cuda.is_initialized() else 0
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024 + pinned
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
