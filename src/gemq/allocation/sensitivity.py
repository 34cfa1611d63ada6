"""Choice of the windows for measuring sensitivity. ``pipeline.sensitivity_stage`` measures it."""

from __future__ import annotations

from gemq.calibration.windows import Windows, concat_sources

MAX_TOKENS = 16_384
"""Upper bound for the tokens to measure on."""
TOKENS_DIVISOR = 4
"""At most one calibration token in this many is measured on."""


def measured_tokens(calibration_tokens: int) -> int:
    """Number of tokens to measure on."""
    return min(MAX_TOKENS, calibration_tokens // TOKENS_DIVISOR)


def measured_windows(windows: Windows, tokens: int) -> Windows:
    """The first windows of each source, equally many and at least one, with about ``tokens`` tokens in all."""
    count = max(1, tokens // windows.seq_len // len(windows.names))
    tokens_by_source = [source_tokens[:count] for source_tokens in windows.by_source()]
    return concat_sources(tokens_by_source, windows.names, windows.tokens_available)
