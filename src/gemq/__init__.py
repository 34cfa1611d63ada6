"""gemq: Mixture-of-Experts models whose experts have bit-widths of their own, one for each matrix.

``import gemq`` is light: it loads neither torch nor Transformers. It makes Transformers know gemq
checkpoints, now or whenever Transformers is imported later, so that
``AutoModelForCausalLM.from_pretrained`` loads them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gemq.errors import UserError

if TYPE_CHECKING:
    from gemq.checkpoint.load import load
    from gemq.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "UserError", "load", "quantize"]

_LAZY = {"load": "gemq.checkpoint.load", "quantize": "gemq.pipeline.quantize", "Recipe": "gemq.recipe"}
_REGISTRY = "transformers.quantizers.auto"


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'gemq' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def _register() -> None:
    """The loader registers itself when imported; where its own import of Transformers led here, at its end."""
    importlib.import_module("gemq.checkpoint.load")


class _RegisterAfterImport(MetaPathFinder):
    """Registers gemq's quantizer right after Transformers' registry has been imported, then is gone.

    Transformers has no entry points for quantizers, and importing it here would cost ``gemq --help`` seconds.
    """

    _searching = False

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _REGISTRY or self._searching:
            return None
        self._searching = True  # the other finders shall answer
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_then_register(module: ModuleType) -> None:
            run(module)
            sys.meta_path.remove(self)
            _register()

        spec.loader.exec_module = run_then_register  # type: ignore[method-assign]
        return spec


if _REGISTRY in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterAfterImport())
