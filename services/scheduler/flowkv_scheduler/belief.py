"""Whether nodes do what they say: what was promised for each, and what came by the word of the gateways.

Pure: `now` is seconds of any monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import msgspec

from flowkv_common.wire.messages import NodeRef, NodeSeen
from flowkv_common.wire.nodes import LoadReport, NodeDescriptor
from flowkv_scheduler.slices import Sliced

# Evidence counts for about so long, and about so many outcomes: a node that was slow is tried again some ten
# seconds later, and eight prompts show that it has recovered.
MEMORY_S = 3.0
MEMORY_OUTCOMES = 8.0
# A node that is slow again when it is tried is trusted only after twice the time, up to four times: each try
# costs a request. One that has recovered gets work within half a minute.
LONGEST_MEMORY_S = 4 * MEMORY_S
SLOW_AGAIN = 2.0
# A first token, or a decode step, that is late by no more than this says little: a busy host delays messages.
PROMPT_SLACK_S = 0.1
STEP_SLACK_S = 0.01
# A stall shorter than the gateways' period can't be told from a message on its way.
SHORTEST_STALL_S = 0.25
# What a gateway said of a stall holds for so long: it says so four times a second, and may be dead.
STALL_HOLDS_S = 1.0
# By then less than a thousandth of any evidence is left.
FORGET_AFTER_S = 8 * LONGEST_MEMORY_S
# Slowness is told in steps of this factor: what differs by less does not change a choice.
SLOWNESS_STEP = 1.25
# So many are judged in some 0.2 ms: asks wait for that.
RECORDS_PER_SLICE = 100


class Doubt(msgspec.Struct, frozen=True, gc=False):
    """How a node differs from what it says: its steps cost `slowness` times as much, and come later."""

    slowness: float = 1.0
    first_token_s: float = 0.0  # later
    step_s: float = 0.0  # later, each step


TRUSTED = Doubt()


def why_untrue(report: LoadReport, node: NodeDescriptor) -> str | None:
    """What of a report can't be, by what the node is; None if all can. Types have seen to single numbers."""
    blocks, budget = report.blocks, report.max_prefill_tokens_per_step
    if blocks.total != node.num_blocks:
        return f"blocks.total is {blocks.total}, the pool has {node.num_blocks}"
    if blocks.free + blocks.cached + blocks.leased + blocks.quarantined != blocks.total:
        return f"blocks are not {blocks.total} in all"
    if not node.layout.block_size <= budget <= node.token_budget:
        least, most = node.layout.block_size, node.token_budget
        return f"max_prefill_tokens_per_step is {budget}, not between {least} and {most}"
    queued, interruptible = report.queued_prefill_tokens, report.interruptible_prefill_tokens
    if interruptible > queued:
        return f"interruptible_prefill_tokens is {interruptible}, of queued_prefill_tokens {queued}"
    attended, interruptible = report.queued_attended, report.interruptible_attended
    if interruptible > attended:
        return f"interruptible_attended is {interruptible}, of queued_attended {attended}"
    if report.num_running > report.max_num_seqs:
        return f"num_running is {report.num_running}, of max_num_seqs {report.max_num_seqs}"
    return None


class Record:
    """Promises of one kind that a node was given, and what came of them, the latest ones."""

    def __init__(self, slack_s: float) -> None:
        self._slack_s = slack_s
        self._num = 0.0
        self._promised_s = 0.0
        self._taken_s = 0.0
        self._at = -math.inf
        self._memory_s = MEMORY_S  # until what came by `_at` has lost its weight
        # By gateway that waits for something: when it said so, and for how long nothing has come.
        self._stalls: dict[str, tuple[float, float]] = {}

    def add_outcomes(self, num: int, promised_s: float, taken_s: float, now: float) -> None:
        """So many more, with the sums of their seconds."""
        slack_s = num * self._slack_s
        if taken_s + slack_s < SLOW_AGAIN * (promised_s + slack_s):
            self._memory_s = MEMORY_S
        elif 0.0 < self._share_left(now, self._memory_s) < 0.5:
            self._memory_s = min(2 * self._memory_s, LONGEST_MEMORY_S)
        keep = self._share_left(now, MEMORY_S) * max(0.0, 1.0 - num / MEMORY_OUTCOMES)
        share = min(1.0, MEMORY_OUTCOMES / num)
        self._num = keep * self._num + share * num
        self._promised_s = keep * self._promised_s + share * promised_s
        self._taken_s = keep * self._taken_s + share * taken_s
        self._at = now

    def set_stall(self, gateway_id: str, stalled_s: float | None, now: float) -> None:
        """For how long nothing has come to this gateway that should have; None if it waits for nothing."""
        if stalled_s is None:
            self._stalls.pop(gateway_id, None)
        else:
            self._stalls[gateway_id] = now, stalled_s

    def slowness(self, now: float, *, is_tried: bool = False) -> float:
        """By which factor promises, slack included, were exceeded: 1 at least, and without evidence.

        One more outcome that was as promised is all that is left when the others are forgotten. While the
        node `is_tried`, and its next outcome is still to come, none is.
        """
        if self._taken_s <= self._promised_s:
            return 1.0
        slack_s = self._num * self._slack_s
        ratio = (self._taken_s + slack_s) / (self._promised_s + slack_s)
        num = self._num if is_tried else self._share_left(now, self._memory_s) * self._num
        return max(1.0, (num * ratio + 1.0) / (num + 1.0))

    def stall_s(self, now: float) -> float:
        """For how long nothing has come to any gateway that waits for something."""
        if not self._stalls:
            return 0.0
        lately = [stalled_s for said_at, stalled_s in self._stalls.values() if now - said_at <= STALL_HOLDS_S]
        stalled_s = min(lately, default=0.0)
        return stalled_s if stalled_s > SHORTEST_STALL_S else 0.0

    def _share_left(self, now: float, memory_s: float) -> float:
        return math.exp((self._at - now) / memory_s)


