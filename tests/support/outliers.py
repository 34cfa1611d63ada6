"""Variants of a model whose channels, neurons and values are all scaled by powers of two, with equal logits."""

from __future__ import annotations

from pathlib import Path

from outliers import Outliers, write_variant

MAX_EXPONENT = 9
"""Largest exponent of two."""

EVERYTHING = 1 << 30
"""More channels, neurons and values than any model has."""


def write_rescaled(model: Path, out: Path, seed: int) -> Path:
    """Writes such a variant to ``out``, and returns it. Its logits in float32 are compared with those of the model."""
    exponents = tuple(range(MAX_EXPONENT + 1))
    outliers = Outliers(
        seed=seed,
        channels=EVERYTHING,
        channel_exponents=exponents,
        neurons=EVERYTHING,
        neuron_exponents=exponents,
        values=EVERYTHING,
        value_exponents=exponents,
    )
    write_variant(model, out, outliers)
    return out
