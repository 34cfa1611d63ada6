"""Choice of the windows for measuring sensitivity. The measurement is in ``pipeline.sensitivity_stage``."""

from __future__ import annotations

from gemq.calibration.windows import Windows, from_parts

TOKENS, SHARE = 16_384, 4
"""Upper bounds for the tokens to measure on: a number, and one token in ``SHARE`` of the calibration tokens."""


def measured_tokens(calibrated: int) -> int:
    """Tokens to measure on, from the number of calibration tokens."""
    return min(TOKENS, calibrated // SHARE)


def measured_windows(windows: Windows, tokens: int) -> Windows:
    """The first windows of each source, equally many and at least one, about ``tokens`` tokens in all."""
    count = max(1, tokens // windows.window // len(windows.names))
    parts = [windows.tokens[windows.source == i][:count] for i in range(len(windows.names))]
    return from_parts(parts, windows.names, windows.tokens_available)
