"""What the table of many hosts says of requests and blows."""

from __future__ import annotations

from benchmarks.many_hosts import Asked, Trouble, rows
from flowkv.bench.load import Arrival, Outcome

TROUBLES = [Trouble("host killed", 1, 10.0, 3.0, 2.0), Trouble("link cut", 0, 30.0, 8.0, 1.0)]


def asked(sent_s: float, got: list[int], *, num_attempts: int = 1, error: str | None = None) -> Asked:
    """It should get 1, 2, 3, a token per second."""
    outcome = Outcome(Arrival(sent_s, 5, 3), sent_s, status=200, token_ids=got, error=error)
    outcome.event_times_s = [1.0 + number for number in range(len(got))]
    outcome.ended_s = 1.0 + len(got)
    outcome.finish_reason = None if error else "length"
    return Asked(outcome, [1, 2, 3], num_attempts)


def test_a_blow_counts_for_the_requests_that_live_then() -> None:
    killed, cut, all_of_them = rows([asked(5.0, [1, 2, 3]), asked(9.0, [1, 2, 3], num_attempts=2)], TROUBLES)
    assert [row["what"] for row in (killed, cut, all_of_them)] == ["host killed", "link cut", "all"]
    assert (killed["requests"], killed["retried"], killed["longest_pause_s"].max) == (1, 1, 1.0)
    assert (cut["requests"], cut["times"], cut["back_s"].max) == (0, 1, 1.0)
    assert (all_of_them["requests"], all_of_them["times"], all_of_them["back_s"].num) == (2, 2, 2)


def test_each_token_is_compared() -> None:
    requests = [
        asked(0.0, [1, 2, 3]),
        asked(0.0, [1, 9, 3]),
        asked(0.0, [1, 2]),  # said to be complete
        asked(0.0, [1, 2, 3, 4]),
        asked(0.0, [1], error="no node"),  # what has come is right
        asked(0.0, [7], error="no node"),
    ]
    assert [one.num_wrong_tokens for one in requests] == [0, 1, 1, 1, 0, 1]
    *_, row = rows(requests, TROUBLES)
    assert (row["requests"], row["complete"], row["failed"], row["wrong_tokens"]) == (6, 4, 2, 4)
