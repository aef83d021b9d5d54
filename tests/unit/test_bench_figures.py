"""The figures of `flowkv bench` are vLLM's, and its picture holds what was measured."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from flowkv.bench.figures import distribution, figures_of
from flowkv.bench.load import Arrival, Outcome, Usage
from flowkv.bench.page import NUM_BARS, histogram, page
from flowkv.bench.traces import Targets


def outcome(sent_s: float, *times_s: float, status: int = 200, usage: Usage | None = None) -> Outcome:
    made = Outcome(Arrival(sent_s, 10, len(times_s)), sent_s, status=status, usage=usage)
    made.event_times_s = list(times_s)
    made.finish_reason = "length" if status == 200 else None
    made.error = None if status == 200 else "full"
    made.ended_s = times_s[-1] if times_s else 0.1
    return made


def test_definitions() -> None:
    """Two of three are complete, over 4 s; the server counts 5 tokens in the 3 events of the second."""
    counted = outcome(2.0, 0.5, 1.0, 2.0, usage=Usage(prompt_tokens=30, completion_tokens=5))
    found = figures_of([outcome(0.0, 0.1, 0.3), counted, outcome(1.0, status=429)], Targets(0.2, 1.0))
    assert (found.num_sent, found.num_complete, found.duration_s) == (3, 2, 4.0)
    assert found.requests_per_s == 0.5
    assert found.good_requests_per_s == 0.25  # the other one's first token is late
    assert found.output_tokens_per_s == (2 + 5) / 4.0
    assert found.input_tokens_per_s == (10 + 30) / 4.0
    assert found.ttft_ms.mean == pytest.approx(300.0)
    assert found.tpot_ms.max == pytest.approx(1e3 * 1.5 / 4)
    assert found.itl_ms.num == 3
    assert found.e2e_ms.max == pytest.approx(2000.0)
    assert found.errors == {"full": 1}


def test_percentiles_are_those_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    values = [0.3, 0.001, 0.7, 0.2, 0.9, 0.15]
    found = distribution(values)
    for percent, ours in ((50, found.median), (90, found.p90), (99, found.p99)):
        assert ours == pytest.approx(1e3 * float(numpy.percentile(values, percent)))
    assert distribution([]).num == 0


def test_a_picture_needs_nothing_else() -> None:
    outcomes = [outcome(float(n), 0.1 * n + 0.1, 0.2 * n + 0.2) for n in range(9)]
    drawn = page("<m> at http://h", "rate 1", figures_of(outcomes, Targets(1.0, 1.0)), outcomes)
    assert "&lt;m&gt;" in drawn
    assert drawn.count("<svg") == 5
    assert "src=" not in drawn
    assert "href=" not in drawn


def test_each_value_is_in_one_bar() -> None:
    values = [1.0] * 7 + [2.0] * 3
    bars = [float(one.attrib["height"]) for one in ET.fromstring(histogram("t", values)).iter("rect")]
    assert len(bars) == NUM_BARS
    tall, last = bars[NUM_BARS // 2], bars[-1]
    assert [height for height in bars if height] == [tall, last]
    assert last / tall == pytest.approx(3 / 7, abs=0.01)
    assert histogram("t", []) == ""
