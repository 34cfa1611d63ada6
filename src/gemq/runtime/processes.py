"""How a process that torchrun started among others ends, and which of them speaks. Loads no torch."""

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
    """Whether this process writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def before_failing() -> None:
    """Call before a user's mistake is told. Where all ranks find it, the first tells it, the others end in silence."""
    _failing.set()
    if not is_first():
        time.sleep(10)  # torchrun ends this process as soon as the first has ended


def after_failing(code: int) -> None:
    """Call after it has been told: one of several processes ends here, at once.

    To take apart all that was imported takes seconds, in which another process would tell the same.
    """
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def leave_signals() -> None:
    """That the process shall end is not told to this thread, nor to those that it starts."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def end_when_told() -> None:
    """Ends this process with one line when torchrun tells it that another has ended.

    A thread waits for the signal, since the main thread may be waiting for the other rank where Python sees no signal.
    Call before any other thread is started, but those that ``leave_signals``.
    """
    leave_signals()

    def watch() -> None:
        signal.sigwait({signal.SIGTERM})
        end()

    threading.Thread(target=watch, name="gemq-ranks", daemon=True).start()


def end(reason: str = "") -> NoReturn:
    """Ends the process at once, whose other threads may be waiting where no exception reaches them."""
    with _ending:  # the first to come here ends it
        if not _failing.is_set():
            lines = reason.strip().splitlines()
            why = f"the processes of this job no longer reach each other ({lines[0][:120]})" if lines else LOST
            print(f"gemq: {why}: {GO_ON}", file=sys.stderr, flush=True)
        os._exit(2 if _failing.is_set() else 1)
