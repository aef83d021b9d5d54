"""How long outputs become, from those that ended and those that run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv_common.wire.nodes import PRIOR_TOKENS, OutputForecast, expected_tokens, length_class
from flowkv_node.measures import MEMORY_OUTPUTS, OutputLengths, Survival

PROMPT = 100  # tokens of all prompts, where their length is not the matter


def mean_of(forecast: OutputForecast, num_prompt_tokens: int) -> float:
    outputs, tokens = forecast.by_length[length_class(num_prompt_tokens)]
    return tokens / outputs


@pytest.mark.parametrize("max_tokens", [1, 16, 200])
def test_outputs_that_never_end_of_themselves_become_as_long_as_they_may(max_tokens: int) -> None:
    lengths = OutputLengths()
    for _ in range(1000):
        lengths.observe(PROMPT, max_tokens, stopped=False)
    assert lengths.forecast([(PROMPT, 0, max_tokens)]).tokens_left == max_tokens
    assert lengths.forecast([(PROMPT, max_tokens - 1, 1)]).tokens_left == 1


def test_outputs_that_end_of_themselves_show_how_long_they_become() -> None:
    """Whatever clients ask for: a chat's `max_tokens` is most often all that the window leaves."""
    lengths = OutputLengths()
    for _ in range(200):
        lengths.observe(PROMPT, 50, stopped=True)
    forecast = lengths.forecast([(PROMPT, 0, 8000)])
    assert forecast.tokens_left == pytest.approx(50, rel=0.05)
    assert forecast.stop_rate == pytest.approx(1 / 50, rel=0.07)
    assert lengths.forecast([(PROMPT, 0, 8000), (PROMPT, 20, 8000)]).tokens_left == pytest.approx(80, rel=0.1)


def test_those_that_were_cut_short_do_not_pass_for_short_ones() -> None:
    """Half of them may have 10 tokens, and end there: the others still become a hundred."""
    lengths = OutputLengths()
    for _ in range(500):
        lengths.observe(PROMPT, 10, stopped=False)
        lengths.observe(PROMPT, 100, stopped=True)
    assert lengths.forecast([(PROMPT, 0, 8000)]).tokens_left == pytest.approx(105, rel=0.05)


def test_before_anything_was_seen_a_chat_of_usual_length_is_expected() -> None:
    forecast = OutputLengths().forecast([(PROMPT, 0, 100_000)])
    assert forecast.tokens_left == pytest.approx(PRIOR_TOKENS)
    assert forecast.stop_rate == pytest.approx(1 / PRIOR_TOKENS)
    assert forecast.by_length == {length_class(PROMPT): (1, PRIOR_TOKENS)}


def test_what_is_long_past_is_forgotten() -> None:
    lengths = OutputLengths()
    for _ in range(1000):
        lengths.observe(PROMPT, 10, stopped=True)
    for _ in range(MEMORY_OUTPUTS):
        lengths.observe(PROMPT, 200, stopped=True)
    assert lengths.forecast([(PROMPT, 0, 8000)]).tokens_left == pytest.approx(200, rel=0.05)


def test_outputs_of_short_and_of_long_prompts_are_told_apart() -> None:
    """Many of one kind don't push the few of another out of memory either."""
    lengths = OutputLengths()
    for _ in range(30):
        lengths.observe(3000, 20, stopped=True)
    for _ in range(1000):
        lengths.observe(PROMPT, 400, stopped=True)
    forecast = lengths.forecast([])
    assert forecast.by_length.keys() == {length_class(3000), length_class(PROMPT)}
    assert mean_of(forecast, PROMPT) == pytest.approx(400, rel=0.05)
    # Thirty, and one of the mean of all.
    assert mean_of(forecast, 3000) == pytest.approx((30 * 20 + 1 / forecast.stop_rate) / 31, rel=0.01)
    assert [forecast.by_length[length_class(num)][0] for num in (PROMPT, 3000)] == [MEMORY_OUTPUTS + 1, 31]
    assert lengths.forecast([(2100, 0, 8000)]).tokens_left == pytest.approx(mean_of(forecast, 3000), abs=0.1)
    assert lengths.forecast([(127, 0, 8000)]).tokens_left == pytest.approx(mean_of(forecast, PROMPT), abs=0.1)


@given(st.integers(1, 100_000))
def test_prompts_of_one_class_differ_by_at_most_a_factor_of_two(num_prompt_tokens: int) -> None:
    key = length_class(num_prompt_tokens)
    assert length_class(num_prompt_tokens + 1) in (key, key + 1)
    assert length_class(2 * num_prompt_tokens) == key + 1


def test_a_kind_of_which_none_has_ended_grows_with_what_runs() -> None:
    """Other outputs are short: these say by themselves, token by token, that they are not."""
    lengths = OutputLengths()
    for _ in range(MEMORY_OUTPUTS):
        lengths.observe(PROMPT, 20, stopped=True)
    means, left = [], []
    for produced in (0, 10, 100, 1000):
        forecast = lengths.forecast([(3000, produced, 8000)] * 32)
        means.append(mean_of(forecast, 3000))
        left.append(forecast.tokens_left / 32)
    assert means == sorted(means)
    assert means[0] < 60
    assert means[-1] > 1000
    assert 400 < left[-1] < 600  # half as much again as they have
    assert mean_of(lengths.forecast([(3000, 1000, 8000)]), PROMPT) == pytest.approx(20, rel=0.2)


