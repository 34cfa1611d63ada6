"""How repetitive a text is: repeated n-grams, and loops that a text never leaves. Functions on token ids alone."""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 4
"""Length of the n-grams that are counted, in tokens."""

MAX_LOOP_PERIOD = 64
"""Longest cycle that counts as a loop, in tokens."""

MIN_LOOP_CYCLES = 3
"""Times that a cycle must be written to count as a loop."""

MIN_LOOP_TOKENS = 24
"""Length of the shortest loop. Rules and indentation repeat a token a few times in ordinary text."""


def repetition_rate(tokens: Sequence[int]) -> float | None:
    """Returns the share of a text's 4-grams that occur earlier in it, or None if it has fewer than four tokens.

    This is seq-rep-4 of Welleck et al., "Neural Text Generation with Unlikelihood Training" (arXiv:1908.04319).
    """
    count = len(tokens) - NGRAM + 1
    if count < 1:
        return None
    distinct = {tuple(tokens[start : start + NGRAM]) for start in range(count)}
    return 1 - len(distinct) / count


def loop_period(tokens: Sequence[int]) -> int | None:
    """Returns the length of the cycle that a text repeats up to its end, or None if it does not end in a loop.

    A text ends in a loop if its last tokens are a cycle of at most 64 tokens, written at least three times and over at
    least 24 tokens. The cycle is the shortest one, and need not be complete at the end of the text. A cycle in which a
    token changes, such as a number that counts up, is no loop.
    """
    for period in range(1, MAX_LOOP_PERIOD + 1):
        length = max(MIN_LOOP_CYCLES * period, MIN_LOOP_TOKENS)
        if length > len(tokens):
            return None
        tail = list(tokens[-length:])
        if tail[period:] == tail[:-period]:
            return period
    return None
