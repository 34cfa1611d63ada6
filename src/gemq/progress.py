"""Stages as the user sees them: a bar with time left, and what each stage took in seconds and memory.

Knows nothing of what the stages do.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[Tick]:
        """One stage of ``steps`` steps; the block calls the yielded function after each."""
        cost = self.stages.setdefault(name, StageCost())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        _reset_host_peak()
        begin = time.perf_counter()
        try:
            with self._bar(name, steps) as tick:
                yield tick
        finally:
            cost.seconds += time.perf_counter() - begin
            cost.peak_host_bytes = max(cost.peak_host_bytes, _host_peak())
            if torch.cuda.is_available():
                cost.peak_gpu_bytes = max(cost.peak_gpu_bytes, torch.cuda.max_memory_allocated())

    @contextmanager
    def _bar(self, name: str, steps: int) -> Iterator[Tick]:
        if self.console is None:
            yield lambda done=None, total=None: None
            return
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(name, total=steps)

            def tick(done: int | None = None, total: int | None = None) -> None:
                if done is None:
                    progress.advance(task)
                else:
                    progress.update(task, completed=done, total=total)

            yield tick


def _reset_host_peak() -> None:
    """Starts the kernel's record of this process's peak memory anew, where the kernel allows it."""
    if sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return  # containers may forbid it: the peak is then that of the whole process so far


def _host_peak() -> int:
    """Peak resident bytes of this process."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
