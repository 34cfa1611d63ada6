"""What tests of ``gemq.runtime.compat`` share: failures name the function to correct, and no function lacks a test."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

CHECKED: set[tuple[ModuleType, str]] = set()
"""Names that a test is for."""


def relies_on(module: ModuleType, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a failed test say which function of ``module`` is to be corrected, and what breaks without it."""
    CHECKED.add((module, name))

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                test(*args, **kwargs)
            except (Exception, pytest.fail.Exception) as error:
                versions = f"PyTorch {torch.__version__}, Transformers {transformers.__version__}"
                advice = f"correct {name} in src/gemq/runtime/compat/{module.__name__.rpartition('.')[2]}.py"
                function = getattr(module, name)
                text = inspect.getdoc(function) if inspect.isfunction(function) else ""
                raise AssertionError(f"a private interface differs in {versions}: {advice}\n\n{text}") from error

        return run

    return decorate


def check_complete(module: ModuleType) -> None:
    """Fails if a function of ``module`` has no test, or a docstring that does not say what it relies on."""
    for name, function in vars(module).items():
        if inspect.isfunction(function) and inspect.unwrap(function).__module__ == module.__name__:
            assert (module, name) in CHECKED, f"{name} has no test"
            for phrase in ("Relies on: ", "Since ", "If "):
                assert phrase in str(function.__doc__), f"the docstring of {name} does not say {phrase!r}"
