"""Calls into Transformers, and into code that a model brings, that end in one line whatever they raise.

A configuration or a tokenizer that is not as Transformers expects makes it raise nearly any exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from gemq.errors import UserError

MOST_CHARACTERS = 300
"""Of an exception's message that is shown."""


@contextmanager
def one_line_errors(problem: str, advice: str | Callable[[], str]) -> Iterator[None]:
    """Turns any exception into a UserError: the problem, the exception's first line, and what to do.

    UserErrors and exceptions for want of memory stay what they are. Wrap calls of others' code only.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise UserError(f"{problem} ({summary(error)}): install what is missing") from error
    except Exception as error:
        what_to_do = advice if isinstance(advice, str) else advice()
        raise UserError(f"{problem} ({summary(error)}): {what_to_do}") from error


def summary(error: Exception) -> str:
    """The first line of an exception's message; the next one, too, where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = lines[0] if not lines[0].endswith(":") else " ".join(lines[:2])
    if " " not in text:  # the message of a KeyError is the key alone
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text[:MOST_CHARACTERS]
