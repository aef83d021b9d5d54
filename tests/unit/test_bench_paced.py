"""What the benchmarks on paced nodes make of what they saw, and how they size their load."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import burst, overload, shift
from benchmarks.clusters import MAX_NUM_SEQS, ONE_CORE, Pace, capacity
from benchmarks.report import Report, make_parser
from benchmarks.simulator.batch import slowed
from flowkv.bench.load import Arrival, Lengths, Outcome
from flowkv_common.wire.nodes import StepFit
from tests.paced.engine import Kept

FIT = StepFit(base_s=0.5, prefill_token_s=0.001, attended_token_s=0.0, sequence_s=0.05, context_token_s=0.0)


def test_capacity_is_that_of_the_side_that_is_full_first() -> None:
    """A prompt of 500 tokens takes 1 s; a step of 32 sequences takes 2.1 s."""
    found = capacity(FIT, num_prefill=3, num_decode=2, lengths=Lengths(500, 10))
    assert found.prefill_per_s == pytest.approx(3.0)
    assert found.decode_per_s == pytest.approx(2 * MAX_NUM_SEQS / (2.1 * 10))
    assert found.per_s == found.prefill_per_s
    assert capacity(FIT, 3, 2, Lengths(500, 100)).per_s == pytest.approx(2 * MAX_NUM_SEQS / (2.1 * 100))


def test_stretched_nodes_do_as_much_less() -> None:
    lengths = Lengths(300, 60)
    whole, half = (capacity(fit, 2, 2, lengths) for fit in (ONE_CORE, slowed(ONE_CORE, 2.0)))
    assert half.prefill_per_s == pytest.approx(whole.prefill_per_s / 2)
    assert half.decode_per_s == pytest.approx(whole.decode_per_s / 2)


def test_each_phase_overloads_one_side_but_not_the_cluster() -> None:
    for num_each in (2, 8):
        prompts, outputs, again = shift.phases_of(ONE_CORE, num_each, 30.0)
        assert (prompts.lengths, prompts.rate_per_s) == (again.lengths, again.rate_per_s)
        for phase in (prompts, outputs):
            sides = capacity(ONE_CORE, num_each, num_each, phase.lengths)
            shares = phase.rate_per_s / sides.prefill_per_s, phase.rate_per_s / sides.decode_per_s
            assert max(shares) == pytest.approx(shift.OVERLOAD)
            assert sum(shares) < 0.9 * 2
        assert prompts.lengths.num_prompt_tokens > 5 * outputs.lengths.num_prompt_tokens


def test_pace_is_weighed_by_time() -> None:
    pace = Pace.of([Kept(10, 1.0, 1.1), Kept(90, 9.0, 9.0), Kept()])
    assert (pace.num_steps, pace.slip) == (100, 0.01)
    assert str(pace) == "+1.0%"
    assert "NOT KEPT" in str(Pace.of([Kept(10, 1.0, 1.1)]))


# --- overload ---------------------------------------------------------------------------------------


def probe(at_s: float, ttft_s: float | None) -> Outcome:
    """One that was refused has no first token."""
    times_s = [] if ttft_s is None else [ttft_s]
    status, reason = (429, None) if ttft_s is None else (200, "length")
    return Outcome(Arrival(at_s, 20, 2, "probe"), at_s, status, [1] * len(times_s), times_s, reason)


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([(10.0, 0.1), (10.5, 0.1)], 0.0),
        ([(10.0, None), (10.5, 0.9), (11.0, 0.15), (11.5, 0.1)], 1.0),
        ([(10.0, 0.1), (10.5, 0.3), (11.0, 0.1)], 1.0),  # it fell back once
        ([(10.0, 0.1), (10.5, None)], None),
    ],
)
def test_recovered_when_all_later_probes_are_as_before(
    after: list[tuple[float, float | None]], expected: float | None
) -> None:
    probes = [probe(0.0, 0.08), probe(0.5, 0.1), probe(1.0, 0.5), probe(7.0, 3.0)]
    usual_s = overload.usual_ttft_s(probes)
    assert usual_s == 0.1
    assert overload.recovered_s([*probes, *(probe(*each) for each in after)], usual_s, 10.0) == expected


def test_the_load_lies_between_quiet_times_with_probes_throughout() -> None:
    arrivals = overload.arrivals_at(rate_per_s=20.0, seconds=10.0, after_s=15.0, seed=1)
    assert arrivals == sorted(arrivals)
    load = [each.at_s for each in arrivals if each.kind == "load"]
    assert 5.0 <= min(load) <= max(load) < 15.0
    probes = [each.at_s for each in arrivals if each.kind == "probe"]
    assert probes == [0.5 * i for i in range(60)]


def test_memory_is_taken_before_during_and_after() -> None:
    rss = [mb * 10**6 for mb in (*[50] * 5, *(60, 90, 80), 70, 65)]
    assert overload.memory_of(rss, seconds=3.0) == {"before": 50.0, "peak": 90.0, "after": 65.0}


# --- the JSON ---------------------------------------------------------------------------------------


def test_the_report_says_what_it_ran_on(tmp_path: Path) -> None:
    options = Namespace(
        benchmark="test", json=tmp_path / "folder" / "out.json", trace=Path("/x/t.csv"), model="/x/m"
    )
    report = Report(options, seed=3)
    report.add_row(value=1, pace=None)
    report.add_row(value=2, pace=Pace(3, 0.5))
    written = json.loads((tmp_path / "folder" / "out.json").read_text())
    pace = {"num_steps": 3, "slip": 0.5}
    assert written["rows"] == [{"value": 1, "pace": None}, {"value": 2, "pace": pace}]
    assert written["conditions"] == {"trace": "t.csv", "model": "m", "seed": 3}
    assert {"benchmark", "commit", "date", "host", "load_average"} <= written.keys()
    assert written["load_average"].keys() == {"before", "after"}


def test_every_command_knows_where_its_results_go_and_whose_model_it_takes() -> None:
    parser = make_parser("test", "text", model=True, devices=("cpu", "cuda"))
    options = parser.parse_args(["--json", "out.json", "--model", "folder", "--device", "cuda"])
    assert (options.json, options.model, options.device) == (Path("out.json"), "folder", "cuda")
    options = parser.parse_args(["--model", "folder"])
    assert (options.json, options.device, options.benchmark) == (Path(".run/test.json"), "cpu", "test")


# --- bursts -----------------------------------------------------------------------------------------


def answered(request_id: str, ttft_s: float) -> Outcome:
    done = Outcome(Arrival(0.0, 37, 2), 0.0, status=200, request_id=request_id, finish_reason="length")
    done.token_ids, done.event_times_s = [1, 2], [ttft_s, ttft_s + 0.1]
    return done


def turned_away() -> Outcome:
    return Outcome(Arrival(0.0, 37, 2), 0.0, status=429, error="wait", retry_after_s=3.0)


def test_a_burst_is_judged_by_what_was_foreseen_and_by_what_the_refused_would_have_waited() -> None:
    predicted_s = {"a": 4.0, "b": 4.0, "c": 0.01}
    outcomes = [answered("a", 2.0), answered("b", 16.0), answered("c", 0.1), turned_away(), turned_away()]
    sent = burst.Burst(5, 2, outcomes, predicted_s, 20.0)
    patient = [answered(name, wait_s) for name, wait_s in zip("abcde", (2, 16, 0.1, 59, 61), strict=True)]
    row = burst.figures_of(sent, burst.Burst(5, 2, patient, {}, 70.0), max_wait_s=60.0)
    assert (row["num_complete"], row["num_refused"], row["num_refused_rightly"]) == (3, 2, 1)
    assert (row["off_by"].num, row["off_by"].p50, row["off_by"].max) == (3, 2.0, 4.0)
    assert row["predicted_over_real"].p50 == 1.0  # 2, a quarter, and both of no concern
    assert (row["tokens_per_s"], row["retry_after_s"].p50, row["errors"]) == (0.3, 3.0, {})
    assert row.keys() >= set(burst.COLUMNS) - {"cluster", "pace"}


def test_where_nobody_was_refused_nobody_was_refused_rightly() -> None:
    row = burst.figures_of(burst.Burst(1, 2, [answered("a", 2.0)], {"a": 2.0}, 3.0), None, 60.0)
    assert (row["num_refused"], row["num_refused_rightly"]) == (0, None)
    failed = Outcome(Arrival(0.0, 37, 2), 0.0, status=500, error="Internal error.")
    row = burst.figures_of(burst.Burst(1, 2, [failed], {}, 3.0), None, 60.0)
    assert row["errors"] == {"Internal error.": 1}
