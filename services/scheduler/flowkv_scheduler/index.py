"""Finds the few nodes that are worth weighing, without looking at all of them.

Nodes that can exchange blocks form a group. In a group each side is kept sorted by how soon a node could
begin, one list per class of equal speed: the best of a class is at its front, whatever the request.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import msgspec

if TYPE_CHECKING:
    from flowkv_common.wire.nodes import NodeDescriptor
    from flowkv_scheduler.view import NodeView

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
