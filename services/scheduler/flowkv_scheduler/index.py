"""Finds the few nodes that are worth weighing, without looking at all of them.

Nodes that can exchange blocks form a group. In a group each side is kept sorted by how soon a node could
begin, one list per class of equal speed: the best of a class is at its front, whatever the request.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from sortedcontainers import SortedDict

if TYPE_CHECKING:
    from flowkv_scheduler.state import NodeView

# Nodes whose speeds differ by less than this factor are compared by their load alone.
_SPEED_STEP = math.log(1.25)

Group = tuple[object, ...]


class _Place(NamedTuple):
    """Where a node stands on one side, to be found again."""

    group: Group
    speed_class: int
    key: tuple[float, str]


class _Side:
    """Nodes of one side, by group and speed class, each sorted by `(seconds, node id)`."""

    def __init__(self) -> None:
        self._sorted: dict[Group, dict[int, SortedDict]] = {}
        self._places: dict[str, _Place] = {}

    def put(self, view: NodeView, group: Group, speed_s: float, seconds: float) -> None:
        place = _Place(group, round(math.log(speed_s) / _SPEED_STEP), (seconds, view.node_id))
        if self._places.get(view.node_id) != place:
            self.remove(view.node_id)
            self._places[view.node_id] = place
        self._sorted.setdefault(group, {}).setdefault(place.speed_class, SortedDict())[place.key] = view

    def remove(self, node_id: str) -> None:
        place = self._places.pop(node_id, None)
        if place is None:
            return
        classes = self._sorted[place.group]
        del classes[place.speed_class][place.key]
        if not classes[place.speed_class]:
            del classes[place.speed_class]
        if not classes:
            del self._sorted[place.group]

    def has(self, group: Group) -> bool:
        return group in self._sorted

    def best(self, group: Group, num: int, accepts: Callable[[NodeView], bool]) -> Iterator[NodeView]:
        """The first `num` of each speed class that are accepted."""
        for by_load in self._sorted.get(group, {}).values():
            yield from islice(filter(accepts, by_load.values()), num)


class Index:
    """Both sides of all groups. A mixed node stands on both."""

    def __init__(self) -> None:
        self._prefill = _Side()
        self._decode = _Side()
        self._group_of: dict[str, Group] = {}
        self._members: dict[Group, dict[str, NodeView]] = {}

    @property
    def groups(self) -> list[Group]:
        return sorted(self._members, key=repr)

    @property
    def whole_groups(self) -> list[Group]:
        """Those with nodes on both sides."""
        return [group for group in self.groups if self._prefill.has(group) and self._decode.has(group)]

    def put(self, view: NodeView) -> None:
        """Take the node up, or to its new place."""
        group = group_of(view)
        if self._group_of.get(view.node_id) != group:
            self.remove(view.node_id)
            self._group_of[view.node_id] = group
        self._members.setdefault(group, {})[view.node_id] = view
        if view.may_prefill:
            self._prefill.put(view, group, view.speed.prefill_token_s, view.prefill_wait_s)
        else:
            self._prefill.remove(view.node_id)
        if view.may_decode:
            self._decode.put(view, group, view.speed.base_s, view.step_s)
        else:
            self._decode.remove(view.node_id)

    def remove(self, node_id: str) -> None:
        group = self._group_of.pop(node_id, None)
        if group is None:
            return
        del self._members[group][node_id]
        if not self._members[group]:
            del self._members[group]
        self._prefill.remove(node_id)
        self._decode.remove(node_id)

    def prefill(self, group: Group, num: int, accepts: Callable[[NodeView], bool]) -> list[NodeView]:
        """The prefill nodes that could begin soonest, `num` of each class of speed."""
        return list(self._prefill.best(group, num, accepts))

    def decode(self, group: Group, num: int, accepts: Callable[[NodeView], bool]) -> list[NodeView]:
        """The decode nodes with the shortest steps, `num` of each class of speed."""
        return list(self._decode.best(group, num, accepts))

    def members(self, group: Group, num: int, accepts: Callable[[NodeView], bool]) -> list[NodeView]:
        """`num` nodes of a group, whatever their side, by id. O(n): for when a side is empty."""
        by_id = (view for _, view in sorted(self._members.get(group, {}).items()))
        return list(islice(filter(accepts, by_id), num))

    def member(self, group: Group, node_id: str) -> NodeView | None:
        return self._members.get(group, {}).get(node_id)


def group_of(view: NodeView) -> Group:
    """Only equal layouts of the same weights can exchange blocks."""
    layout = view.descriptor.layout
    return (
        view.descriptor.model.fingerprint,
        layout.num_layers,
        layout.block_size,
        layout.num_kv_heads,
        layout.head_dim,
        layout.dtype,
    )
