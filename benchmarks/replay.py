"""Decide a recording's requests again, by FlowKV's policy or another, and compare the choices.

Feeds a fresh planner with what a scheduler heard, at the times when it was heard. The same file, policy and
seed give the same output, byte for byte.

Nodes are not simulated: their reports are the recorded ones, whatever this planner chooses or orders. So each
line answers what it would have done *there*, not what would have come of it.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from benchmarks.baselines import BASELINES, make_planner
from benchmarks.record import NODE_PREFIX, RECONNECTED, Line, read_lines
from flowkv_common.errors import FlowKVError
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Assignment, ScheduleRequest, Wait, decode
from flowkv_common.wire.nodes import BlocksChanged, LoadReport, NodeDescriptor
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.planner import TICK_PERIOD_S, Planner
from flowkv_scheduler.slices import at_once

VERB_OF_LOAD = subjects.load("*").rpartition(".")[0]
VERB_OF_BLOCKS = subjects.blocks("*").rpartition(".")[0]
VERB_OF_ASSIGNMENT = subjects.assignment("*").rpartition(".")[0]


class Decision(NamedTuple):
    """`pair` is None when the request had to wait or was refused."""

    pair: tuple[str, str] | None
    reason: str

    def __str__(self) -> str:
        pair = " > ".join(self.pair) if self.pair else "nothing"
        return f"{pair}: {self.reason}"


UNRECORDED = Decision(None, "no assignment was recorded")


class Question(NamedTuple):
    """A schedule request, and what the two schedulers made of it."""

    t: float
    request: ScheduleRequest
    replayed: Decision
    recorded: Decision = UNRECORDED

    @property
    def outcome(self) -> str:
        if self.recorded.pair == self.replayed.pair:
            return "alike"
        if self.recorded.pair is None:
            return "assigned only in the replay"
        return "assigned only in the recording" if self.replayed.pair is None else "on another pair"


class Replay:
    """A planner that lives through a recording."""

    def __init__(self, planner: Planner) -> None:
        self.questions: list[Question] = []
        self.num_unreadable = 0
        self._planner = planner
        self._descriptors: dict[str, NodeDescriptor] = {}
        self._open: dict[tuple[str, int], int] = {}  # request id, attempt -> place in `questions`
        self._early: dict[tuple[str, int], Decision] = {}  # each subject is heard for itself
        self._next_tick: float | None = None

    def run(self, lines: Iterable[Line]) -> None:
        for line in lines:
            self._tick_until(line.t)
            try:
                self._hear(line)
            except msgspec.ValidationError:  # no scheduler would have taken it either
                self.num_unreadable += 1

    def _tick_until(self, now: float) -> None:
        """Once per period the planner looks at the cluster; the recorded one did so at other moments."""
        due = now if self._next_tick is None else self._next_tick
        while due <= now:
            at_once(self._planner.tick(due))
            due += TICK_PERIOD_S
        self._next_tick = due

    def _hear(self, line: Line) -> None:
        verb = line.subject.rpartition(".")[0]
        if line.subject == subjects.SCHEDULE:
            self._ask(line.t, decode(line.message, ScheduleRequest))
        elif line.subject == RECONNECTED:
            self._planner.touch_all(line.t)
        elif line.subject.startswith(NODE_PREFIX):
            self._descriptors.pop(line.subject.removeprefix(NODE_PREFIX), None)
            if bytes(line.message) != b"null":
                found = decode(line.message, NodeDescriptor)
                self._descriptors[found.node.node_id] = found
            self._planner.set_descriptors(self._descriptors)
        elif verb == VERB_OF_LOAD:
            self._planner.add_report(decode(line.message, LoadReport), line.t)
        elif verb == VERB_OF_BLOCKS:
            self._planner.state.prefixes.apply_change(decode(line.message, BlocksChanged))
        elif verb == VERB_OF_ASSIGNMENT:
            self._compare(decode(line.message, Assignment))
        # Events are for people. Of prefix caches only what changed meanwhile is known.

    def _ask(self, now: float, request: ScheduleRequest) -> None:
        attempt = request.request_id, request.attempt
        recorded = self._early.pop(attempt, UNRECORDED)
        if recorded is UNRECORDED:
            self._open[attempt] = len(self.questions)
        self.questions.append(Question(now, request, self._decide(request, now), recorded))

    def _decide(self, request: ScheduleRequest, now: float) -> Decision:
        try:
            decision = self._planner.schedule(request, now)
        except FlowKVError as error:
            return Decision(None, f"{error.code}, {error.message}")
        if isinstance(decision, Wait):
            return Decision(None, decision.reason)
        return Decision((decision.prefill.node_id, decision.decode.node_id), decision.reason)

    def _compare(self, assignment: Assignment) -> None:
        """Put it to the last question of its attempt, or to the one that is still to be heard."""
        attempt = assignment.request_id, assignment.attempt
        recorded = Decision((assignment.prefill.node_id, assignment.decode.node_id), assignment.reason)
        place = self._open.pop(attempt, None)
        if place is None:
            self._early[attempt] = recorded
        else:
            self.questions[place] = self.questions[place]._replace(recorded=recorded)


def report(replay: Replay, name: str) -> Iterator[str]:
    """Lines for people: each request that was decided otherwise, then the sums."""
    questions = replay.questions
    for question in questions:
        if question.outcome != "alike":
            request = question.request
            yield f"{question.t:.3f} s  {request.request_id}.{request.attempt}  {question.outcome}"
            yield f"    recorded  {question.recorded}"
            yield f"    replayed  {question.replayed}"
    counts = Counter(question.outcome for question in questions)
    waits = sum(question.outcome == "alike" and question.replayed.pair is None for question in questions)
    parts = [f"{counts.pop('alike', 0)} alike ({waits} of them got nothing)"]
    parts += [f"{count} {outcome}" for outcome, count in sorted(counts.items())]
    if replay.num_unreadable:
        parts.append(f"{replay.num_unreadable} lines that are not what their subject says")
    yield f"{len(questions)} schedule requests, by {name}: {', '.join(parts)}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks replay", description=__doc__)
    parser.add_argument("events", type=Path, help="what `python -m benchmarks record` has written")
    parser.add_argument("--policy", default="flowkv", choices=["flowkv", *BASELINES])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    replay = Replay(make_planner(options.policy, Goals(), options.seed))
    replay.run(read_lines(options.events))
    for line in report(replay, options.policy):
        print(line)
    return 0
