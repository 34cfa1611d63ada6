"""Runs one case in a forked process, with bounds on time and memory, and sorts out how it ended.

A fork starts with everything imported, so that a case costs little more than what it does.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEMORY = 2 << 30
"""Bytes that a case may take beyond what the parent holds."""

CPU_SECONDS, WALL_SECONDS = 60, 120
"""Limits of a case. The second is multiplied by ``slowdown``, the first does not depend on other processes."""

SLOWDOWN_CPU_SECONDS = 0.2
"""What ``slowdown`` computes for."""

PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""

REFUSED, SAME, CHANGED = "refused", "same", "changed"
SILENT, TRACEBACK, HANG, MEMORY_OVER, NOISE = "silent change", "traceback", "hang", "memory", "noise"
FAILURES = (SILENT, TRACEBACK, HANG, MEMORY_OVER, NOISE)
"""Outcomes that no case may have. ``noise``: an error message of several lines, or of none."""


@dataclass(frozen=True)
class Outcome:
    """kind: one of the above; detail: the refusal, the traceback, or what else tells how it ended"""

    kind: str
    detail: str = ""


def run(action: Callable[[], Any]) -> Outcome:
    """Runs ``action`` in a fork. It returns ``same`` or ``changed``, or raises: UserError is a refusal."""
    from gemq.errors import UserError

    read_end, write_end = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as errors:
        pid = os.fork()
        if pid == 0:
            try:
                _limit(errors.fileno())
                try:
                    result: Any = [action(), ""]
                except UserError as error:
                    result = [REFUSED, str(error)]
                except MemoryError:
                    result = [MEMORY_OVER, traceback.format_exc()]
                except BaseException:  # noqa: BLE001
                    result = [TRACEBACK, traceback.format_exc()]
                sys.stderr.flush()
                os.write(write_end, json.dumps(result).encode()[:60_000])
            finally:
                os._exit(0)
        os.close(write_end)
        text, hung = _read(read_end, pid)
        os.close(read_end)
        _, status, usage = os.wait4(pid, 0)
        errors.seek(0)
        printed = errors.read(100_000).decode("utf-8", "replace")
    return _sorted_out(text, hung, status, usage.ru_maxrss << 10, printed)


def prepare(action: Callable[[], Any]) -> Any:
    """Runs ``action`` in a fork and returns its result. For jobs that cases start from.

    A job in this process would leave threads (HiGHS has a pool of them), for which cases in a fork would wait.
    """
    outcome = run(action)
    assert outcome.kind not in FAILURES, outcome
    return outcome.kind


def slowdown() -> float:
    """How many times as long as alone a process takes now, since others use the same cores."""
    begin, cpu_begin = time.monotonic(), time.process_time()
    while time.process_time() - cpu_begin < SLOWDOWN_CPU_SECONDS:
        pass
    return (time.monotonic() - begin) / SLOWDOWN_CPU_SECONDS


def die_with_parent() -> None:
    """Lets the kernel end this process when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def cli(arguments: list[Any], unchanged: Callable[[], bool] = lambda: True) -> str:
    """Runs ``gemq ARGUMENTS`` inside a case. A refusal must be one line on stderr and exit code 2."""
    from gemq.cli import run as run_cli
    from gemq.errors import UserError

    code = run_cli([str(argument) for argument in arguments])
    if code == 2:
        raise UserError("<stderr>")  # what was printed is looked at by the parent
    if code:
        raise RuntimeError(f"exit code {code}")
    return SAME if unchanged() else CHANGED


def _limit(stderr: int) -> None:
    die_with_parent()
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.dup2(stderr, 2)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) << 10
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 10))  # at the second, the signal is SIGKILL
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # the driver's count of GPUs needs more addresses than a case has; torch warns, and says that there are none
    warnings.filterwarnings("ignore", message="CUDA initialization")


def _read(descriptor: int, pid: int) -> tuple[bytes, bool]:
    """What the child reports, and whether it had to be ended."""
    text, begin, seconds = b"", time.monotonic(), float(WALL_SECONDS)
    while True:
        remaining = begin + seconds - time.monotonic()
        if select.select([descriptor], [], [], max(0.0, remaining))[0]:
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                return text, False
            text += chunk
        elif (extended := WALL_SECONDS * slowdown()) > 1.2 * seconds:  # the machine is loaded
            seconds = extended
        else:
            os.kill(pid, signal.SIGKILL)
            return text, True


def _sorted_out(text: bytes, hung: bool, status: int, peak: int, printed: str) -> Outcome:
    if hung or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return Outcome(HANG, printed)
    if not text:
        ended = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {status}"
        return Outcome(TRACEBACK, f"the process ended with {ended}\n{printed}")
    try:
        kind, detail = json.loads(text)
    except ValueError:
        kind, detail = TRACEBACK, text.decode("utf-8", "replace")
    if peak > MEMORY:
        return Outcome(MEMORY_OVER, f"{peak / 1e9:.2f} GB\n{detail}\n{printed}")
    if kind == REFUSED and detail == "<stderr>":
        lines = [line for line in printed.splitlines() if line.strip()]
        if len(lines) != 1 or not lines[0].startswith("gemq: ") or not lines[0].isprintable():
            return Outcome(NOISE, printed)
        return Outcome(REFUSED, lines[0])
    if kind == REFUSED and "\n" in detail:
        return Outcome(NOISE, detail)
    return Outcome(kind, detail)
