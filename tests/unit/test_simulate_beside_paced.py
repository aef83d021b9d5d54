"""What is told of runs on paced nodes beside the same ones in the simulator."""

from __future__ import annotations

import pytest

from benchmarks.clusters import Pace
from benchmarks.load import Arrival
from benchmarks.load import Outcome as Answer
from benchmarks.simulated import PACED, asked_exactly, compare, points_off
from benchmarks.simulator.run import Machines, simulate
from benchmarks.traces import Request, Targets


def answer(ttft_s: float, status: int = 200) -> Answer:
    times = [ttft_s, ttft_s + 0.1] if status == 200 else []
    ids, finish = ([1, 2], "length") if times else ([], None)
    return Answer(Arrival(0.0, 10, 2), 1.0, status, ids, times, finish, ended_s=ttft_s + 0.1)


def test_a_run_is_told_by_good_requests_and_means() -> None:
    requests = [asked_exactly(Request(100, 2, (), float(n))) for n in range(3)]
    targets = Targets(1.0, 0.5)
    simulated = simulate(Machines(PACED, 2), 1, "static", requests, targets)
    found = compare([answer(0.5), answer(2.5), answer(0.0, 429)], simulated, targets)
    assert found["num_requests"] == 3
    assert (found["measured_good"], found["measured_num_served"]) == (1, 2)
    assert (found["measured_late_first"], found["measured_slow"]) == (1, 0)
    assert (found["simulated_good"], found["simulated_num_served"]) == (3, 3)
    assert found["measured_ttft_s"] == 1.5
    assert found["measured_tpot_s"] == pytest.approx(0.1)
    assert found["measured_tokens_per_s"] == pytest.approx(4 / 3.6)


def test_cells_are_means_of_their_runs() -> None:
    def row(lending: bool, run: int, measured: int, simulated: int, slip: float) -> dict[str, object]:
        cell = {"trace": "code", "cluster": "2P2D", "load": 1.0, "lending": lending, "run": run}
        good = {"num_requests": 50, "measured_good": measured, "simulated_good": simulated}
        return {**cell, **good, "pace": Pace(10, slip)}

    rows = [row(False, 0, 40, 41, 0.01), row(True, 0, 30, 40, 0.07), row(False, 1, 44, 41, 0.02)]
    off, on = points_off(rows)
    assert (off["lending"], on["lending"]) == (False, True)
    assert (off["measured good %"], off["simulated good %"], off["points off"]) == (84, 82, "-2.0")
    assert off["measured in each run"] == "80 88"
    assert off["worst pace"] == Pace(10, 0.02)
    assert on["points off"] == "+20.0"
    assert "NOT KEPT" in str(on["worst pace"])
