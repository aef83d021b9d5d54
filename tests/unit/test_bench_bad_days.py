"""What `benchmarks bad-days` makes of what it saw, and that its nodes lie so that it can be believed."""

from __future__ import annotations

from inspect import signature

import pytest

from benchmarks.bad_days import (
    DAYS,
    NUM_ELSEWHERE,
    Claims,
    Day,
    Seen,
    burst,
    by_day,
    figures_of,
    giants,
    idle,
)
from benchmarks.clusters import ONE_CORE, Pace
from flowkv.bench.load import Arrival, Outcome
from flowkv_common.wire.nodes import BlockCounts, RegimeChanged
from flowkv_node import reporting
from flowkv_scheduler.belief import why_untrue
from tests import described_nodes

SLOW = Day(trouble="slow", who="d0")
JOINS = Day(trouble="joins", who="d0")


def seen(*who: str, seconds: float = 40.0) -> Seen:
    """An assignment per second; each names p0 and one of these."""
    return Seen(0.0, seconds, [(float(at_s), {"p0", name}) for at_s, name in enumerate(who)])


def answered(kind: str, ttft_s: float) -> Outcome:
    done = Outcome(Arrival(0.0, 10, 2, kind), 0.0, status=200, finish_reason="length")
    done.token_ids, done.event_times_s = [1, 2], [ttft_s, ttft_s + 0.1]
    return done


def test_a_node_has_lost_its_work_when_so_many_go_elsewhere() -> None:
    before, elsewhere = ["d0"] * 24, ["d1"] * NUM_ELSEWHERE
    assert seen(*before, *elsewhere, "d0").moved_after_s(SLOW) == 3.0  # of 40 s the middle is at 20
    assert seen(*before, "d1", "d0", *elsewhere).moved_after_s(SLOW) == 5.0
    assert seen(*["d1"] * 50).moved_after_s(SLOW) == 0.0
    assert seen(*before, *elsewhere[1:]).moved_after_s(SLOW) is None  # that may be chance
    assert seen(*before, *elsewhere[1:], "d0", *elsewhere[1:]).moved_after_s(SLOW) is None


def test_a_node_that_joins_has_got_work_with_the_first_request() -> None:
    assert seen(*["d1"] * 23, "d0").moved_after_s(JOINS) == 3.0
    assert seen(*["d1"] * 50).moved_after_s(JOINS) is None


def test_the_share_is_of_the_last_seconds_of_arrivals() -> None:
    assert seen(*["d1"] * 30, *["d0"] * 4, *["d1"] * 6, *["d0"] * 9).share_at_the_end("d0") == 0.4
    assert seen().share_at_the_end("d0") == 0.0


def test_overload_lasts_until_it_is_over_or_nothing_comes_any_more() -> None:
    watched = seen(seconds=40.0)
    watched.regimes = [
        (5.0, "overload"),
        (7.0, "normal"),
        (30.0, "imbalance"),
        (37.0, "overload"),
        (41.0, "normal"),
    ]
    assert watched.overload_s() == 2.0 + 3.0
    watched.hear(RegimeChanged(epoch=1, before="normal", after="overload", reason="many wait"))
    assert watched.regimes[-1][1] == "overload"


def test_lies_are_told_where_nodes_ask_for_their_reports() -> None:
    asked = signature(reporting.load_report)
    with Claims().told():
        assert signature(reporting.load_report) == asked


def test_a_lie_is_one_that_the_scheduler_can_not_see_through() -> None:
    blocks = BlockCounts(total=256, free=6, cached=50, leased=200, quarantined=0, longest_free_run=6)
    busy = described_nodes.report(
        "d0",
        "decode",
        blocks=blocks,
        queued_prefill_tokens=900,
        interruptible_prefill_tokens=900,
        num_running=7,
    )
    told = idle(busy)
    assert why_untrue(told, described_nodes.descriptor("d0", "decode")) is None
    assert (told.queued_prefill_tokens, told.num_running, told.blocks.free) == (0, 0, 206)
    assert told.step is not None
    assert told.step.base_s == pytest.approx(ONE_CORE.base_s / 10)


def test_chats_are_counted_apart_from_what_disturbs_them() -> None:
    refused = Outcome(Arrival(0.0, 10, 2, "burst"), 0.0, status=429, error="wait", retry_after_s=3.0)
    outcomes = [answered("chat", 1.0), answered("chat", 6.0), answered("burst", 2.0), refused]
    row = figures_of(Day(), outcomes, seen())
    assert (row["good_percent"], row["chats_good_percent"]) == (50.0, 50.0)
    assert (row["num_refused"], row["num_chats_refused"]) == (1, 0)
    assert (row["chats_ttft_s"].num, row["chats_ttft_s"].max) == (2, 6.0)
    assert (row["share_at_the_end"], row["moved_after_s"]) == (None, None)


def test_a_table_has_a_line_for_each_day() -> None:
    rows = []
    for seed, moved_after_s in enumerate((0.0, None, 2.5)):
        for name in ("steady", "slow decode node"):
            row = figures_of(DAYS[name], [answered("chat", 1.0 + seed)], seen())
            rows.append({"day": name, **row, "pace": Pace(10, 0.01 * seed)})
        rows[-1]["moved_after_s"] = moved_after_s
    steady, slow = by_day(rows)
    assert (steady["day"], steady["moved after s"], steady["TTFT p50 s"]) == ("steady", None, 2.0)
    assert (slow["moved after s"], slow["worst pace"].slip) == ("0 never 2.5", 0.02)


def test_what_disturbs_comes_while_chats_do() -> None:
    assert {each.at_s for each in burst(20.0)} == {10.0}
    assert [each.at_s for each in giants(20.0)] == [4.0, 8.0]
