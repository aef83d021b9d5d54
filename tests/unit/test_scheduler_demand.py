"""What clients want: rates however much comes, bursts that come again, losses, lengths of outputs."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flowkv_common.wire.nodes import PRIOR_TOKENS, OutputForecast, length_class
from flowkv_scheduler.demand import MAX_KEPT, REMEMBERED_S, Demand, OutputLengths, Window

EVER = -1e9


def demand_of(rate: float, span_s: float, into: Demand | None = None, since: float = 0.0) -> Demand:
    """Requests of 100 to 199 tokens, evenly spaced, up to `since + span_s`."""
    demand = into or Demand()
    for number in range(round(rate * span_s)):
        demand.add_request(100 + number % 100, 0, 50, since + (number + 1) / rate)
    return demand


def rate_of(window: Window | None) -> float:
    assert window is not None
    return len(window.wanted) * window.stands_for / window.span_s


def test_without_requests_there_is_no_window() -> None:
    demand = Demand()
    assert demand.window(EVER, 10.0, 1, 400) is None
    demand.add_request(100, 0, 50, 10.0)
    assert demand.window(10.5, 11.0, 1, 400) is None
    assert demand.known_for_s(12.0) == 2.0


def test_a_window_holds_what_came_in_it_the_oldest_first() -> None:
    window = demand_of(2.0, 60.0).window(50.0, 60.0, 1, 400)
    assert window is not None
    assert [one.at for one in window.wanted] == [50.0 + number / 2 for number in range(21)]
    assert (window.stands_for, window.span_s, window.num_lost) == (1, 10.0, 0)


def test_a_window_of_too_many_is_of_the_newest_alone() -> None:
    window = demand_of(20.0, 50.0).window(0.0, 50.0, 1, 400)
    assert window is not None
    assert len(window.wanted) == 400
    assert window.span_s == pytest.approx(20.0, abs=0.1)
    assert rate_of(window) == pytest.approx(20.0, rel=0.01)


def test_a_window_does_not_reach_back_behind_the_first_request() -> None:
    """Else the rate would be too low while demand begins."""
    window = demand_of(2.0, 20.0, since=1000.0).window(900.0, 1020.0, 1, 400)
    assert rate_of(window) == pytest.approx(2.0, rel=0.05)


@settings(deadline=None, max_examples=25)
@given(
    rate=st.sampled_from([0.5, 3.0, 4.0, 13.0, 40.0, 160.0]),
    window_s=st.sampled_from([10.0, 40.0, 160.0]),
    stands_for=st.sampled_from([1, 2, 3, 7]),
)
def test_the_rate_of_a_window_is_true_however_few_are_kept(
    rate: float, window_s: float, stands_for: int
) -> None:
    """Of many requests some are kept: each for itself and for those that are not."""
    assume(rate * window_s >= 2 * stands_for)
    now = min(320.0, 8000 / rate)
    window = demand_of(rate, now).window(now - window_s, now, stands_for, 400)
    assert window is not None
    assert window.stands_for == stands_for
    # One kept too many, or too few, at the borders.
    least_err = 2 * max(stands_for, 4 * rate * REMEMBERED_S / MAX_KEPT) / (rate * window.span_s)
    assert rate_of(window) == pytest.approx(rate, rel=0.03 + least_err)
    # It comes as often as usual.
    assert window.period_s == pytest.approx(window.span_s, rel=0.03 + least_err)


def test_the_rate_stays_true_when_it_rises_and_falls() -> None:
    demand, now = Demand(), 0.0
    for rate in (1.0, 50.0, 8.0, 4.0):
        demand_of(rate, 100.0, into=demand, since=now)
        now += 100.0
        assert rate_of(demand.window(now - 40.0, now, 1, 400)) == pytest.approx(rate, rel=0.15)


def test_memory_is_bounded() -> None:
    demand = demand_of(200.0, 100.0)
    assert len(demand._kept) <= MAX_KEPT


def burst(demand: Demand, at: float, num: int = 60) -> None:
    for _ in range(num):
        demand.add_request(100, 0, 50, at)


def test_a_first_burst_is_news_and_taken_to_go_on() -> None:
    demand = demand_of(0.5, 100.0)
    burst(demand, 100.0)
    window = demand.window(90.0, 100.5, 1, 400)
    assert window is not None
    assert window.period_s == window.span_s


def test_a_burst_as_there_were_before_is_not_taken_to_go_on() -> None:
    """What follows is as much as usual: it comes again after as many seconds as bursts are apart."""
    demand = Demand()
    for at in range(30, 300, 30):
        burst(demand, float(at))
    window = demand.window(260.5, 270.5, 1, 400)
    assert window is not None
    assert (len(window.wanted), window.span_s) == (60, 10.0)
    assert window.period_s == pytest.approx(30.0, rel=0.2)
    # A much larger one is news.
    burst(demand, 271.0, num=100)
    window = demand.window(261.5, 271.5, 1, 400)
    assert window is not None
    assert window.period_s == window.span_s


def test_losses_are_those_of_the_window() -> None:
    demand = demand_of(1.0, 100.0)
    for at in (10.0, 95.0, 99.0):
        demand.add_loss(at)
    lost = [demand.window(since, 100.0, 1, 400) for since in (0.0, 90.0, 98.0)]
    assert [window and window.num_lost for window in lost] == [3, 2, 1]


def test_losses_are_counted_however_many_there_are() -> None:
    demand = demand_of(100.0, 100.0)
    for number in range(10_000):
        demand.add_loss(number / 100)
    lost = [demand.num_lost(since) for since in (0.0, 60.0)]
    assert lost == pytest.approx([10_000, 4000], rel=0.02)
    demand.add_loss(99.5 + REMEMBERED_S)
    assert demand.num_lost(EVER) < 200, "what is too long ago is forgotten"


def test_one_that_stands_for_others_tells_no_more_than_once() -> None:
    few, many = (demand_of(rate, 100.0).window(60.0, 100.0, 1, 4000) for rate in (2.0, 40.0))
    assert few is not None
    assert many is not None
    assert few.num_distinct == len(few.wanted) == pytest.approx(80, abs=1)
    # Of 4,000 requests in these 100 s each fourth is kept, or each eighth.
    assert len(many.wanted) == pytest.approx(1600, abs=8)
    old = 1600 - MAX_KEPT  # of the newest each is kept
    assert many.num_distinct in [pytest.approx(MAX_KEPT + old / part, abs=2) for part in (4, 8)]


forecasts = st.none() | st.builds(
    lambda by_length: OutputForecast(tokens_left=0.0, first_ends_in=0.0, stop_rate=0.0, by_length=by_length),
    st.dictionaries(st.integers(1, 6), st.tuples(st.integers(1, 99), st.integers(1, 9999)), max_size=4),
)


@given(st.lists(st.tuples(st.integers(0, 3), forecasts), max_size=20))
def test_lengths_are_the_sum_of_the_last_forecast_of_each_node(
    told: list[tuple[int, OutputForecast | None]],
) -> None:
    """In whatever order nodes tell, come and go."""
    lengths, last = OutputLengths(), dict[int, OutputForecast | None]()
    for node, forecast in told:
        lengths.replace_forecast(last.get(node), forecast)
        last[node] = forecast
    known = [forecast.by_length for forecast in last.values() if forecast is not None]
    every = [pair for by_length in known for pair in by_length.values()]
    num_all, tokens_all = 1 + sum(pair[0] for pair in every), PRIOR_TOKENS + sum(pair[1] for pair in every)
    for key in range(1, 8):
        mine = [by_length[key] for by_length in known if key in by_length]
        num, tokens = sum(pair[0] for pair in mine), sum(pair[1] for pair in mine)
        mean = tokens / num if num else tokens_all / num_all
        assert lengths.mean_of(2**key - 1) == pytest.approx(max(1.0, mean))


def test_before_anything_is_known_outputs_have_a_usual_length() -> None:
    assert OutputLengths().mean_of(1000) == PRIOR_TOKENS


def test_prompts_of_one_class_share_their_mean() -> None:
    assert length_class(64) == length_class(127) != length_class(128)
    lengths = OutputLengths()
    lengths.replace_forecast(None, OutputForecast(0.0, 0.0, 0.0, by_length={length_class(64): (10, 70)}))
    assert lengths.mean_of(64) == lengths.mean_of(127) == 7.0
    assert lengths.mean_of(128) == pytest.approx((PRIOR_TOKENS + 70) / 11)
