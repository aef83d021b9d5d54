"""What the scheduler knows of the cluster: descriptors, latest load reports and its own recent choices.

Plain data, rebuilt from reports within a period. Reads no clock: `now` is seconds of any monotonic clock.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator, Mapping

import msgspec

from flowkv_common.wire.nodes import LoadReport, NodeDescriptor
from flowkv_common.wire.parts import NodeRef
from flowkv_scheduler.index import Index
from flowkv_scheduler.prefixes import PrefixIndex
from flowkv_scheduler.speed import Speed, speed_of
from flowkv_scheduler.view import SILENT_AFTER_PERIODS, NodeView, Work, view_of

# Load reports lag: what we gave a node counts on top of its report for so long, unless it shows it sooner.
CHOICES_COUNT_FOR_PERIODS = 2.0
_FORGET_REPORT_AFTER_S = 60.0
# Weight of the newest prompt in the mean length.
_SMOOTHING = 0.05
_FIRST_MEAN_TOKENS = 512.0


class _Given(msgspec.Struct, frozen=True, gc=False):
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

    def __init__(self, report: LoadReport, speed: Speed, now: float) -> None:
        self.report = report
        self.speed = speed
        self.heard_at = now
        self.prompts = _Pending(report.num_prompts_accepted)
        self.rooms = _Pending(report.num_rooms_given)
        self.sequences = _Pending(report.num_sequences_accepted)

    @property
    def given(self) -> Work:
        return self.prompts.sum.plus(self.rooms.sum).plus(self.sequences.sum)

    def hear(self, report: LoadReport, speed: Speed, now: float) -> None:
        self.report, self.speed, self.heard_at = report, speed, now
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
        self._decode_costs: dict[str, tuple[float, float]] = {}  # by model: of a sequence, of a context token

    def set_descriptors(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        """All nodes of the registry, by id."""
        before, self._descriptors = self._descriptors, dict(descriptors)
        models = {descriptor.model.fingerprint for descriptor in descriptors.values()}
        self._decode_costs = {model: costs for model, costs in self._decode_costs.items() if model in models}
        for node_id in before.keys() | descriptors.keys():
            if before.get(node_id) != descriptors.get(node_id):
                self._refresh(node_id)

    def add_report(self, report: LoadReport, now: float) -> None:
        """Take a report; the latest of a life wins, an older one that was overtaken is dropped."""
        known = self._nodes.get(report.node)
        if known is None:
            self._nodes[report.node] = _Node(report, self._speed_of(report), now)
            self._forget_silent(now)
        elif report.seq >= known.report.seq:
            known.hear(report, self._speed_of(report), now)
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
            known.sequences.add(_Given(until, msgspec.structs.replace(work, num_blocks=0)))
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

    def _speed_of(self, report: LoadReport) -> Speed:
        """A node that has not decoded yet is taken to do it as another of its model does: not for nothing."""
        speed, descriptor = speed_of(report), self._descriptors.get(report.node.node_id)
        if report.step is None or descriptor is None:
            return speed
        fingerprint = descriptor.model.fingerprint
        if speed.sequence_s or speed.context_token_s:
            self._decode_costs[fingerprint] = speed.sequence_s, speed.context_token_s
        elif costs := self._decode_costs.get(fingerprint):
            return msgspec.structs.replace(speed, sequence_s=costs[0], context_token_s=costs[1])
        return speed

    def _refresh(self, node_id: str) -> None:
        """Compute the node's view anew and put it where the index keeps it."""
        descriptor = self._descriptors.get(node_id)
        known = self._nodes.get(descriptor.node) if descriptor else None
        if descriptor is None or known is None:
            self._views.pop(node_id, None)
            self.index.remove(node_id)
            return
        view = view_of(
            descriptor,
            known.report,
            known.speed,
            known.heard_at,
            known.given,
            mean_prompt_tokens=self.mean_prompt_tokens,
            leaves=self._leaving.get(node_id),
        )
        self._views[node_id] = view
        self.index.put(view)

    def _forget_silent(self, now: float) -> None:
        """Lives that ended long ago; asked when a new one begins, so memory stays bounded."""
        for ref, known in list(self._nodes.items()):
            silent_s = SILENT_AFTER_PERIODS * known.report.period_s
            if now - known.heard_at > max(_FORGET_REPORT_AFTER_S, silent_s):
                del self._nodes[ref]
                self._refresh(ref.node_id)
