"""gemq: quantization of Mixture-of-Experts models with a bit-width for every matrix of every expert.

``import gemq`` does not import torch or Transformers. It registers the packed format with Transformers, now or when
Transformers is imported later, so that ``AutoModelForCausalLM.from_pretrained`` loads packed checkpoints.
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
"""Modules that define the public names, which are imported on first use."""

_REGISTRY = "transformers.quantizers.auto"
"""The module in which Transformers registers quantizers."""


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'gemq' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def _register() -> None:
    """Register gemq's quantizer, which its module does when it is imported."""
    importlib.import_module("gemq.checkpoint.load")


class _RegisterAfterImport(MetaPathFinder):
    """Registers gemq's quantizer after Transformers' registry has been imported, then removes itself.

    Transformers has no entry points for quantizers, and importing it here would delay ``gemq --help`` by seconds.
    """

    _is_searching = False

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the registry's own specification, extended by the registration."""
        if fullname != _REGISTRY or self._is_searching:
            return None
        self._is_searching = True  # the search below asks this finder again
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._is_searching = False
        if spec is None or spec.loader is None:
            return None
        exec_module = spec.loader.exec_module

        def exec_then_register(module: ModuleType) -> None:
            exec_module(module)
            sys.meta_path.remove(self)
            _register()

        spec.loader.exec_module = exec_then_register  # type: ignore[method-assign]
        return spec


if _REGISTRY in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterAfterImport())