class _Evidence:
    """On one incarnation of a node."""

    def __init__(self) -> None:
        self.heard_at = -math.inf
        self.prompts = Record(PROMPT_SLACK_S)
        self.steps = Record(STEP_SLACK_S)


class Belief:
    """What gateways have seen of nodes lately, and what follows from it for the two sides of a group."""

    def __init__(self) -> None:
        self._nodes: dict[NodeRef, _Evidence] = {}

    def __len__(self) -> int:
        """Nodes with evidence."""
        return len(self._nodes)

    def hear(self, gateway_id: str, seen: NodeSeen, step_s: float, now: float) -> None:
        """Take what a gateway saw of a node, whose decode steps should take `step_s` by its own word."""
        known = self._nodes.setdefault(seen.node, _Evidence())
        known.heard_at = now
        if seen.num_prompts:
            known.prompts.add_outcomes(seen.num_prompts, seen.promised_s, seen.taken_s, now)
        if seen.num_gaps:  # their mean is one outcome, however many sequences a step had
            known.steps.add_outcomes(1, step_s, seen.gaps_s / seen.num_gaps, now)
        waits = seen.num_prompts or seen.prompt_stall_s
        known.prompts.set_stall(gateway_id, seen.prompt_stall_s if waits else None, now)
        waits = seen.num_gaps or seen.step_stall_s
        known.steps.set_stall(gateway_id, max(0.0, seen.step_stall_s - step_s) if waits else None, now)

    def forget_old(self, now: float) -> None:
        """Drop what has lost its weight, so that memory stays bounded."""
        for ref, known in list(self._nodes.items()):
            if now - known.heard_at > FORGET_AFTER_S:
                del self._nodes[ref]

    def doubts(
        self,
        members: Iterable[NodeRef],
        prefill: Collection[NodeRef],
        decode: Collection[NodeRef],
        now: float,
        *,
        with_prompts: Collection[NodeRef] = (),
        with_sequences: Collection[NodeRef] = (),
    ) -> Sliced[dict[NodeRef, Doubt]]:
        """Of the members of a group, by node that is not trusted. The sides are those that serve them now.

        A node that was slow, and has lost its work, is tried again when that is forgotten: with what it gets
        at once. `with_prompts` and `with_sequences` are those that have work.

        The best node of each side passes for what it says: predictions that are wrong for all alike are no
        node's fault, and shut no door.
        """
        known = {ref: one for ref in members if (one := self._nodes.get(ref))}
        yield
        prompts = {ref: one.prompts for ref, one in known.items()}
        late = yield from _excesses(prompts, prefill, with_prompts, now)
        steps = {ref: one.steps for ref, one in known.items()}
        slow = yield from _excesses(steps, decode, with_sequences, now)
        doubts: dict[NodeRef, Doubt] = {}
        for ref in late.keys() | slow.keys():
            if len(doubts) % RECORDS_PER_SLICE == 0:
                yield
            lateness, stall_s = late.get(ref, NO_EXCESS)
            slowness, step_stall_s = slow.get(ref, NO_EXCESS)
            doubts[ref] = Doubt(
                slowness=max(lateness, slowness),
                # The slack is part of what takes so many times longer: all of it where a node promises the
                # impossible.
                first_token_s=(lateness - 1.0) * PROMPT_SLACK_S + stall_s,
                step_s=(slowness - 1.0) * STEP_SLACK_S + step_stall_s,
            )
        return doubts


class _Excess(NamedTuple):
    slowness: float
    stall_s: float


NO_EXCESS = _Excess(1.0, 0.0)


def _excesses(
    records: Mapping[NodeRef, Record], side: Collection[NodeRef], tried: Collection[NodeRef], now: float
) -> Sliced[dict[NodeRef, _Excess]]:
    """By how much each node is worse than the best of the side; without those that are as good."""
    found: dict[NodeRef, _Excess] = {}
    for number, (ref, record) in enumerate(records.items()):
        if number % RECORDS_PER_SLICE == 0:
            yield
        one = _Excess(record.slowness(now, is_tried=ref in tried), record.stall_s(now))
        if one != NO_EXCESS:
            found[ref] = one
    if not found:
        return found
    yield
    # Without evidence a node is as good as its word.
    best = [found.get(ref, NO_EXCESS) for ref in side]
    least_slowness = min((one.slowness for one in best), default=1.0)
    least_stall_s = min((one.stall_s for one in best), default=0.0)
    excesses: dict[NodeRef, _Excess] = {}
    for number, (ref, one) in enumerate(found.items()):
        if number % RECORDS_PER_SLICE == 0:
            yield
        excess = _Excess(_in_steps(one.slowness / least_slowness), max(0.0, one.stall_s - least_stall_s))
        if excess != NO_EXCESS:
            excesses[ref] = excess
    return excesses


def _in_steps(slowness: float) -> float:
    steps = max(0, math.floor(math.log(slowness, SLOWNESS_STEP) + 1e-9))
    return float(SLOWNESS_STEP**steps)
