"""A short run of the fuzzing harness. By hand, with more cases: ``python tests/fuzz/run.py --packed 2000 --jobs 8``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from fuzz import worker
from fuzz.parallel import run_in_processes

RUN = Path(__file__).with_name("run.py")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cases are forks with bounds on memory and time")


def test_no_case_fails():
    command = [sys.executable, RUN, "--packed", "8", "--source", "3", "--work", "5", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for cases in ("packed: 8 cases", "source: 3 cases", "work: 5 cases"):
        assert cases in done.stdout


# The harness itself


class Cases:
    """Cases that return, wait for ever, compute for ever, or end the process that runs them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def case(self, number: int) -> tuple[str, worker.Outcome]:
        if number == 3:
            os._exit(7)
        action = {1: self.wait, 2: self.compute}.get(number, lambda: worker.SAME)
        return f"damage {number}", worker.run(action)

    def wait(self) -> None:
        (self.folder / "pid").write_text(str(os.getpid()))
        time.sleep(600)

    def compute(self) -> None:
        while True:
            pass


def test_processes_report_in_order_and_end_cases_that_do_not_end(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "CPU_SECONDS", 1)
    monkeypatch.setattr(worker, "WALL_SECONDS", 3)
    results = list(run_in_processes(lambda index: Cases(tmp_path), range(6), jobs=2))
    kinds = [outcome.kind for _, outcome in results]
    assert kinds == [worker.SAME, worker.HANG, worker.HANG, worker.TRACEBACK, worker.SAME, worker.SAME]
    assert [damage for damage, _ in results] == [f"damage {n}" if n != 3 else "unknown damage" for n in range(6)]
    assert "exit code 7" in results[3][1].detail


def test_the_wall_limit_grows_on_a_loaded_machine(monkeypatch):
    monkeypatch.setattr(worker, "WALL_SECONDS", 0.3)
    monkeypatch.setattr(worker, "slowdown", lambda: 10.0)
    assert worker.run(lambda: time.sleep(1) or worker.SAME).kind == worker.SAME


def test_an_interrupt_leaves_no_process(tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with closing(run_in_processes(lambda index: Cases(tmp_path), [1, 1], jobs=2)) as results:
            signal.setitimer(signal.ITIMER_REAL, 2)
            with pytest.raises(KeyboardInterrupt):
                next(results)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    deadline = time.monotonic() + 10
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
