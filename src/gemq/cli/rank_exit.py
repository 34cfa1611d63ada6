"""How the command ends as one of several processes that torchrun started. Must not import torch.

Only the command line uses this, since these functions end the process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import NoReturn

from gemq.runtime.processes import is_first, ranks_started

RESUME_HINT = "nothing is lost, gemq quantize continues with --resume, and gemq export can be run again"

MAX_REASON_CHARACTERS = 120

WAIT_SECONDS = 10
"""How long a rank other than the first waits for torchrun to end it: until the first has printed the error."""

_is_reporting_error = threading.Event()
_exit_lock = threading.Lock()
"""Held by the thread that prints and ends the process."""


def before_error() -> None:
    """Call before printing a UserError. Only rank 0 prints; other ranks wait until torchrun ends them."""
    _is_reporting_error.set()
    if not is_first():
        time.sleep(WAIT_SECONDS)


def after_error(code: int) -> None:
    """Call after printing a UserError. Under torchrun, exits at once.

    Interpreter shutdown takes seconds, in which another rank would print the same error.
    """
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_on_sigterm() -> None:
    """Exit with one line on SIGTERM, which torchrun sends when another process has ended.

    A thread waits for the signal, since the main thread may wait in a collective, where Python handles no signals.
    Call before any other thread starts: threads inherit that the signal is blocked, so that only this one gets it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch() -> None:
        signal.sigwait({signal.SIGTERM})
        exit_after_lost_rank("another process of this job has ended")

    threading.Thread(target=watch, name="gemq-ranks", daemon=True).start()


def exit_after_unreachable_rank(error: Exception) -> NoReturn:
    """Exit with one line, after a collective has failed with ``error``."""
    first_line = str(error).strip().partition("\n")[0][:MAX_REASON_CHARACTERS]
    exit_after_lost_rank(f"the processes of this job no longer reach each other ({first_line})")


def exit_after_lost_rank(reason: str) -> NoReturn:
    """Exit at once, with one line. Other threads may wait in collectives that no exception reaches."""
    with _exit_lock:
        is_reporting_error = _is_reporting_error.is_set()
        if ranks_started.is_set() and not is_reporting_error:
            print(f"gemq: {reason}: {RESUME_HINT}", file=sys.stderr, flush=True)
        os._exit(2 if is_reporting_error else 1)
