"""Repetition of written texts: 4-grams and loops."""

from __future__ import annotations

import pytest

from gemq.evaluation.repetition import loop_period, repetition_rate

PROSE = list(range(100, 300))
"""Tokens without any repetition."""


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        ([1, 2, 3], None),
        ([1, 2, 3, 4], 0),
        (PROSE, 0),
        ([7] * 13, 9 / 10),  # ten 4-grams, all the same
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # five 4-grams, the last one again
        ([*PROSE[:53], *PROSE[:50]], 47 / 100),
    ],
)
def test_repetition_rate_is_the_share_of_4_grams_written_earlier(tokens, rate):
    assert repetition_rate(tokens) == (None if rate is None else pytest.approx(rate))


@pytest.mark.parametrize("period", [1, 2, 7, 8, 9, 63, 64])
def test_a_cycle_up_to_the_end_is_a_loop_of_its_period(period):
    cycle = list(range(period))
    length = max(3 * period, 24)
    loop = [cycle[index % period] for index in range(length)]
    assert loop_period([*PROSE, *loop]) == period
    assert loop_period(loop) == period  # nothing but the loop
    assert loop_period([*PROSE, *loop, cycle[length % period]]) == period  # a token longer, so inside a cycle
    assert loop_period([*PROSE, *loop[1:]]) is None  # one token short
    assert loop_period([*PROSE, *loop, 999]) is None  # left before the end


def test_what_is_no_loop():
    assert loop_period([]) is None
    assert loop_period(PROSE) is None
    assert loop_period([*PROSE, *[5] * 23]) is None  # a rule or an indentation
    assert loop_period(list(range(65)) * 4) is None  # a cycle of 65 tokens
    counting = [token for number in range(30) for token in (1, 2, 1000 + number, 3)]
    assert loop_period(counting) is None


def test_the_shortest_period_is_reported():
    assert loop_period([*PROSE, *[1, 2, 1, 2] * 12]) == 2
    assert loop_period([*PROSE, *[1] * 64]) == 1
