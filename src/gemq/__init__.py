"""gemq: quantization of Mixture-of-Experts models with a bit-width for every matrix of every expert.

``import gemq`` does not import torch or Transformers. It registers the packed format with Transformers, now or when
Transformers is imported later, so that ``AutoModelForCausalLM.from_pretrained`` loads packed checkpoints. Where gemq is
installed, ``import torch`` imports it (entry point ``torch.backends`` in pyproject.toml).
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from gemq.errors import UserError

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from gemq.allocation.problem import Allocation, Budget, Problem, allocate
    from gemq.checkpoint.contents import Contents
    from gemq.checkpoint.contents import inspect_checkpoint as inspect
    from gemq.checkpoint.dense_export import write_dense_checkpoint
    from gemq.checkpoint.load import load
    from gemq.evaluation.evaluate import evaluate_paths as evaluate
    from gemq.evaluation.generate import generate
    from gemq.pipeline.fit import Fit, FitRow
    from gemq.pipeline.plan import Plan, plan
    from gemq.pipeline.quantize import Result, export, quantize
    from gemq.pipeline.size_curve import Curve, CurvePoint, allocation_problem, size_curve
    from gemq.recipe import Recipe
    from gemq.runtime.progress import Monitor, StageCost

__version__ = "0.1.0"
__all__ = [
    "Allocation",
    "Budget",
    "Contents",
    "Curve",
    "CurvePoint",
    "Fit",
    "FitRow",
    "Monitor",
    "Plan",
    "Problem",
    "Recipe",
    "Result",
    "StageCost",
    "UserError",
    "allocate",
    "allocation_problem",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load",
    "plan",
    "quantize",
    "size_curve",
    "write_dense_checkpoint",
]

_LAZY = {
    "Allocation": "allocation.problem:Allocation",
    "Budget": "allocation.problem:Budget",
    "Contents": "checkpoint.contents:Contents",
    "Curve": "pipeline.size_curve:Curve",
    "CurvePoint": "pipeline.size_curve:CurvePoint",
    "Fit": "pipeline.fit:Fit",
    "FitRow": "pipeline.fit:FitRow",
    "Monitor": "runtime.progress:Monitor",
    "Plan": "pipeline.plan:Plan",
    "Problem": "allocation.problem:Problem",
    "Recipe": "recipe:Recipe",
    "Result": "pipeline.quantize:Result",
    "StageCost": "runtime.progress:StageCost",
    "allocate": "allocation.problem:allocate",
    "allocation_problem": "pipeline.size_curve:allocation_problem",
    "evaluate": "evaluation.evaluate:evaluate_paths",
    "export": "pipeline.quantize:export",
    "generate": "evaluation.generate:generate",
    "inspect": "checkpoint.contents:inspect_checkpoint",
    "load": "checkpoint.load:load",
    "plan": "pipeline.plan:plan",
    "quantize": "pipeline.quantize:quantize",
    "size_curve": "pipeline.size_curve:size_curve",
    "write_dense_checkpoint": "checkpoint.dense_export:write_dense_checkpoint",
}
"""Where the public names are defined. They are imported on first use."""

_REGISTRY = "transformers.quantizers.auto"
"""The module in which Transformers registers quantizers."""

_LOADING = "transformers.modeling_utils"
"""The module with ``from_pretrained``, which imports the registry."""


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'gemq' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    return getattr(importlib.import_module(f"gemq.{module}"), attribute)


def __dir__() -> list[str]:
    """List the public names, also those that are not imported yet."""
    return sorted([*globals(), *_LAZY])


def register() -> None:
    """Register the packed format with Transformers, now or as soon as Transformers is imported.

    Further calls have no effect. Imports neither torch nor Transformers. The module that loads checkpoints is imported
    when the first packed checkpoint is. torch calls this function at the end of ``import torch``.
    """
    registry = sys.modules.get(_REGISTRY)
    if not hasattr(registry, "get_hf_quantizer"):  # the last name in it: the module is not imported, or half
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
        return
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    from gemq.runtime.compat.transformers_private import register_deferred

    register_deferred("gemq", "gemq.checkpoint.load")


class _RegisterAfterImport:
    """A finder on ``sys.meta_path`` that calls ``register`` after Transformers' registry has been imported.

    Transformers has no entry points for quantizers, and importing it here would delay ``gemq --help`` by seconds. The
    registry may be half imported when torch imports gemq. ``register`` is then called after ``_LOADING``.
    """

    _is_searching = False

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the specification of one of the two modules, extended by the registration."""
        if fullname not in (_REGISTRY, _LOADING) or self._is_searching:
            return None
        from importlib.util import find_spec  # here, since most processes do not need it

        self._is_searching = True  # the search below asks this finder again
        try:
            spec = find_spec(fullname)
        finally:
            self._is_searching = False
        if spec is None or spec.loader is None:
            return None
        exec_module = spec.loader.exec_module

        def exec_then_register(module: ModuleType) -> None:
            exec_module(module)
            register()

        spec.loader.exec_module = exec_then_register  # type: ignore[method-assign]
        return spec


_finder: Any = _RegisterAfterImport()
register()
