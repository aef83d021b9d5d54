"""Finds the few nodes that are worth weighing, without looking at all of them.

Nodes that can exchange blocks form a group. In a group each side is kept sorted by how soon a node could
begin, one list per class of equal speed: the best of a class is at its front, whatever the request.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from flowkv_common.wire.messages import NodeRef
from flowkv_common.wire.nodes import SILENT_AFTER_PERIODS, LoadReport, NodeDescriptor
from flowkv_scheduler.prefixes import PrefixIndex
from flowkv_scheduler.views import NodeView, Speed, Work, speed_of, view_of

if TYPE_CHECKING:
    from flowkv_common.wire.nodes import NodeDescriptor
    from flowkv_scheduler.views import NodeView

# Nodes whose speeds differ by less than this factor are compared by their load alone.
_SPEED_STEP = math.log(1.25)


class Group(NamedTuple):
    """What nodes have in common that can exchange blocks: the weights, the layout, the kind of memory."""

    fingerprint: str
    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    memory: str


class _Place(msgspec.Struct, frozen=True, gc=False):
    """Where a node stands on one side, to be found again."""

    group: Group
    speed_class: int
    key: tuple[float, str]


class Side:
    """Nodes of one side, by group and speed class, each sorted by `(seconds, node id)`.

    Plain lists: to move what comes behind a node is one `memmove`, of 80 kB with 10,000 nodes.
    """

    def __init__(self) -> None:
        self._sorted: dict[Group, dict[int, list[tuple[float, str]]]] = {}
        self._places: dict[str, _Place] = {}
        self._views: dict[str, NodeView] = {}

    def put(self, view: NodeView, group: Group, speed_s: float, seconds: float) -> None:
        place = _Place(group, round(math.log(speed_s) / _SPEED_STEP), (seconds, view.node_id))
        if self._places.get(view.node_id) != place:
            self.remove(view.node_id)
            self._places[view.node_id] = place
            classes = self._sorted.setdefault(group, {})
            insort(classes.setdefault(place.speed_class, []), place.key)
        self._views[view.node_id] = view

    def remove(self, node_id: str) -> None:
        place = self._places.pop(node_id, None)
        if place is None:
            return
        del self._views[node_id]
        classes = self._sorted[place.group]
        by_load = classes[place.speed_class]
        del by_load[bisect_left(by_load, place.key)]
        if not by_load:
            del classes[place.speed_class]
        if not classes:
            del self._sorted[place.group]

    def has(self, group: Group) -> bool:
        return group in self._sorted

    def find(self, group: Group, num: int, accepts: Callable[[NodeView], bool]) -> list[NodeView]:
        """Of those that are accepted the soonest, `num` of each class of speed."""
        views = self._views
        found: list[NodeView] = []
        for by_load in self._sorted.get(group, {}).values():
            nodes = (views[node_id] for _, node_id in by_load)
            found += islice(filter(accepts, nodes), num)
        return found

    def member(self, group: Group, node_id: str) -> NodeView | None:
        place = self._places.get(node_id)
        return self._views[node_id] if place and place.group == group else None


class Members:
    """All nodes of each group, whatever their side: for when a side is empty."""

    def __init__(self) -> None:
        self.groups: list[Group] = []  # in one order, whatever the nodes' is
        self._views: dict[Group, dict[str, NodeView]] = {}

    def put(self, view: NodeView, group: Group) -> None:
        if group not in self._views:
            insort(self.groups, group, key=repr)
            self._views[group] = {}
        self._views[group][view.node_id] = view

    def remove(self, node_id: str, group: Group) -> None:
        del self._views[group][node_id]
        if not self._views[group]:
            del self._views[group]
            self.groups.remove(group)

    def find(self, group: Group, num: int, accepts: Callable[[NodeView], bool]) -> list[NodeView]:
        """`num` of those that are accepted, by id. O(n log n)."""
        by_id = (view for _, view in sorted(self._views.get(group, {}).items()))
        return list(islice(filter(accepts, by_id), num))

    def member(self, group: Group, node_id: str) -> NodeView | None:
        return self._views.get(group, {}).get(node_id)


class Index:
    """Both sides of all groups. A mixed node stands on both.

    The nodes of `prefill` are sorted by when they could begin, those of `decode` by the length of a step.
    """

    def __init__(self) -> None:
        self.prefill = Side()
        self.decode = Side()
        self.members = Members()
        self._group_of: dict[str, Group] = {}

    @property
    def groups(self) -> list[Group]:
        return self.members.groups

    def groups_of(self, fingerprint: str) -> list[Group]:
        """Those that serve the model."""
        return [group for group in self.groups if group.fingerprint == fingerprint]

    def is_whole(self, group: Group) -> bool:
        """Has it nodes on both sides?"""
        return self.prefill.has(group) and self.decode.has(group)

    def put(self, view: NodeView) -> None:
        """Take the node up, or to its new place."""
        group = group_of(view.descriptor)
        if self._group_of.get(view.node_id) != group:
            self.remove(view.node_id)
            self._group_of[view.node_id] = group
        self.members.put(view, group)
        if view.may_prefill:
            self.prefill.put(view, group, view.speed.prefill_token_s, view.prefill_wait_s)
        else:
            self.prefill.remove(view.node_id)
        if view.may_decode:
            self.decode.put(view, group, view.speed.base_s, view.step_s)
        else:
            self.decode.remove(view.node_id)

    def remove(self, node_id: str) -> None:
        group = self._group_of.pop(node_id, None)
        if group is None:
            return
        self.members.remove(node_id, group)
        self.prefill.remove(node_id)
        self.decode.remove(node_id)


def group_of(node: NodeDescriptor) -> Group:
    layout = node.layout
    return Group(
        fingerprint=node.model.fingerprint,
        num_layers=layout.num_layers,
        block_size=layout.block_size,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        memory=node.memory,
    )


# What an operator knows each part of a group by.
_NAMES = {"fingerprint": "model fingerprint", "dtype": "KV dtype", "memory": "memory of the KV cache"}


def num_pairs(nodes: Iterable[NodeView]) -> int:
    """Of a node that takes prompts and one that decodes, which can exchange blocks, or are the same node."""
    prefill, decode = Counter[Group](), Counter[Group]()
    for node in nodes:
        group = group_of(node.descriptor)
        prefill[group] += node.may_prefill
        decode[group] += node.may_decode
    return sum(count * decode[group] for group, count in prefill.items())


def why_apart(nodes: Iterable[NodeDescriptor]) -> str | None:
    """Who can't exchange blocks with most of the nodes, and by what they differ; None if all can."""
    groups: dict[Group, list[str]] = defaultdict(list)
    for node in sorted(nodes, key=lambda node: node.node.node_id):
        groups[group_of(node)].append(node.node.node_id)
    if len(groups) < 2:
        return None
    most = max(groups, key=lambda group: len(groups[group]))  # of equals, that with the first node
    return "; ".join(
        f"{', '.join(names)} can't exchange KV with {', '.join(groups[most])}: {_differences(group, most)}"
        for group, names in groups.items()
        if group != most
    )


def _differences(group: Group, other: Group) -> str:
    return ", ".join(
        f"{_NAMES.get(name, name.replace('_', ' '))} {mine}, not {theirs}"
        for name, mine, theirs in zip(Group._fields, group, other, strict=True)
        if mine != theirs
    )


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
