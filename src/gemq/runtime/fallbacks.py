"""Optional accelerations that failed: they are counted here and shown once at the end of a command.

They depend on interfaces of other libraries that may change without notice. When one fails, for whatever reason, plain
code computes the same result more slowly. Must not import torch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gemq.errors import UserError
from gemq.runtime.processes import RankLostError

DESCRIPTIONS = {
    "norms_not_fused": "times norms kept the model's own code: the fused kernel could not take over",
    "rotary_not_fused": "times rotary positions kept the model's own code: the fused kernel could not take over",
    "layers_read_through_host": "times a layer was read through host memory: reading it straight to the GPU failed",
    "usage_unknown": "times experts on the GPU were chosen without counts of their tokens in allocation.json",
    "cache_grows": "times the key-value cache grew step by step: it could not be allocated ahead",
}


@dataclass
class Fallback:
    """How often an acceleration failed, and the first reason."""

    count: int
    reason: str


_fallbacks: dict[str, Fallback] = {}
_lock = threading.Lock()
"""Layers are read in a thread."""


def record(name: str, error: BaseException) -> None:
    """Count one failure of an acceleration. ``name`` is a key of ``DESCRIPTIONS``."""
    with _lock:
        _fallbacks.setdefault(name, Fallback(0, first_line(error))).count += 1


@contextmanager
def optional(name: str) -> Iterator[None]:
    """Record any error that the block raises, an acceleration, and continue after it.

    A UserError is not caught: it is about the user's files, which plain code reads as well. Nor is the loss of a rank.
    """
    try:
        yield
    except (UserError, RankLostError):
        raise
    except Exception as error:  # noqa: BLE001 - other libraries may raise anything
        record(name, error)


def pop_fallbacks() -> dict[str, Fallback]:
    """Return what was recorded since the last call, by name."""
    with _lock:
        fallbacks = dict(_fallbacks)
        _fallbacks.clear()
    return fallbacks


def pop_messages() -> list[str]:
    """Return what was recorded since the last call as one line each: the count and the first reason."""
    return [f"{fallback.count} {DESCRIPTIONS[name]} ({fallback.reason})" for name, fallback in pop_fallbacks().items()]


def first_line(error: BaseException) -> str:
    """Format type and message of an error in one line of at most 300 printable characters."""
    line = " ".join(f"{type(error).__name__}: {error}".split())[:300].removesuffix(":")
    return "".join(character if character.isprintable() else "?" for character in line)
