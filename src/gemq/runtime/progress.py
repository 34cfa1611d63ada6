"""Progress of a job's stages: how far they are, the time left, and what each took in seconds and memory.

A terminal shows a bar for each stage. Where lines stay (a file, a pipe, a notebook), a long stage prints a line from
time to time, and each stage prints one at its end. Must not import what the stages do.
"""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain, repeat
from typing import Protocol

import psutil
import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from gemq.runtime.display import printable

LINE_SECONDS = (10.0, 60.0)
"""Where lines stay: seconds until the first line of a stage, and between further ones."""

NAME_WIDTH, COUNT_WIDTH = len("calibration windows"), len("1536/1536")
TIMES_WIDTH = len("0:00:00, 0:00:00 left, all 0:00:00")
MAX_BAR_WIDTH, MIN_BAR_WIDTH = 40, 5


class Tick(Protocol):
    """Moves a stage's bar: by one step, or to ``done`` of ``total``."""

    def __call__(self, done: int | None = None, total: int | None = None) -> None: ...


@dataclass
class StageCost:
    """What a stage took. A stage that runs again adds to it.

    Attributes:
        seconds: time of the stage
        peak_gpu_bytes: most bytes of tensors on the GPU
        peak_host_bytes: most bytes of anonymous and pinned memory of this process
    """

    seconds: float = 0.0
    peak_gpu_bytes: int = 0
    peak_host_bytes: int = 0


@dataclass
class Monitor:
    """Shows the progress of stages and records what they cost. Each job needs a new one.

    ``Monitor(rich.console.Console())`` shows a bar for each stage on a terminal, and lines in a file or a notebook.

    Attributes:
        console: where stages are shown; None: nowhere
        stages: cost of each stage so far
        expected: seconds that each stage of the job is expected to take, in order, of which only the ratios matter. A
            job with a console sets it
        rounds: how often each repeated stage is expected to run; such stages take turns. A job with a console sets it
    """

    console: Console | None = None
    stages: dict[str, StageCost] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    _runs: dict[str, int] = field(default_factory=dict)
    """How often each stage has begun."""

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[Tick]:
        """Show and record a stage. A job calls it as ``with monitor.stage("scores", 16) as tick``.

        Args:
            name: the stage
            steps: number of its steps

        Yields:
            A function to call after each step.
        """
        cost = self.stages.setdefault(name, StageCost())
        self._runs[name] = self._runs.get(name, 0) + 1
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        try:
            with _HostMemorySampler() as host, self._bar(name, steps) as tick:
                yield tick
        finally:
            cost.seconds += time.perf_counter() - begin
            cost.peak_host_bytes = max(cost.peak_host_bytes, host.peak)
            if torch.cuda.is_available():
                cost.peak_gpu_bytes = max(cost.peak_gpu_bytes, torch.cuda.max_memory_allocated())

    def seconds_left(self, name: str, seconds: float, share: float) -> float | None:
        """Estimate the seconds until the whole job ends.

        The ratio of measured to expected seconds so far is applied to what is still to come.

        Args:
            name: the stage that is running
            seconds: seconds that it has taken so far
            share: share of its steps that is done, from 0 to 1

        Returns:
            The estimate, or None if nothing is known about this stage.
        """
        if name not in self.expected or not share:
            return None
        measured = seconds
        expected = share * self._expected_run(name)
        for stage in self.stages.keys() & self.expected.keys():
            is_running = stage == name
            if is_running and stage not in self.rounds:
                continue
            ended_runs = self._runs.get(stage, 1) - int(is_running)
            measured += self.stages[stage].seconds
            expected += min(ended_runs, self.rounds.get(stage, 1)) * self._expected_run(stage)
        to_come = sum(runs * self._expected_run(stage) for stage, runs in self._runs_to_come(name).items())
        slowdown = measured / expected if expected > 0 else 1.0
        return seconds * (1 - share) / share + to_come * slowdown

    def _expected_run(self, name: str) -> float:
        """Return the seconds that one run of a stage is expected to take."""
        return self.expected[name] / self.rounds.get(name, 1)

    def _runs_to_come(self, name: str) -> dict[str, int]:
        """Return how often each stage will begin after the current run of ``name``."""
        order = list(self.expected)
        current = order.index(name)
        total_rounds = max(self.rounds.values(), default=0)
        first_repeated = min((order.index(stage) for stage in self.rounds), default=len(order))
        if name in self.rounds:
            begun_rounds = self._runs.get(name, 1)
        else:  # a stage that runs once among repeated ones belongs to the last round
            begun_rounds = total_rounds if current > first_repeated else 0
        runs = {}
        for position, stage in enumerate(order):
            if stage in self.rounds:
                begun = begun_rounds if position <= current else max(begun_rounds - 1, 0)
                runs[stage] = max(self.rounds[stage] - begun, 0)
            elif stage not in self.stages:
                is_in_last_round = position > first_repeated and begun_rounds < total_rounds
                runs[stage] = int(position > current or is_in_last_round)
        return runs

    @contextmanager
    def _bar(self, name: str, steps: int) -> Iterator[Tick]:
        """Show a stage on the console, if there is one, and yield the function that moves it."""
        if self.console is None:
            yield lambda done=None, total=None: None
            return
        state = _StageState(printable(name), steps, lambda seconds, share: self.seconds_left(name, seconds, share))
        show = _live_bar if self.console.is_interactive else _lines
        with show(self.console, state):
            yield state.tick


