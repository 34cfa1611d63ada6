"""Runs cases in several processes. Each process makes its own checkpoints, so that no case can disturb another."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from fuzz import worker

Result = tuple[str, worker.Outcome]
"""What was done in a case, and how it ended."""

MakeCases = Callable[[int], Any]
"""Makes the object that runs cases, from the number of the process."""

FORK = multiprocessing.get_context("fork")
READY = "ready"


def run_in_processes(make_cases: MakeCases, numbers: Sequence[int], jobs: int) -> Iterator[Result]:
    """Runs cases and yields their results in the order of ``numbers``.

    Close the iterator to end the processes.

    Args:
        make_cases: called once in each process
        numbers: of the cases
        jobs: number of processes

    Raises:
        RuntimeError: a process ended before it could run cases.
    """
    pool = _Pool(make_cases, numbers)
    try:
        for _ in range(min(jobs, len(numbers))):
            pool.start_process()
        for number in numbers:
            while number not in pool.results:
                pool.wait()
            yield pool.results.pop(number)
    finally:
        pool.kill()


class _Pool:
    """Processes that run cases, and the results that have arrived."""

    def __init__(self, make_cases: MakeCases, numbers: Sequence[int]) -> None:
        self.results: dict[int, Result] = {}
        self._make_cases = make_cases
        self._unassigned = deque(numbers)
        self._num_started = 0
        self._processes: dict[Connection, Any] = {}
        self._running: dict[Connection, int] = {}  # number of the case

    def start_process(self) -> None:
        """Starts a process. It sends ``READY`` when it can run cases."""
        ours, theirs = FORK.Pipe()
        arguments = (self._make_cases, self._num_started, theirs)
        process = FORK.Process(target=_serve, args=arguments, daemon=True)
        self._num_started += 1
        process.start()
        theirs.close()
        self._processes[ours] = process

    def wait(self) -> None:
        """Waits for a message and assigns new cases. A process that ended is replaced, and its case has failed."""
        for connection in wait(list(self._processes)):
            assert isinstance(connection, Connection)
            try:
                message = connection.recv()
            except (EOFError, ConnectionError):
                self._replace(connection)
                continue
            if message != READY:
                self.results[self._running.pop(connection)] = message
            if self._unassigned:
                self._running[connection] = self._unassigned.popleft()
                connection.send(self._running[connection])
            else:
                self._processes.pop(connection).kill()

    def _replace(self, connection: Connection) -> None:
        """Starts another process in place of one that ended."""
        process = self._processes.pop(connection)
        process.join()
        if connection not in self._running:
            raise RuntimeError(f"a process ended before its first case, with exit code {process.exitcode}")
        outcome = worker.Outcome(worker.TRACEBACK, f"the harness itself ended with exit code {process.exitcode}")
        self.results[self._running.pop(connection)] = ("unknown damage", outcome)
        if self._unassigned:
            self.start_process()

    def kill(self) -> None:
        """Ends all processes. The kernel ends their cases with them."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.join()


def _serve(make_cases: MakeCases, index: int, connection: Connection) -> None:
    """Runs in a process: answers numbers of cases with their results."""
    worker.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends all processes
    cases = make_cases(index)
    connection.send(READY)
    while True:
        number = connection.recv()
        try:
            result = cases.case(number)
        except Exception:  # noqa: BLE001 - a mistake of the harness must not hide the other cases
            result = ("unknown damage", worker.Outcome(worker.TRACEBACK, traceback.format_exc()))
        connection.send(result)
