"""One request's time as one line, joined from what its gateway saw and what the nodes told. Pure.

No two services share a clock. Each tells durations by its own, and causes tie them together: a node has an
attempt between its assignment and its first token, both seen by the gateway. What of that stretch the node
does not account for was spent on the bus, half of it before and half after, as NTP has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from flowkv_common.wire.messages import AttemptTimes, NodeTimes, Phase, RequestFinished

# Of one attempt in one message: some 100 bytes each. What is more is told in fewer, longer ones.
MAX_PHASES = 32
# On a node, between two phases: a shorter one belongs to what follows. An event loop takes as long.
SHORTEST_WAIT_S = 0.0005


def phase_of(name: str, began: float, ended: float, since: float) -> Phase:
    """All three by one clock, in seconds; the phase is told from `since` on."""
    return Phase(name=name, at_s=round(max(0.0, began - since), 6), took_s=round(max(0.0, ended - began), 6))


def at_most(phases: Iterable[Phase]) -> list[Phase]:
    """In order of time, at most `MAX_PHASES`: neighbours of one name become one, with what lies between."""
    merged = sorted(phases, key=lambda phase: phase.at_s)
    while len(merged) > MAX_PHASES:
        fewer: list[Phase] = []
        for phase in merged:
            if fewer and len(merged) > MAX_PHASES and fewer[-1].name == phase.name:
                fewer[-1] = _both(fewer[-1], phase)
            else:
                fewer.append(phase)
        if len(fewer) == len(merged):  # they alternate: the last ones say least
            return fewer[:MAX_PHASES]
        merged = fewer
    return merged


def _both(first: Phase, second: Phase) -> Phase:
    return Phase(
        name=first.name,
        at_s=first.at_s,
        took_s=round(max(first.took_s, second.at_s + second.took_s - first.at_s), 6),
        num_tokens=first.num_tokens + second.num_tokens,
        num_bytes=first.num_bytes + second.num_bytes,
        num_copies=first.num_copies + second.num_copies,
        num_calls=first.num_calls + second.num_calls,
    )


class Span(NamedTuple):
    """A stretch of a request, in seconds from its beginning at the gateway.

    Those that are not `is_beside` follow each other from 0 to the request's end, so that their sum is its
    wall time. The others ran at the same time: hidden sends, and gaps that the former explain.
    """

    name: str
    began_s: float
    took_s: float
    where: str = ""  # the service that had it; empty: on the bus
    detail: str = ""
    is_beside: bool = False


def timeline(finished: RequestFinished) -> list[Span]:
    """What the request went through, in order. Attempts without times, as of older gateways, give none."""
    line = _Line()
    for attempt in finished.attempt_times:
        _add_attempt(line, attempt)
    return sorted(line.spans, key=lambda span: (span.began_s, span.is_beside))


class _Line:
    """Spans end to end: each begins where the one in front of it has ended, none outlasts its attempt."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.ends_s = self.limit_s = 0.0

    def add(self, name: str, until_s: float, where: str = "", detail: str = "") -> None:
        """From the end of the line to `until_s`; nothing if that is past."""
        until_s = min(until_s, self.limit_s)
        if until_s > self.ends_s:
            took_s = round(until_s - self.ends_s, 6)
            self.spans.append(Span(name, self.ends_s, took_s, where, detail))
            self.ends_s = until_s

    def add_phases(self, phases: Sequence[Phase], begins_s: float, until_s: float, node_id: str) -> None:
        """Of a node whose clock has its 0 at `begins_s`. What lies between them was a wait there."""
        for phase in phases:
            began_s = min(begins_s + phase.at_s, until_s)
            if began_s - self.ends_s >= SHORTEST_WAIT_S:
                self.add("wait", began_s, node_id)
            self.add(phase.name, min(began_s + phase.took_s, until_s), node_id, _detail(phase))
        self.add("wait", until_s, node_id)

    def add_beside(self, phase: Phase, begins_s: float, where: str, detail: str) -> None:
        """Beside the line."""
        began_s = round(begins_s + phase.at_s, 6)
        self.spans.append(Span(phase.name, began_s, phase.took_s, where, detail, is_beside=True))


