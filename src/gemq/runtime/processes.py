"""How one of several processes started by torchrun ends, and which of them prints. Must not import torch."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import NoReturn

LOST = "another process of this job has ended"
GO_ON = "nothing is lost, gemq quantize goes on with --resume, gemq export when it is run again"

_failing = threading.Event()
_ending = threading.Lock()


def is_first() -> bool:
    """Whether this process prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def before_failing() -> None:
    """Call before printing a UserError. Only rank 0 prints; other ranks exit silently."""
    _failing.set()
    if not is_first():
        time.sleep(10)  # torchrun ends this process as soon as the first has ended


def after_failing(code: int) -> None:
    """Call after printing a UserError. One of several processes exits here, at once.

    Interpreter shutdown takes seconds, in which another rank would print the same error.
    """
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def block_sigterm() -> None:
    """Blocks SIGTERM in this thread and in threads that it starts."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def end_on_sigterm() -> None:
    """Exits with one line on SIGTERM, which torchrun sends when another process has ended.

    A thread waits for the signal, since the main thread may wait in a collective, where Python handles no signals.
    Call before any other thread starts, except threads that called ``block_sigterm``.
    """
    block_sigterm()

    def watch() -> None:
        signal.sigwait({signal.SIGTERM})
        end()

    threading.Thread(target=watch, name="gemq-ranks", daemon=True).start()


def end(reason: str = "") -> NoReturn:
    """Exits the process at once. Other threads may wait in collectives that no exception reaches."""
    with _ending:  # only one thread prints
        if not _failing.is_set():
            lines = reason.strip().splitlines()
            why = f"the processes of this job no longer reach each other ({lines[0][:120]})" if lines else LOST
            print(f"gemq: {why}: {GO_ON}", file=sys.stderr, flush=True)
        os._exit(2 if _failing.is_set() else 1)
