"""What the scheduler knows of the cluster: descriptors, latest load reports and its own recent choices.

Plain data, rebuilt from reports within a period. Reads no clock: `now` is seconds of any monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from flowkv_common.wire.messages import LoadReport, NodeDescriptor, NodeRef

# A node is silent after this many of its own report periods: no new work.
SILENT_AFTER_PERIODS = 3.0
# Load reports lag: what we gave a node counts on top of its report for so long, then the report shows it.
CHOICES_COUNT_FOR_PERIODS = 2.0
_FORGET_REPORT_AFTER_S = 60.0


class Work(NamedTuple):
    """What a request adds to a node."""

    prefill_tokens: int = 0
    num_sequences: int = 0
    num_blocks: int = 0


class NodeView(NamedTuple):
    """A node as the policy sees it: what it is, its last report, and what we gave it since."""

    descriptor: NodeDescriptor
    report: LoadReport
    age_s: float
    given: Work = Work()

    @property
    def node_id(self) -> str:
        return self.descriptor.node.node_id

    @property
    def is_silent(self) -> bool:
        return self.age_s > SILENT_AFTER_PERIODS * self.report.period_s

    @property
    def is_usable(self) -> bool:
        """May it get new work?"""
        return self.report.ready and not self.report.draining and not self.is_silent


class _Received(NamedTuple):
    report: LoadReport
    at: float


class ClusterState:
    """Joins descriptors and reports by node *and* incarnation: a former life never passes for the present."""

    def __init__(self) -> None:
        self._descriptors: dict[str, NodeDescriptor] = {}
        self._received: dict[NodeRef, _Received] = {}
        self._given: dict[NodeRef, list[tuple[float, Work]]] = {}

    def set_descriptors(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        """All nodes of the registry, by id."""
        self._descriptors = dict(descriptors)

    def add_report(self, report: LoadReport, now: float) -> None:
        """Take a report; the latest of a life wins, an older one that was overtaken is dropped."""
        known = self._received.get(report.node)
        if known is None or report.seq >= known.report.seq:
            self._received[report.node] = _Received(report, now)

    def add_work(self, node: NodeRef, work: Work, now: float) -> None:
        """Count what we gave a node at once, until its reports show it."""
        self._given.setdefault(node, []).append((now, work))

    def touch_all(self, now: float) -> None:
        """Start all ages anew: after a reconnect the silence was ours, not the nodes'."""
        self._received = {node: known._replace(at=now) for node, known in self._received.items()}

    def views(self, now: float) -> list[NodeView]:
        """The nodes that have both told what they are and reported, by id."""
        self._forget(now)
        views = []
        for _, descriptor in sorted(self._descriptors.items()):
            known = self._received.get(descriptor.node)
            if known is not None:
                given = _sum(work for _, work in self._given.get(descriptor.node, ()))
                views.append(NodeView(descriptor, known.report, now - known.at, given))
        return views

    def _forget(self, now: float) -> None:
        for node, known in list(self._received.items()):
            if now - known.at > max(_FORGET_REPORT_AFTER_S, SILENT_AFTER_PERIODS * known.report.period_s):
                del self._received[node]
        for node, given in list(self._given.items()):
            if node not in self._received:
                del self._given[node]
                continue
            counts_for_s = CHOICES_COUNT_FOR_PERIODS * self._received[node].report.period_s
            self._given[node] = [(at, work) for at, work in given if now - at < counts_for_s]


def _sum(works: Iterable[Work]) -> Work:
    total = Work()
    for work in works:
        total = Work(
            total.prefill_tokens + work.prefill_tokens,
            total.num_sequences + work.num_sequences,
            total.num_blocks + work.num_blocks,
        )
    return total