def _add_attempt(line: _Line, attempt: AttemptTimes) -> None:
    assignment, line.limit_s = attempt.assignment, attempt.ended_s
    if attempt.turn_s:
        line.add("turn", attempt.began_s + attempt.turn_s, "gateway", "others of its key came first")
    if assignment is None or attempt.assigned_s is None:
        line.add("schedule", attempt.ended_s, "scheduler", attempt.why_ended or attempt.wait_reason)
        return
    asked = f"asked {attempt.num_asks} times, {attempt.wait_reason}; " if attempt.wait_reason else ""
    line.add("schedule", attempt.assigned_s, "scheduler", asked + assignment.reason)
    prefill, decode = assignment.prefill.node_id, assignment.decode.node_id
    if attempt.first_token_s is None or attempt.last_token_s is None:
        line.add("lost", attempt.ended_s, prefill, attempt.why_ended)
        return
    told = {times.part: times for times in attempt.nodes}
    begins_s = _add_prefill(line, attempt, told.get("prefill"), prefill, attempt.first_token_s)
    if attempt.second_token_s is not None:
        _add_first_step(line, told, begins_s, decode, attempt.second_token_s)
    for gap in attempt.gaps:
        detail = f"over {assignment.itl_goal_s * 1000:g} ms between two tokens"
        if gap.at_s < (attempt.second_token_s or attempt.last_token_s) - 1e-6:
            line.add_beside(gap, 0.0, decode, detail)  # the handoff, which explains it
            continue
        line.add("decode", gap.at_s, decode)
        line.add("gap", gap.at_s + gap.took_s, decode, detail)
    line.add("decode", attempt.last_token_s, decode)
    if attempt.why_ended:
        line.add("lost", attempt.ended_s, decode, attempt.why_ended)
    else:
        line.add("end", attempt.ended_s, "gateway", "the client takes what is there")


def _add_prefill(
    line: _Line, attempt: AttemptTimes, told: NodeTimes | None, node_id: str, until_s: float
) -> float:
    """From the assignment to the first token. Returns where the 0 of the node's clock is on the line."""
    if told is None:
        line.add("prefill", until_s, node_id)
        return until_s
    on_bus_s = max(0.0, until_s - line.ends_s - told.total_s)
    begins_s = line.ends_s + on_bus_s / 2
    line.add("bus", begins_s)
    line.add_phases(told.phases, begins_s, min(until_s, begins_s + told.total_s), node_id)
    line.add("bus", until_s)
    return begins_s


def _add_first_step(
    line: _Line, told: dict[str, NodeTimes], begins_s: float, node_id: str, until_s: float
) -> None:
    """From the first token to the second: what is left to send, the commit, decode's first step.

    `begins_s`: the 0 of the prefill node's clock. Decode's own part ends with its token.
    """
    prefill, handoff, decode = told.get("prefill"), told.get("handoff"), told.get("decode")
    decode_began_s = until_s - decode.total_s if decode else until_s
    if prefill is not None and handoff is not None:
        for send in handoff.phases:
            is_hidden = send.at_s + send.took_s <= prefill.total_s
            ended_s = min(begins_s + send.at_s + send.took_s, decode_began_s)
            detail = f"{'hidden' if is_hidden else 'exposed'}, to {node_id} by {handoff.connector}, "
            detail += _detail(send)
            if ended_s <= line.ends_s:  # the first token was still to come
                line.add_beside(send, begins_s, handoff.node_id, detail)
                continue
            line.add("wait", min(begins_s + send.at_s, ended_s), handoff.node_id)
            line.add("send", ended_s, handoff.node_id, detail)
        line.add("wait", min(begins_s + handoff.total_s, decode_began_s), handoff.node_id)
    if decode is None:
        line.add("decode", until_s, node_id)
        return
    line.add("bus", decode_began_s)
    line.add_phases(decode.phases, decode_began_s, until_s, node_id)


def _detail(phase: Phase) -> str:
    if phase.num_tokens:
        return f"{phase.num_tokens} tokens"
    if not phase.num_bytes:
        return ""
    rate = f", {phase.num_bytes / phase.took_s / 1e9:.2f} GB/s" if phase.took_s else ""
    return f"{phase.num_bytes:,} bytes, {phase.num_copies} copies, {phase.num_calls} calls{rate}"
