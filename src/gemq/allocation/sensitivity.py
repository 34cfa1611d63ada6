"""How many calibration tokens, and which windows, sensitivity is measured on (see ``pipeline.sensitivity_stage``)."""

from __future__ import annotations

from gemq.calibration.windows import Windows, from_parts

TOKENS, SHARE = 16_384, 4
"""Tokens that are measured on, at most one in ``SHARE`` of those that calibrate; of every source equally many."""


def measured_tokens(calibrated: int) -> int:
    """How many tokens are measured on where so many calibrate."""
    return min(TOKENS, calibrated // SHARE)


def measured_windows(windows: Windows, tokens: int) -> Windows:
    """The first windows of every source, equally many, up to ``tokens`` in all; at least one of each."""
    each = max(1, tokens // windows.window // len(windows.names))
    parts = [windows.tokens[windows.source == i][:each] for i in range(len(windows.names))]
    return from_parts(parts, windows.names, windows.tokens_available)
