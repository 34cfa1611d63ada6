"""Where kernel tests run: on the GPU, or without one in Triton's interpreter (see ``tests/conftest.py``)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="torch for CPUs comes without triton")
tl = interpreter.tl


class LoopBoundScope:
    """Lets interpreted kernels loop up to a number that they were given: NumPy 2.4 refuses Triton's ``int(array)``."""

    def __init__(self, scope: Any) -> None:
        self._scope = scope

    def set_attr(self, owner: Any, name: str, value: Any) -> None:
        self._scope.set_attr(owner, name, (lambda x: x.handle.data.item()) if name == "__index__" else value)


_patch_lang_tensor = interpreter._patch_lang_tensor
interpreter._patch_lang_tensor = lambda tensor, scope: _patch_lang_tensor(tensor, LoopBoundScope(scope))

# The interpreter computes whether additions and products overflow, and looks at the result in debug mode alone.
interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)


@functools.cache
def languages(function: Callable[..., Any]) -> tuple[Any, ...]:
    """The modules of Triton's language that a function sees."""
    return tuple(module for module in (tl, tl.core) if any(value is module for value in function.__globals__.values()))


def is_patched(language: Any) -> bool:
    """Whether the interpreter has replaced the functions of a language and the methods of its tensors."""
    return not (tl.core.is_builtin(language.load) or tl.core.is_builtin(language.tensor.__add__))


_patch_lang = interpreter._patch_lang


def patch_once(function: Callable[..., Any]) -> Any:
    """Replaces the language of a kernel, and not again for every function that it calls."""
    return interpreter._LangPatchScope() if all(map(is_patched, languages(function))) else _patch_lang(function)


interpreter._patch_lang = patch_once
