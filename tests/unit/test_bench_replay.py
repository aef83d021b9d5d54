"""The replay of recordings: what it compares, what it prints, and the policies to compare with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks import BenchmarkFailed, replay
from benchmarks.baselines import BASELINES, make_planner
from benchmarks.record import NODE_PREFIX, RECONNECTED, read_lines, write_line
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Assignment, NodeRef
from flowkv_scheduler.cluster import ClusterState, Goals
from flowkv_scheduler.planner import Planner
from flowkv_scheduler.policy import RequestCosts
from flowkv_scheduler.rebalance import Order
from flowkv_scheduler.slices import Sliced
from tests.described_nodes import descriptor, report, request

ROOT = Path(__file__).resolve().parents[2]
NODES = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}


class Tape:
    """Writes a recording."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seq = 0
        path.write_bytes(b"")

    def write(self, t: float, subject: str, message: Any) -> None:
        with self.path.open("ab") as out:
            write_line(out, t, subject, message)

    def nodes(self, t: float, **changes: dict[str, Any]) -> None:
        """All nodes with a report each, and `changes` per node."""
        self._seq += 1
        for node_id, role in NODES.items():
            self.write(t, NODE_PREFIX + node_id, descriptor(node_id, role))
            told = report(node_id, role, seq=self._seq, **changes.get(node_id, {}))
            self.write(t, subjects.load(node_id), told)

    def ask(self, t: float, request_id: str, **changes: Any) -> None:
        self.write(t, subjects.SCHEDULE, request(request_id=request_id, **changes))

    def assign(self, t: float, request_id: str, prefill: str, decode: str) -> None:
        assignment = Assignment(
            request_id=request_id,
            attempt=0,
            epoch=1,
            prefill=NodeRef(node_id=prefill, incarnation="i1"),
            decode=NodeRef(node_id=decode, incarnation="i1"),
            reason="as recorded",
            prefill_candidates=[],
            decode_candidates=[],
        )
        self.write(t, subjects.assignment(request_id), assignment)

    def replayed(self, policy: str = "flowkv", seed: int = 0) -> replay.Replay:
        done = replay.Replay(make_planner(policy, Goals(), seed))
        done.run(read_lines(self.path))
        return done


@pytest.fixture
def tape(tmp_path: Path) -> Tape:
    return Tape(tmp_path / "events.jsonl")


def outcomes(done: replay.Replay) -> dict[str, str]:
    return {question.request.request_id: question.outcome for question in done.questions}


def test_each_question_is_compared_with_its_own_assignment(tape: Tape) -> None:
    tape.ask(0.0, "too early")
    tape.nodes(0.1, p1={"queued_prefill_tokens": 5000}, d1={"num_running": 15})
    tape.ask(0.2, "same")
    tape.ask(0.2, "other")
    tape.assign(0.21, "other", "p1", "d1")
    tape.assign(0.21, "same", "p0", "d0")
    tape.ask(0.3, "lost")
    tape.assign(0.3, "asked before the recording", "p0", "d0")
    tape.nodes(0.4, d0={"free": 1}, d1={"free": 1})
    tape.ask(0.5, "full")
    tape.assign(0.5, "full", "p0", "d0")
    assert outcomes(tape.replayed()) == {
        "too early": "alike",
        "same": "alike",
        "other": "on another pair",
        "lost": "assigned only in the replay",
        "full": "assigned only in the recording",
    }


def test_question_that_is_asked_again_is_compared_each_time(tape: Tape) -> None:
    tape.ask(0.0, "r")
    tape.nodes(0.1)
    tape.ask(0.2, "r", age_s=0.2)
    tape.assign(0.21, "r", "p0", "d0")
    done = tape.replayed()
    assert [question.outcome for question in done.questions] == ["alike", "alike"]
    assert [question.recorded.pair for question in done.questions] == [None, ("p0", "d0")]


def test_assignment_that_is_heard_before_its_question_is_put_to_it(tape: Tape) -> None:
    """Each subject is a subscription of its own: two of them come in any order."""
    tape.nodes(0.1)
    tape.assign(0.2, "r", "p0", "d0")
    tape.ask(0.2, "r")
    assert outcomes(tape.replayed()) == {"r": "alike"}


def test_nodes_leave_and_silence_of_our_own_is_not_theirs(tape: Tape) -> None:
    tape.nodes(0.0, p1={"queued_prefill_tokens": 50}, d1={"num_running": 1})
    tape.write(0.1, NODE_PREFIX + "p0", None)
    tape.ask(0.2, "without p0")
    tape.write(60.0, RECONNECTED, None)
    tape.ask(60.1, "after an outage")
    tape.ask(90.0, "all silent")
    pairs = [question.replayed.pair for question in tape.replayed().questions]
    assert pairs == [("p1", "d0"), ("p1", "d0"), None]


