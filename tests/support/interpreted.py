"""Where kernel tests run: on the GPU, or without one in Triton's interpreter (see ``tests/conftest.py``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="torch for CPUs comes without triton")


class LoopBoundScope:
    """Lets interpreted kernels loop up to a number that they were given: NumPy 2.4 refuses Triton's ``int(array)``."""

    def __init__(self, scope: Any) -> None:
        self._scope = scope

    def set_attr(self, owner: Any, name: str, value: Any) -> None:
        self._scope.set_attr(owner, name, (lambda x: x.handle.data.item()) if name == "__index__" else value)


_patch_lang_tensor = interpreter._patch_lang_tensor
interpreter._patch_lang_tensor = lambda tensor, scope: _patch_lang_tensor(tensor, LoopBoundScope(scope))