@dataclass
class _StageState:
    """How far a stage is.

    Attributes:
        name: of the stage
        steps: of the stage in total
        job_left: estimates the seconds until the job ends from the seconds of the stage and the share that is done
        done: steps that are done
        begin: when the stage began
    """

    name: str
    steps: int
    job_left: Callable[[float, float], float | None]
    done: int = 0
    begin: float = field(default_factory=time.perf_counter)

    def tick(self, done: int | None = None, total: int | None = None) -> None:
        """See ``Tick``."""
        self.done = self.done + 1 if done is None else done
        self.steps = self.steps if total is None else total

    @property
    def count(self) -> str:
        """Such as ``3/16``."""
        return f"{self.done}/{self.steps}"

    @property
    def times(self) -> str:
        """``0:01:23, 0:02:10 left, all 0:12:30``: taken and left by the stage, left by the job, as far as known."""
        seconds = time.perf_counter() - self.begin
        share = self.done / self.steps if self.steps else 0.0
        if share >= 1 or not share:
            return _clock(seconds)
        text = f"{_clock(seconds)}, {_clock(seconds * (1 - share) / share)} left"
        job_left = self.job_left(seconds, share)
        return text if job_left is None else f"{text}, all {_clock(job_left)}"


def _clock(seconds: float) -> str:
    """Format a duration as ``0:01:23``."""
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def _live_bar(console: Console, state: _StageState) -> Iterator[None]:
    """Show a bar that a thread updates, as wide as name, count and times allow."""
    bar_width = console.width - NAME_WIDTH - COUNT_WIDTH - TIMES_WIDTH - 3
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(min_width=NAME_WIDTH, no_wrap=True)),
        BarColumn(bar_width=max(MIN_BAR_WIDTH, min(MAX_BAR_WIDTH, bar_width))),
        TextColumn(
            "{task.fields[state].count}", table_column=Column(min_width=COUNT_WIDTH, no_wrap=True, justify="right")
        ),
        TextColumn("{task.fields[state].times}", table_column=Column(no_wrap=True)),
    )
    with _Bar(*columns, console=console) as progress:
        progress.add_task(state.name, total=state.steps, state=state)
        yield


class _Bar(Progress):
    """A bar that reads the task's ``state`` whenever it is drawn."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return what is drawn, up to date."""
        for task in self.tasks:
            task.completed, task.total = task.fields["state"].done, task.fields["state"].steps
        yield from super().get_renderables()


@contextmanager
def _lines(console: Console, state: _StageState) -> Iterator[None]:
    """Print a line at the end, and others before it from a thread, since a step may take long."""
    ended = threading.Event()

    def show() -> None:
        console.print(f"{state.name}: {state.count}, {state.times}", soft_wrap=True)

    def watch() -> None:
        for seconds in chain(LINE_SECONDS, repeat(LINE_SECONDS[-1])):
            if ended.wait(seconds):
                return
            show()

    thread = threading.Thread(target=watch, name="gemq-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        show()


class _HostMemorySampler:
    """Peak of the anonymous and pinned memory of this process while the context is open: ``peak``, in bytes.

    Mapped files do not count, since the kernel can drop their pages. The peak is sampled, as the kernel keeps no record
    of anonymous memory.
    """

    INTERVAL_SECONDS = 0.05

    def __init__(self) -> None:
        self.peak = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gemq-memory", daemon=True)

    def __enter__(self) -> _HostMemorySampler:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        """Sample until the context is closed."""
        while not self._end.wait(self.INTERVAL_SECONDS):
            self._sample()

    def _sample(self) -> None:
        """Update the peak."""
        self.peak = max(self.peak, host_bytes())


def host_bytes() -> int:
    """Return the bytes of this process's anonymous memory and of PyTorch's pinned memory."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pinned = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) if torch.cuda.is_initialized() else 0
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared + pinned  # shared: mapped files
