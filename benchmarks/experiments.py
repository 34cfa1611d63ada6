"""The experiments of ``accuracy.py``: recipes under the names of their rows. Must not import what measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gemq.recipe_defaults import BUILT_IN

FINISH_KEYS = (
    *("bits", "stored_bits", "size", "progressive", "allocate", "layer_rule", "smoothing", "guard"),
    *("reconstruct", "compensate"),
    *("score_form", "score_labels", "score_tokens", "rescale"),
    *("reconstruction_epochs", "distill_epochs", "distill_loss", "distill_parameters"),
)
"""Recipe keys that do not change candidates. Recipes that differ in these alone share a work directory."""


@dataclass(frozen=True)
class Experiment:
    """A recipe under a name.

    Attributes:
        name: of its rows.
        keys: of the recipe.
        texts: calibrate on the texts, not on self-generated windows alone.
        reconstruct: reconstruct the model, instead of assembling the candidates.
    """

    name: str
    keys: dict[str, Any] = field(default_factory=dict)
    texts: bool = True
    reconstruct: bool = True


def uniform(bits: float, **keys: Any) -> dict[str, Any]:
    """Recipe keys of uniform widths."""
    return {"allocate": "uniform", "bits": bits, **keys}


LOW = {"effort": "low"}
"""Keys of experiments that train nothing."""

PLAIN = {**LOW, "compensate": False}
"""Keys of sequential GPTQ."""

SCORE_KEYS: dict[str, dict[str, Any]] = {
    "default": {},
    "smoothing 0": {"smoothing": 0},
    "smoothing 0.5": {"smoothing": 0.5},
    "smoothing 8": {"smoothing": 8},
    "smoothing 1e9": {"smoothing": 1e9},
    "elementwise": {"score_form": "elementwise", "allocate_by": "expert"},
    "by expert": {"allocate_by": "expert"},
    "labels of the text": {"score_labels": "data"},
    "all tokens": {"score_tokens": 0},
    "a quarter of the tokens": {"score_tokens": 65_536},
    "an eighth of the tokens": {"score_tokens": 32_768},
    "no rescaling": {"rescale": False},
    "layer rule": {"layer_rule": True},
    "layerwise": {"allocate": "layerwise"},
    "frequency": {"allocate": "frequency"},
    "uniform": {"allocate": "uniform"},
}
"""Ways to score and to allocate, by name."""

SETS: dict[str, list[Experiment]] = {
    "plain": [
        Experiment("plain uniform 2", uniform(2, **PLAIN)),
        # With the widths of the other rows, whose candidates it shares.
        Experiment("plain uniform 3", uniform(3, widths=[1, 1.6, 2, 3], **PLAIN)),
        Experiment("plain random 2.0", {"allocate": "random", "bits": 2, **PLAIN}),
        Experiment("plain random 1.5", {"allocate": "random", "bits": 1.5, **PLAIN}),
        Experiment("plain random 2.5", {"allocate": "random", "bits": 2.5, **PLAIN}),
        Experiment("low 2.0", {"bits": 2, **LOW}),
    ],
    "main": [
        Experiment("gemq 2.0", {"bits": 2}),
        Experiment("treated uniform 2", uniform(2)),
        Experiment("assembled 2.0", {"bits": 2}, reconstruct=False),
        Experiment("gemq 1.5", {"bits": 1.5}),
        Experiment("treated random 1.5", {"allocate": "random", "bits": 1.5}),
        Experiment("gemq 2.5", {"bits": 2.5}),
        Experiment("treated random 2.5", {"allocate": "random", "bits": 2.5}),
    ],
    "paper": [
        Experiment("paper 2.0", {**BUILT_IN["paper"], "bits": 2}),
        Experiment("paper 1.5", {**BUILT_IN["paper"], "bits": 1.5}),
        Experiment("paper 2.5", {**BUILT_IN["paper"], "bits": 2.5}),
    ],
    "methods": [
        Experiment(f"treated {method} {bits}", {"allocate": method, "bits": bits, "guard": False})
        for bits in (2.0, 1.5, 2.5)
        for method in ("frequency", "layerwise")
    ],
    "progressive": [
        Experiment("gemq 2.0 progressive", {"bits": 2, "progressive": [3.0, 2.5, 2.0]}),
        Experiment("gemq 1.5 progressive", {"bits": 1.5, "progressive": [2.5, 2.0, 1.5]}),
    ],
    "scores": [
        Experiment(f"assembled {bits} {name}", {"bits": bits, **keys}, reconstruct=False)
        for bits in (2.0, 1.5, 2.5)
        for name, keys in SCORE_KEYS.items()
    ],
    "self": [Experiment("self only 2.0", {"bits": 2}, texts=False)],
}
"""Experiments by the name of their set, for ``--set``."""

EXPERIMENTS = {experiment.name: experiment for experiments in SETS.values() for experiment in experiments}
"""All experiments by name, for ``--only``."""

CORE = (
    *("plain uniform 3", "plain uniform 2", "low 2.0", "treated uniform 2"),
    *("gemq 2.0", "assembled 2.0", "gemq 1.5", "gemq 2.5"),
)
SETS["core"] = [EXPERIMENTS[name] for name in CORE]
