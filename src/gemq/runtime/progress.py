"""Stages as the user sees them: how far they are, the time left, and what each took in seconds and memory.

A terminal shows a bar for each stage. Where lines stay (a file, a pipe, a notebook) a stage that takes long writes a
line now and then, and each stage one at its end. Must not import what the stages do.
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
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from gemq.runtime.display import printable

LINE_SECONDS = (10.0, 60.0)
"""Where lines stay: seconds until the first line of a stage, and between further ones."""

LONGEST_NAME, LONGEST_COUNT = len("calibration windows"), len("1536/1536")
LONGEST_TIMES = len("0:00:00, 0:00:00 left, all 0:00:00")
LONGEST_BAR, SHORTEST_BAR = 40, 5


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
    """Seconds that each stage of the whole job is expected to take, in order: only their ratios count."""
    rounds: dict[str, int] = field(default_factory=dict)
    """How often a stage is expected to run, where that is not once: such stages take turns."""
    _runs: dict[str, int] = field(default_factory=dict)
    """How often each stage has begun."""

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[Tick]:
        """One stage of ``steps`` steps; the block calls the yielded function after each."""
        cost = self.stages.setdefault(name, StageCost())
        self._runs[name] = self._runs.get(name, 0) + 1
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
        measured, expected = seconds, share * self._expected_run(name)
        for other in self.stages.keys() & self.expected.keys():
            runs = self._runs.get(other, 1) - (other == name)  # those that have ended
            if other != name or other in self.rounds:
                measured += self.stages[other].seconds
                expected += min(runs, self.rounds.get(other, 1)) * self._expected_run(other)
        to_come = sum(runs * self._expected_run(other) for other, runs in self._runs_to_come(name).items())
        slower = measured / expected if expected > 0 else 1.0
        return seconds * (1 - share) / share + to_come * slower

    def _expected_run(self, name: str) -> float:
        return self.expected[name] / self.rounds.get(name, 1)

    def _runs_to_come(self, name: str) -> dict[str, int]:
        """How often each stage will begin after this run of ``name``."""
        order = list(self.expected)
        place, turns = order.index(name), max(self.rounds.values(), default=0)
        first = min((order.index(other) for other in self.rounds), default=len(order))
        begun = self._runs.get(name, 1) if name in self.rounds else turns * (place > first)  # turns, with this one
        found = {}
        for number, other in enumerate(order):
            if other in self.rounds:
                found[other] = max(self.rounds[other] - (begun if number <= place else max(begun - 1, 0)), 0)
            elif other not in self.stages:  # what comes once among stages that take turns, comes in the last turn
                found[other] = int(number > place or (number > first and begun < turns))
        return found

    @contextmanager
    def _bar(self, name: str, steps: int) -> Iterator[Tick]:
        if self.console is None:
            yield lambda done=None, total=None: None
            return
        state = _State(printable(name), steps, lambda seconds, share: self.seconds_left(name, seconds, share))
        shown = _live_bar if self.console.is_interactive else _lines
        with shown(self.console, state):
            yield state.tick


@dataclass
class _State:
    """How far a stage is. job_left: seconds until the whole job ends, from those of the stage and its share done."""

    name: str
    steps: int
    job_left: Callable[[float, float], float | None]
    done: int = 0
    begin: float = field(default_factory=time.perf_counter)

    def tick(self, done: int | None = None, total: int | None = None) -> None:
        self.done = self.done + 1 if done is None else done
        self.steps = self.steps if total is None else total

    @property
    def count(self) -> str:
        return f"{self.done}/{self.steps}"

    @property
    def times(self) -> str:
        """``0:01:23, 0:02:10 left, all 0:12:30``: taken and left by the stage, left by the job, as far as known."""
        seconds = time.perf_counter() - self.begin
        share = self.done / self.steps if self.steps else 0.0
        if share >= 1 or not share:
            return _clock(seconds)
        text = f"{_clock(seconds)}, {_clock(seconds * (1 - share) / share)} left"
        left = self.job_left(seconds, share)
        return text if left is None else f"{text}, all {_clock(left)}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def _live_bar(console: Console, state: _State) -> Iterator[None]:
    """A bar that a thread keeps up to date, as wide as the terminal leaves beside name, count and times."""
    room = console.width - LONGEST_NAME - LONGEST_COUNT - LONGEST_TIMES - 3
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(min_width=LONGEST_NAME, no_wrap=True)),
        BarColumn(bar_width=max(SHORTEST_BAR, min(LONGEST_BAR, room))),
        TextColumn(
            "{task.fields[state].count}", table_column=Column(min_width=LONGEST_COUNT, no_wrap=True, justify="right")
        ),
        TextColumn("{task.fields[state].times}", table_column=Column(no_wrap=True)),
    )
    with _Bar(*columns, console=console) as progress:
        progress.add_task(state.name, total=state.steps, state=state)
        yield


class _Bar(Progress):
    """Takes how far a stage is from the task's ``state`` whenever it is drawn."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            task.completed, task.total = task.fields["state"].done, task.fields["state"].steps
        yield from super().get_renderables()


@contextmanager
def _lines(console: Console, state: _State) -> Iterator[None]:
    """A line at the end, and before that one now and then, from a thread: a step may take long."""
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
