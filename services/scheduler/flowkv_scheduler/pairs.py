"""Which nodes can serve together, and why others can't: one whose cache is laid out otherwise serves alone.

Pure.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from flowkv_common.wire.nodes import NodeDescriptor
from flowkv_scheduler.index import Group, group_of
from flowkv_scheduler.view import NodeView

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
