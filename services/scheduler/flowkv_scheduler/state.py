"""What the scheduler knows of the cluster: descriptors, latest load reports and its own recent choices.

Plain data, rebuilt from reports within a period. Reads no clock: `now` is seconds of any monotonic clock.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from flowkv_common.wire.messages import NodeRef
from flowkv_common.wire.nodes import LoadReport, NodeDescriptor
from flowkv_scheduler.index import Index
from flowkv_scheduler.prefixes import PrefixIndex
from flowkv_scheduler.speed import Speed, speed_of

# A node is silent after this many of its own report periods: no new work.
SILENT_AFTER_PERIODS = 3.0
# Load reports lag: what we gave a node counts on top of its report for so long, unless it shows it sooner.
CHOICES_COUNT_FOR_PERIODS = 2.0
_FORGET_REPORT_AFTER_S = 60.0
# Weight of the newest prompt in the mean length.
_SMOOTHING = 0.05
_FIRST_MEAN_TOKENS = 512.0


class Work(NamedTuple):
    """What a request adds to a node."""

    prefill_tokens: int = 0
    num_sequences: int = 0
    num_blocks: int = 0
    context_tokens: int = 0

    def plus(self, other: Work, sign: int = 1) -> Work:
        return Work(*(mine + sign * theirs for mine, theirs in zip(self, other, strict=True)))


class NodeView(NamedTuple):
    """A node as the policy sees it: what it is, its last report, what we gave it since, and what it costs."""

    descriptor: NodeDescriptor
    report: LoadReport
    heard_at: float
    given: Work
    speed: Speed
    chunk_beside_s: float  # what a prompt's steps compute besides
    prefill_wait_s: float  # until a prompt that comes now is begun
    step_s: float  # of a decode step, were one more sequence of mean length there
    leaves: str | None = None  # the side that it gets nothing new on: it is being moved to the other

    @property
    def node_id(self) -> str:
        return self.descriptor.node.node_id

    @property
    def cap(self) -> int:
        return self.report.max_prefill_tokens_per_step

    @property
    def chunk(self) -> int:
        """Tokens of a prompt in one step."""
        return max(self.cap, self.descriptor.layout.block_size)

    @property
    def may_prefill(self) -> bool:
        """A decode node's cap is one block: that is for its own preempted sequences."""
        return self.cap > self.descriptor.layout.block_size and self.leaves != "prefill"

    @property
    def may_decode(self) -> bool:
        """A prefill node's cap is its whole token budget."""
        return self.cap < self.descriptor.token_budget and self.leaves != "decode"

    @property
    def num_sequences(self) -> int:
        return self.report.num_running + self.report.num_waiting + self.given.num_sequences

    @property
    def num_context_tokens(self) -> int:
        return self.report.num_context_tokens + self.given.context_tokens

    @property
    def num_queued_tokens(self) -> int:
        return self.report.queued_prefill_tokens + self.given.prefill_tokens

    @property
    def num_available_blocks(self) -> int:
        """Free blocks and cached ones, which are evicted on demand, less what we have given away since."""
        blocks = self.report.blocks
        return blocks.free + blocks.cached - self.given.num_blocks

    def is_usable(self, now: float) -> bool:
        """May it get new work?"""
        silent = now - self.heard_at > SILENT_AFTER_PERIODS * self.report.period_s
        return self.report.ready and not self.report.draining and not silent

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.descriptor.layout.block_size)

    def can_ever_hold(self, num_tokens: int) -> bool:
        return self.num_blocks_for(num_tokens) <= self.descriptor.num_blocks


class _Given(NamedTuple):
    """One choice of ours, which counts until `until` at the latest."""

    until: float
    work: Work


class _Pending:
    """Our choices for one side of a node, until its reports show them."""

    def __init__(self, num_accepted: int) -> None:
        self.sum = Work()
        self._num_accepted = num_accepted
        self._given: list[_Given] = []  # in the order in which they end

    def add(self, given: _Given) -> None:
        insort(self._given, given, key=lambda one: one.until)
        self.sum = self.sum.plus(given.work)

    def settle(self, num_accepted: int, now: float) -> None:
        """Drop as many as the node has taken on since, oldest first, and those that have had their time."""
        num_shown = max(0, num_accepted - self._num_accepted)
        self._num_accepted = num_accepted
        num_ended = bisect_right(self._given, now, key=lambda given: given.until)
        for given in self._given[: max(num_shown, num_ended)]:
            self.sum = self.sum.plus(given.work, -1)
        del self._given[: max(num_shown, num_ended)]


class _Node:
    """What belongs to one life of one node."""

    def __init__(self, report: LoadReport, now: float) -> None:
        self.report = report
        self.heard_at = now
        self.prompts = _Pending(report.num_prompts_accepted)
        self.rooms = _Pending(report.num_rooms_given)
        self.sequences = _Pending(report.num_sequences_accepted)

    @property
    def given(self) -> Work:
        return self.prompts.sum.plus(self.rooms.sum).plus(self.sequences.sum)

    def hear(self, report: LoadReport, now: float) -> None:
        self.report, self.heard_at = report, now
        self.prompts.settle(report.num_prompts_accepted, now)
        self.rooms.settle(report.num_rooms_given, now)
        self.sequences.settle(report.num_sequences_accepted, now)


