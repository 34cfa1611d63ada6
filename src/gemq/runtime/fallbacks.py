"""Optional accelerations that raised and were left out: counted here, shown once at the end of a command.

They rest on interfaces of other libraries that change without notice. Whatever such a change raises, the plain way
computes the same result more slowly. Imports no torch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gemq.errors import UserError

TEXTS = {
    "norms_not_fused": "times norms kept the model's own code: the fused kernel could not take over",
    "rotary_not_fused": "times rotary positions kept the model's own code: the fused kernel could not take over",
    "layers_read_through_host": "times a layer was read through host memory: reading it straight to the GPU failed",
    "cache_grows": "times the key-value cache grew step by step: it could not be allocated ahead",
}


@dataclass
class Fallback:
    """How often an acceleration was left out, and the first reason."""

    count: int
    reason: str


_found: dict[str, Fallback] = {}
_lock = threading.Lock()  # layers are read in a thread


def record(name: str, error: BaseException) -> None:
    """Counts one use of an acceleration that raised ``error``. ``name`` is a key of ``TEXTS``."""
    with _lock:
        _found.setdefault(name, Fallback(0, first_line(error))).count += 1


@contextmanager
def optional(name: str) -> Iterator[None]:
    """Around an acceleration: whatever it raises is recorded, and the code behind goes on without it.

    A UserError passes: it is about the user's files, which the plain way reads as well.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - other libraries may raise anything
        record(name, error)


def take() -> dict[str, Fallback]:
    """What was recorded since the last call, by name."""
    with _lock:
        found = dict(_found)
        _found.clear()
    return found


def take_lines() -> list[str]:
    """``take`` as one line each, with the count and the first reason."""
    return [f"{found.count} {TEXTS[name]} ({found.reason})" for name, found in take().items()]


def first_line(error: BaseException) -> str:
    """Type and message of an error in one line of at most 300 characters, all of them printable."""
    line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return "".join(sign if sign.isprintable() else "?" for sign in line)
