"""The benchmarks on paced nodes as a user runs them, as short as they go."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.full


def start(name: str, model_path: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", name, "--model", str(model_path), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)


def run(name: str, path: Path, model_path: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows that it wrote."""
    done = start(name, model_path, ["--json", str(path), *arguments])
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"wrote {path}" in done.stdout
    document = json.loads(path.read_text())
    assert {"commit", "conditions", "date", "host", "load_average"} <= document.keys()
    rows: list[dict[str, Any]] = document["rows"]
    return rows


def test_shift(tmp_path: Path, model_path: Path) -> None:
    arguments = ["--nodes", "1", "--seconds", "3"]
    rows = run("shift", tmp_path / "shift.json", model_path, *arguments)
    assert [(row["cluster"], row["lending"]) for row in rows] == [("1P1D", False)] * 4 + [("1P1D", True)] * 4
    for *parts, whole in (rows[:4], rows[4:]):
        assert whole["num_sent"] == sum(part["num_sent"] for part in parts) > 0
        assert whole["num_complete"] == whole["num_sent"]
        assert whole["pace"]["num_steps"] > 0
    sent = [row["num_sent"] for row in rows]
    assert sent[:4] == sent[4:]  # both got the same load
    assert rows[0]["num_cap_moves"] == 0


def test_overload(tmp_path: Path, model_path: Path) -> None:
    arguments = ["--prefill", "1", "--decode", "1", "--seconds", "2", "--after", "5"]
    [row] = run("overload", tmp_path / "overload.json", model_path, *arguments)
    assert row["num_sent"] == row["num_complete"] + row["num_refused"] > 0
    assert row["rate_per_s"] == pytest.approx(3 * row["capacity_per_s"], rel=1e-2)
    assert set(row["memory_mb"]) == {"nats", "scheduler-0", "gateway", "nodes"}
    assert all(memory["peak"] > 1 for memory in row["memory_mb"].values())


def test_burst(tmp_path: Path, model_path: Path) -> None:
    arguments = ["--nodes", "1", "--requests", "40", "--tokens", "64", "--max-wait-s", "1"]
    [row] = run("burst", tmp_path / "burst.json", model_path, *arguments)
    assert row["num_complete"] + row["num_refused"] == 40
    assert row["errors"] == {}
    assert row["off_by"]["num"] == row["num_complete"] > 0
    assert 0 <= row["num_refused_rightly"] <= row["num_refused"]
    assert row["off_by"]["p50"] >= 1.0


def test_bad_days(tmp_path: Path, model_path: Path) -> None:
    days = ["lying prefill node", "joining node", "only mixed nodes"]
    arguments = ["--seconds", "6", "--seeds", "0", "--at-once", "3", "--days", *days]
    rows = run("bad-days", tmp_path / "bad-days.json", model_path, *arguments)
    assert [row["day"] for row in rows] == days
    for row in rows:
        assert row["num_sent"] == row["num_complete"] + row["num_refused"] > 0
        assert row["errors"] == {}
        assert row["pace"]["num_steps"] > 0
    assert [row["share_at_the_end"] is None for row in rows] == [False, False, True]
    assert rows[1]["moved_after_s"] > 0  # it can't have work before it has joined


def test_simulated(tmp_path: Path, model_path: Path) -> None:
    arguments = ["--nodes", "1", "--loads", "0.7", "--requests", "12", "--seed", "5"]
    [row] = run("simulated", tmp_path / "simulated.json", model_path, *arguments)
    for side in ("measured", "simulated"):
        assert row[f"{side}_num_served"] == 12
        assert min(row[f"{side}_{name}"] for name in ("ttft_s", "tpot_s", "tokens_per_s")) > 0


def test_simulated_says_so_if_nothing_can_be_carried(tmp_path: Path, model_path: Path) -> None:
    arguments = ["--json", str(tmp_path / "simulated.json"), "--nodes", "1", "--requests", "12"]
    done = start("simulated", model_path, arguments)  # two prompts take longer than 5 s
    assert done.returncode == 1
    assert "no split keeps the targets at any rate" in done.stderr
    assert "Traceback" not in done.stderr


def test_real(tmp_path: Path, model_path: Path) -> None:
    arguments = ["--real", "--requests", "16", "--rates", "0.7", "--longest", "2600", "--blocks", "512"]
    [row] = run("simulated", tmp_path / "real.json", model_path, *arguments)
    for side in ("measured", "simulated"):
        assert row[f"{side}_num_served"] == 16
        assert min(row[f"{side}_{name}"] for name in ("ttft_s", "tpot_s", "tokens_per_s")) > 0


def test_real_says_so_if_nothing_is_left_for_prompts(tmp_path: Path, model_path: Path) -> None:
    arguments = ["--real", "--json", str(tmp_path / "real.json"), "--longest", "2048"]
    done = start("simulated", model_path, arguments)
    assert done.returncode == 1
    assert "2048 are kept for the answer" in done.stderr
    assert "Traceback" not in done.stderr


def test_sustain(tmp_path: Path, model_path: Path) -> None:
    arguments = ["--nodes", "1", "--sequences", "2", "--seconds", "1"]
    rows = run("sustain", tmp_path / "sustain.json", model_path, *arguments)
    assert [row["step_s"] for row in rows] == sorted((row["step_s"] for row in rows), reverse=True)
    # No step ends before its time, but the last one of the measured second may have begun before it.
    assert all(0 < row["steps_per_s"] <= 1.1 / row["step_s"] for row in rows)