def test_the_first_end_comes_sooner_the_more_there_are() -> None:
    lengths = OutputLengths()
    for _ in range(200):
        lengths.observe(PROMPT, 100, stopped=True)
    alone, many = (lengths.forecast([(PROMPT, 0, 8000)] * num) for num in (1, 50))
    assert many.first_ends_in == pytest.approx(alone.first_ends_in / 50, rel=0.1)
    assert lengths.forecast([(PROMPT, 0, 8000), (PROMPT, 14, 2)]).first_ends_in == pytest.approx(2, abs=0.1)


def test_without_sequences_nothing_is_left() -> None:
    forecast = OutputLengths().forecast([])
    assert (forecast.tokens_left, forecast.first_ends_in, forecast.by_length) == (0.0, 0.0, {})


prompts = st.sampled_from([1, 100, 120, 3000])


@given(
    st.lists(st.tuples(prompts, st.integers(1, 2000), st.booleans()), max_size=100),
    st.lists(st.tuples(prompts, st.integers(0, 2000), st.integers(1, 2000)), max_size=30),
)
def test_each_sequence_gets_a_token_more_and_none_more_than_it_may(
    ended: list[tuple[int, int, bool]], running: list[tuple[int, int, int]]
) -> None:
    lengths = OutputLengths()
    for num_prompt_tokens, num_tokens, stopped in ended:
        lengths.observe(num_prompt_tokens, num_tokens, stopped=stopped)
    forecast = lengths.forecast(running)
    most = [most for _, _, most in running]
    assert len(running) <= forecast.tokens_left <= sum(most)
    assert 0.0 <= forecast.first_ends_in <= min(most, default=0)
    assert 0.0 < forecast.stop_rate <= 1.0
    assert forecast.by_length.keys() == {length_class(one[0]) for one in (*ended, *running)}
    assert all(outputs >= 1 and tokens >= outputs for outputs, tokens in forecast.by_length.values())
    # A report is JSON, which knows neither: and what runs is not changed by telling of it.
    assert math.isfinite(sum(tokens for _, tokens in forecast.by_length.values()))
    assert lengths.forecast(running) == forecast


@given(st.integers(0, 100_000), st.floats(1e-9, 1.0))
def test_nobody_is_expected_to_produce_more_than_it_may(max_tokens: int, stop_rate: float) -> None:
    expected = expected_tokens(max_tokens, stop_rate)
    assert 0.0 <= expected <= max_tokens * (1 + 1e-9)
    assert expected <= 1 / stop_rate + 1e-9
    assert expected_tokens(math.inf, stop_rate) == pytest.approx(1 / stop_rate)
    assert expected_tokens(max_tokens, 0.0) == max_tokens


# --- the estimate of Kaplan and Meier ---------------------------------------------------------------

# Short ones, so that many are alike: tokens, and whether it ended with them. None ends without a token.
one_output = st.tuples(st.integers(1, 30), st.booleans()) | st.just((0, False))
outputs = st.lists(one_output, min_size=1, max_size=60)


def naive_shares(known: list[tuple[int, bool]]) -> list[float]:
    """For each number of tokens up to the longest the share of outputs that become longer."""
    shares, share = [], 1.0
    for length in range(max(length for length, _ in known) + 1):
        num_there = sum(other >= length for other, _ in known)
        num_ends = sum(is_end for other, is_end in known if other == length)
        share *= 1 - num_ends / num_there
        shares.append(share)
    return shares


@given(outputs)
def test_means_are_those_of_the_naive_estimate(known: list[tuple[int, bool]]) -> None:
    survival, shares = Survival(list(known)), naive_shares(known)
    longest = len(shares) - 1
    assert survival.mean == pytest.approx(max(1.0, sum(shares[:-1]) + shares[-1] * longest / 2))
    for produced in range(longest + 1):
        share = shares[produced]
        if share > 1e-9:
            left = (sum(shares[produced:-1]) + shares[-1] * longest / 2) / share
            assert survival.left_after(produced) == pytest.approx(max(1.0, left))


@given(outputs)
def test_what_runs_makes_the_mean_longer_than_if_it_ended_now(known: list[tuple[int, bool]]) -> None:
    mean = Survival(list(known)).mean
    assert math.isfinite(mean)
    assert mean >= sum(length for length, _ in known) / len(known) - 1e-9
    assert mean <= max(1.0, 1.5 * max(length for length, _ in known))


@given(outputs)
def test_while_none_has_ended_the_mean_is_half_as_long_again_as_the_longest(
    known: list[tuple[int, bool]],
) -> None:
    longest = max(length for length, _ in known)
    assert Survival([(length, False) for length, _ in known]).mean == max(1.0, 1.5 * longest)


@given(outputs)
def test_one_that_is_longer_becomes_longer_and_gets_a_token_at_least(known: list[tuple[int, bool]]) -> None:
    survival = Survival(list(known))
    longest = max(length for length, _ in known)
    assert survival.left_after(0) == pytest.approx(survival.mean)
    becomes = [produced + survival.left_after(produced) for produced in range(2 * longest + 3)]
    assert all(before <= after + 1e-6 for before, after in zip(becomes, becomes[1:], strict=False))
    for produced, length in enumerate(becomes):
        assert produced + 1 <= length <= max(produced + 1, 1.5 * max(produced, longest)) + 1e-6


def test_one_that_runs_was_still_there_when_others_of_its_length_ended() -> None:
    """Of two with 10 tokens one has ended: half of all become longer, not none."""
    for known in ([(10, True), (10, False)], [(10, False), (10, True)]):
        survival = Survival(known)
        assert survival.mean == 10 + 0.5 * 5
        assert survival.left_after(10) == 5
