"""Turns exceptions of Transformers, and of code that a model brings, into one-line errors.

A configuration or tokenizer that Transformers does not expect makes it raise almost any exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from gemq.errors import UserError

MAX_MESSAGE_LENGTH = 300


@contextmanager
def one_line_errors(problem: str, advice: str | Callable[[], str]) -> Iterator[None]:
    """Turns any exception into a UserError, except UserErrors and out-of-memory errors.

    Use it only around calls of code outside gemq.

    Args:
        problem: what went wrong
        advice: what to do, or a function that returns it
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise UserError(f"{problem} ({summary(error)}): install what is missing") from error
    except Exception as error:
        advice_text = advice if isinstance(advice, str) else advice()
        raise UserError(f"{problem} ({summary(error)}): {advice_text}") from error


def summary(error: Exception) -> str:
    """Returns the first line of an exception's message, with the next one if the first line ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    if text.endswith(":"):
        text = " ".join(lines[:2])
    if " " not in text:  # for example, the message of a KeyError is only the key
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text[:MAX_MESSAGE_LENGTH]