def test_planner_ticks_once_per_period_of_recorded_time(tape: Tape) -> None:
    ticks: list[float] = []

    class Ticking(Planner):
        def tick(self, now: float) -> Sliced[list[Order]]:
            yield
            ticks.append(now)
            return []

        def touch_all(self, now: float) -> None:
            assert now >= ticks[-1]

    for t in (3.0, 3.2, 4.1, 6.0):
        tape.write(t, RECONNECTED, None)
    replay.Replay(Ticking(Goals())).run(read_lines(tape.path))
    assert ticks == [3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0]


def test_what_no_scheduler_would_take_is_counted(tape: Tape) -> None:
    tape.nodes(0.0)
    tape.write(0.1, subjects.SCHEDULE, {"type": "ScheduleRequest", "request_id": 5})
    tape.ask(0.2, "r")
    tape.assign(0.2, "r", "p0", "d0")
    done = tape.replayed()
    assert (outcomes(done), done.num_unreadable) == ({"r": "alike"}, 1)
    assert list(replay.report(done, "flowkv")) == [
        "1 schedule requests, by flowkv: 1 alike (0 of them got nothing), "
        "1 lines that are not what their subject says"
    ]


def test_report_gives_both_reasons(tape: Tape) -> None:
    tape.nodes(0.0)
    tape.ask(0.5, "r")
    tape.assign(0.5, "r", "p1", "d1")
    lines = list(replay.report(tape.replayed("round_robin"), "round_robin"))
    assert lines == [
        "0.500 s  r.0  on another pair",
        "    recorded  p1 > d1: as recorded",
        "    replayed  p0 > d0: picked from 2 prefill nodes and 2 decode nodes with room",
        "1 schedule requests, by round_robin: 0 alike (0 of them got nothing), 1 on another pair",
    ]


@pytest.mark.parametrize("name", ["flowkv", "random"])
def test_same_input_gives_the_same_bytes(tape: Tape, name: str) -> None:
    for i in range(40):
        tape.nodes(i / 10, p0={"queued_prefill_tokens": 90 * (i % 7)}, d1={"num_running": i % 5})
        for j in range(3):
            tape.ask(i / 10, f"r{i}-{j}", num_prompt_tokens=100 + 31 * j)
            tape.assign(i / 10, f"r{i}-{j}", f"p{i % 2}", f"d{j % 2}")
    outputs = [
        subprocess.run(
            [sys.executable, "-m", "benchmarks", "replay", str(tape.path), "--policy", name, "--seed", "3"],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            timeout=60,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].splitlines()[-1].startswith(f"120 schedule requests, by {name}: ".encode())
    assert len(outputs[0].splitlines()) > 40


def test_file_that_is_no_recording_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"t": 0, "subject": "s", "message": null}\n{"t": 1}\n')
    with pytest.raises(BenchmarkFailed, match="line 2"):
        replay.main([str(path)])
    with pytest.raises(BenchmarkFailed, match="none: no such file"):
        replay.main([str(tmp_path / "none")])


def cluster(**changes: dict[str, Any]) -> ClusterState:
    state = ClusterState()
    state.set_descriptors({node_id: descriptor(node_id, role) for node_id, role in NODES.items()})
    for node_id, role in NODES.items():
        state.add_report(report(node_id, role, **changes.get(node_id, {})), 0.0)
    return state


@pytest.mark.parametrize("name", BASELINES)
def test_policies_keep_to_nodes_that_can_take_it(name: str) -> None:
    choose = BASELINES[name](0)
    state = cluster(p0={"draining": True}, d1={"free": 1})
    choices = [choose(RequestCosts(request(), state, Goals(), 0.0)) for _ in range(8)]
    assert {choice and (choice.prefill.node_id, choice.decode.node_id) for choice in choices} == {
        ("p1", "d0")
    }
    none_ready = cluster(**{node_id: {"ready": False} for node_id in NODES})
    assert choose(RequestCosts(request(), none_ready, Goals(), 0.0)) is None


@pytest.mark.parametrize("name", BASELINES)
def test_choices_of_a_policy_count_until_reports_show_them(tape: Tape, name: str) -> None:
    tape.nodes(0.0)
    for i in range(8):
        tape.ask(0.1, f"r{i}")
    planner = make_planner(name, Goals(), 0)
    replay.Replay(planner).run(read_lines(tape.path))
    given = [view.given for view in planner.state.views()]
    assert sum(work.prefill_tokens for work in given) == 8 * 100
    assert sum(work.num_sequences for work in given) == 8


def test_lines_are_valid_json_in_one_line_each(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with path.open("wb") as out:
        write_line(out, 0.12345678, subjects.load("p0"), report("p0", "prefill"))
        write_line(out, 1.0, NODE_PREFIX + "p0", None)
    first, second = path.read_bytes().splitlines()
    assert msgspec.json.decode(first)["message"]["type"] == "LoadReport"
    assert (msgspec.json.decode(first)["t"], msgspec.json.decode(second)["message"]) == (0.123457, None)
