"""The decisions benchmark as a user runs it, as short as it goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main

pytestmark = pytest.mark.full


def test_asks_are_measured_here_and_over_the_bus(tmp_path: Path) -> None:
    path = tmp_path / "decisions.json"
    assert (
        main(["decisions", "--nodes", "6", "--decisions", "100", "--asks", "200", "--json", str(path)]) == 0
    )
    [row] = json.loads(path.read_text())["rows"]
    assert row["decision_us"]["num"] == 100
    assert sum(row["bus_answers"].values()) == 200
    assert all(0 <= row["bus_cores"][name] < 1.1 for name in ("nats", "scheduler", "nodes", "client"))
    assert 0 < row["bus_ask_ms"]["p50"] <= row["bus_ask_ms"]["p99"]
    assert (
        0 < row["bus_asks_per_s"] <= 1010
    )  # the last of them is asked after 199 ms, and has its answer later
