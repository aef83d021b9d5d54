"""How long outputs become, from those that ended and those that run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv_common.wire.nodes import expected_tokens
from flowkv_node.measures import PRIOR_TOKENS, OutputLengths


def test_outputs_that_never_end_of_themselves_become_as_long_as_they_may() -> None:
    lengths = OutputLengths()
    for _ in range(1000):
        lengths.observe(16, stopped=False)
    assert lengths.forecast([(0, 16)]).tokens_left == pytest.approx(16, rel=0.01)
    assert lengths.forecast([(15, 1)]).tokens_left == pytest.approx(1, rel=0.01)


def test_outputs_that_end_of_themselves_show_how_long_they_become() -> None:
    """Whatever clients ask for: a chat's `max_tokens` is most often all that the window leaves."""
    lengths = OutputLengths()
    for _ in range(200):
        lengths.observe(50, stopped=True)
    assert lengths.forecast([(0, 8000)]).tokens_left == pytest.approx(50, rel=0.05)


def test_those_that_were_cut_short_do_not_pass_for_short_ones() -> None:
    """Half of them may have 10 tokens, and end there: the others still become a hundred."""
    lengths = OutputLengths()
    for _ in range(500):
        lengths.observe(10, stopped=False)
        lengths.observe(100, stopped=True)
    assert lengths.forecast([(0, 8000)]).tokens_left == pytest.approx(110, rel=0.05)


def test_before_anything_was_seen_a_chat_of_usual_length_is_expected() -> None:
    forecast = OutputLengths().forecast([(0, 100_000)])
    assert forecast.tokens_left == pytest.approx(PRIOR_TOKENS)
    assert forecast.stop_rate == pytest.approx(1 / PRIOR_TOKENS)


def test_what_is_long_past_is_forgotten() -> None:
    lengths = OutputLengths()
    for _ in range(1000):
        lengths.observe(10, stopped=True)
    for _ in range(1000):
        lengths.observe(200, stopped=True)
    assert lengths.forecast([(0, 8000)]).tokens_left == pytest.approx(200, rel=0.05)


def test_the_first_end_comes_sooner_the_more_there_are() -> None:
    lengths = OutputLengths()
    for _ in range(200):
        lengths.observe(100, stopped=True)
    alone, many = lengths.forecast([(0, 8000)]), lengths.forecast([(0, 8000)] * 50)
    assert many.first_ends_in == pytest.approx(alone.first_ends_in / 50, rel=0.1)
    assert lengths.forecast([(0, 8000), (14, 2)]).first_ends_in == pytest.approx(2, abs=0.1)


def test_without_sequences_nothing_is_left() -> None:
    forecast = OutputLengths().forecast([])
    assert (forecast.tokens_left, forecast.first_ends_in) == (0.0, 0.0)


@given(st.integers(0, 100_000), st.floats(1e-9, 1.0))
def test_nobody_is_expected_to_produce_more_than_it_may(max_tokens: int, stop_rate: float) -> None:
    expected = expected_tokens(max_tokens, stop_rate)
    assert 0.0 <= expected <= max_tokens * (1 + 1e-9)
    assert expected <= 1 / stop_rate + 1e-9
    assert expected_tokens(math.inf, stop_rate) == pytest.approx(1 / stop_rate)
    assert expected_tokens(max_tokens, 0.0) == max_tokens