class ClusterState:
    """Joins descriptors and reports by node *and* incarnation: a former life never passes for the present."""

    def __init__(self) -> None:
        self.index = Index()
        self.prefixes = PrefixIndex()
        self.mean_prompt_tokens = _FIRST_MEAN_TOKENS
        self._descriptors: dict[str, NodeDescriptor] = {}
        self._nodes: dict[NodeRef, _Node] = {}
        self._views: dict[str, NodeView] = {}
        self._leaving: dict[str, str] = {}

    def set_descriptors(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        """All nodes of the registry, by id."""
        before, self._descriptors = self._descriptors, dict(descriptors)
        for node_id in before.keys() | descriptors.keys():
            if before.get(node_id) != descriptors.get(node_id):
                self._refresh(node_id)

    def add_report(self, report: LoadReport, now: float) -> None:
        """Take a report; the latest of a life wins, an older one that was overtaken is dropped."""
        known = self._nodes.get(report.node)
        if known is None:
            self._nodes[report.node] = _Node(report, now)
            self._forget_silent(now)
        elif report.seq >= known.report.seq:
            known.hear(report, now)
        self._refresh(report.node.node_id)

    def add_prompt(self, node: NodeRef, work: Work, now: float) -> None:
        """Count a prompt that we gave a node, until its report shows it or two periods have passed."""
        if known := self._nodes.get(node):
            until = now + CHOICES_COUNT_FOR_PERIODS * known.report.period_s
            known.prompts.add(_Given(until, work))
            self._refresh(node.node_id)

    def add_sequence(self, node: NodeRef, work: Work, arrives_in_s: float, now: float) -> None:
        """Count a sequence that will come to a node in `arrives_in_s`, until two periods after that.

        Its blocks only until a report shows that it has its room: that is when its prompt begins.
        """
        if known := self._nodes.get(node):
            until = now + arrives_in_s + CHOICES_COUNT_FOR_PERIODS * known.report.period_s
            known.rooms.add(_Given(until, Work(num_blocks=work.num_blocks)))
            known.sequences.add(_Given(until, work._replace(num_blocks=0)))
            self._refresh(node.node_id)

    def see_prompt(self, num_tokens: int) -> None:
        """Learn how long prompts are: that tells what a queue of so many tokens costs."""
        self.mean_prompt_tokens += _SMOOTHING * (num_tokens - self.mean_prompt_tokens)

    def set_leaving(self, leaving: Mapping[str, str]) -> None:
        """Which side each of these nodes gets nothing new on, by id."""
        before, self._leaving = self._leaving, dict(leaving)
        for node_id in before.keys() | leaving.keys():
            if before.get(node_id) != leaving.get(node_id):
                self._refresh(node_id)

    def touch_all(self, now: float) -> None:
        """Start all ages anew: after a reconnect the silence was ours, not the nodes'."""
        for ref, known in self._nodes.items():
            known.heard_at = now
            self._refresh(ref.node_id)

    def views(self) -> list[NodeView]:
        """The nodes that have both told what they are and reported, by id."""
        return [view for _, view in sorted(self._views.items())]

    def view(self, node_id: str) -> NodeView | None:
        return self._views.get(node_id)

    def usable(self, now: float) -> Iterator[NodeView]:
        return (view for view in self._views.values() if view.is_usable(now))

    def _refresh(self, node_id: str) -> None:
        """Compute the node's view anew and put it where the index keeps it."""
        descriptor = self._descriptors.get(node_id)
        known = self._nodes.get(descriptor.node) if descriptor else None
        if descriptor is None or known is None:
            self._views.pop(node_id, None)
            self.index.remove(node_id)
            return
        view = self._make_view(descriptor, known)
        self._views[node_id] = view
        self.index.put(view)

    def _make_view(self, descriptor: NodeDescriptor, known: _Node) -> NodeView:
        report, given = known.report, known.given
        speed = speed_of(report)
        view = NodeView(
            descriptor,
            report,
            known.heard_at,
            given,
            speed,
            0.0,
            0.0,
            0.0,
            self._leaving.get(descriptor.node.node_id),
        )
        mean, num_queued = self.mean_prompt_tokens, view.num_queued_tokens
        beside_s = speed.chunk_beside_s(
            report.num_running, report.num_context_tokens, is_decode=not view.may_prefill
        )
        wait_s = speed.prefill_s(num_queued, 0, view.chunk, beside_s)
        # The queue is of prompts of mean length, not one prompt.
        wait_s += num_queued * (mean - num_queued) / 2 * speed.attended_token_s
        step_s = speed.decode_step_s(view.num_sequences + 1, view.num_context_tokens + int(mean))
        step_s += min(num_queued, view.chunk) * speed.prefill_token_s
        return view._replace(chunk_beside_s=beside_s, prefill_wait_s=max(0.0, wait_s), step_s=step_s)

    def _forget_silent(self, now: float) -> None:
        """Lives that ended long ago; asked when a new one begins, so memory stays bounded."""
        for ref, known in list(self._nodes.items()):
            silent_s = SILENT_AFTER_PERIODS * known.report.period_s
            if now - known.heard_at > max(_FORGET_REPORT_AFTER_S, silent_s):
                del self._nodes[ref]
                self._refresh(ref.node_id)
