"""What is told of runs on paced nodes beside the same ones in the simulator."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import BenchmarkFailed, simulated
from benchmarks.clusters import Observed, Pace
from benchmarks.simulated import PACED, asked_exactly, compare, delayed, points_off
from benchmarks.simulator.run import Machines, simulate
from flowkv.bench.load import Arrival
from flowkv.bench.load import Outcome as Answer
from flowkv.bench.traces import Request, Targets


def answer(ttft_s: float, status: int = 200) -> Answer:
    times = [ttft_s, ttft_s + 0.04] if status == 200 else []
    ids, finish = ([1, 2], "length") if times else ([], None)
    return Answer(Arrival(0.0, 10, 2), 1.0, status, ids, times, finish, ended_s=ttft_s + 0.04)


def test_a_run_is_told_by_good_requests_and_means() -> None:
    requests = [asked_exactly(Request(100, 2, (), float(n))) for n in range(3)]
    targets = Targets(1.0, 0.5)
    outcome = simulate(Machines(PACED, 2), 1, "static", requests, targets)
    refused = simulate(Machines(PACED, 2), 1, "static", requests, Targets(0.0, 0.5), max_bad=0)
    found = compare([answer(0.5), answer(2.5), answer(0.0, 429)], [outcome, refused], targets)
    assert found["num_requests"] == 3
    assert (found["measured_good"], found["measured_num_served"]) == (1, 2)
    assert (found["measured_late_first"], found["measured_slow"]) == (1, 0)
    assert refused.num_good == 2  # it ended with the first one that was late
    assert (found["simulated_good"], found["simulated_num_served"]) == (2.5, 1.5)
    assert found["measured_ttft_s"] == 1.5
    assert found["measured_tpot_s"] == pytest.approx(0.04)
    assert found["measured_tokens_per_s"] == pytest.approx(4 / 3.54)


def test_a_run_that_serves_nothing_has_no_means() -> None:
    requests = [asked_exactly(Request(100, 1))]
    outcome = simulate(Machines(PACED, 2), 1, "static", requests, Targets(1.0, 0.5))
    found = compare([answer(0.0, 429)], [outcome], Targets(1.0, 0.5))
    assert (found["measured_num_served"], found["simulated_num_served"]) == (0, 1)
    assert (found["measured_ttft_s"], found["measured_tokens_per_s"]) == (None, None)
    assert found["simulated_tpot_s"] is None
    assert found["simulator_off_by"] == "unknown unknown unknown"


def test_cells_are_means_of_their_runs() -> None:
    def row(lending: bool, run: int, measured: int, imagined: int, slip: float) -> dict[str, object]:
        cell = {"trace": "code", "cluster": "2P2D", "load": 1.0, "lending": lending, "run": run}
        good = {"num_requests": 50, "measured_good": measured, "simulated_good": imagined}
        return {**cell, **good, "pace": Pace(10, slip)}

    rows = [row(False, 0, 40, 41, 0.01), row(True, 0, 30, 40, 0.07), row(False, 1, 44, 41, 0.02)]
    off, on = points_off(rows)
    assert (off["lending"], on["lending"]) == (False, True)
    assert (off["measured good %"], off["simulated good %"], off["points off"]) == (84, 82, "-2.0")
    assert off["measured in each run"] == "80 88"
    assert off["worst pace"] == Pace(10, 0.02)
    assert on["points off"] == "+20.0"
    assert "NOT KEPT" in str(on["worst pace"])


def test_the_command_runs_each_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: list[dict[str, object]] = []

    @contextlib.contextmanager
    def started(model: str, nodes: dict[str, int], **more: Any) -> Iterator[SimpleNamespace]:
        settings.append(more["settings"])
        yield SimpleNamespace(cluster=None, pace=Pace(10, 0.01))

    async def driven(cluster: object, arrivals: list[Arrival], seed: int) -> tuple[list[Answer], Observed]:
        assert all(arrival.hash_ids for arrival in arrivals)
        return [answer(0.5)] * len(arrivals), Observed(num_cap_moves=3)

    monkeypatch.setattr(simulated, "start_cluster", started)
    monkeypatch.setattr(simulated, "drive_observed", driven)
    monkeypatch.setattr(simulated, "NUM_SIMULATED", 2)
    file = tmp_path / "out.json"
    argv = ["--model", "any", "--trace", "agents", "--nodes", "1", "--loads", "0.7", "--runs", "2"]
    assert simulated.main([*argv, "--requests", "20", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["lending"], row["run"]) for row in rows] == [(False, 0), (False, 1), (True, 0), (True, 1)]
    assert [given["lending"] for given in settings] == [False, False, True, True]
    assert {row["measured_good"] for row in rows} == {20}
    assert {row["measured_moves"] for row in rows} == {3}
    table = capsys.readouterr().out
    assert "points off" in table
    assert table.count("1P1D") == 2
    # In pieces: only what is missing runs, and all is told.
    argv = [*argv, "--json", str(file), "--resume"]
    assert simulated.main([*argv, "--requests", "20", "--loads", "0.7", "1.0", "--lending", "on"]) == 0
    assert len(settings) == 6
    rows = json.loads(file.read_text())["rows"]
    assert [(row["load"], row["lending"]) for row in rows[-3:]] == [(0.7, True), (1.0, True), (1.0, True)]
    assert capsys.readouterr().out.count("1P1D") == 3
    with pytest.raises(BenchmarkFailed, match="begun with --requests 20"):
        simulated.main([*argv, "--requests", "21"])


def test_delays_are_short_and_keep_all_requests() -> None:
    requests = [Request(n, 1, (), 0.01 * n) for n in range(1, 100)]
    late = delayed(requests, 1)
    assert late == delayed(requests, 1) != delayed(requests, 2)
    assert [one.arrival_s for one in late] == sorted(one.arrival_s for one in late)
    delays = [one.arrival_s - 0.01 * one.num_prompt_tokens for one in late]
    assert 0.0 <= min(delays) < max(delays) <= 0.02
    assert {one.num_prompt_tokens for one in late} == set(range(1, 100))
