"""Defaults of a recipe: budget, candidate widths, what the efforts set, and built-in recipes. Must not import torch."""

from __future__ import annotations

from typing import Any

from gemq.quant.widths import AnyWidth, TrellisWidth, Width

DEFAULT_BITS = 2.0
"""The budget of a recipe without one."""

DEFAULT_WIDTHS: dict[str, tuple[AnyWidth, ...]] = {
    "affine": (Width.ONE_BIT, Width.TERNARY, Width.TWO_BIT, Width.THREE_BIT, Width.FOUR_BIT),
    "trellis": tuple(map(TrellisWidth.read, (1, 1.5, 2, 2.5, 3, 4))),
}
"""The candidate widths of a recipe without any, by kind of codes."""

WIDE_BUDGETS = {"affine": 2.5, "trellis": 2.2}
"""Only budgets above this many bits, and budgets in bytes, have the last of the default widths."""

FROM_EFFORT = -1
"""Marks an integer that the effort sets."""

BUDGETS = ("bits", "stored_bits", "size")
"""Keys of the budget. A recipe has at most one of them."""

TUNABLE = ("routers", "norms", "grids")
"""Kinds of parameters that distillation can train."""

EFFORTS: dict[str, dict[str, int]] = {
    "low": {"total_tokens": 0, "candidate_epochs": 0, "reconstruction_epochs": 0, "distill_epochs": 0},
    "medium": {"total_tokens": 1_048_576, "candidate_epochs": 1, "reconstruction_epochs": 1, "distill_epochs": 1},
    "high": {"total_tokens": 1_572_864, "candidate_epochs": 2, "reconstruction_epochs": 2, "distill_epochs": 2},
}
"""Values of keys that a recipe leaves to the effort. ``docs/accuracy.md`` has the measurements behind them."""

BUILT_IN: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "effort": "low",
        "codes": "affine",
        "equalize": False,
        "widths": [1, 2, 3],
        "hessian_shrinkage": 0.0,
        "score_weights": "rtn",
        "score_form": "elementwise",
        "score_labels": "data",
        "smoothing": 0.0,
        "rescale": False,
        "allocate_by": "expert",
        "layer_rule": True,
        "compensate": False,
        "progressive": [3.0, 2.5, 2.0],
        "guard": False,
        "distill_epochs": 1,
        "distill_loss": "next_token",
        "distill_parameters": ["routers"],
        "lr_tuned": 1e-4,
    },
}
"""Recipes by name. ``paper`` is GEMQ as published (arXiv:2605.23078)."""
