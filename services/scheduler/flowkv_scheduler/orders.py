"""What a planner wants done. Plain data; whoever runs the planner carries it out."""

from __future__ import annotations

from typing import NamedTuple

from flowkv_common.wire.parts import NodeRef


class MoveCap(NamedTuple):
    """Lend the node to the other side, or take it back: its prefill cap becomes `cap`."""

    node: NodeRef
    cap: int
    reason: str


class RegimeChange(NamedTuple):
    before: str
    after: str
    reason: str


class ScaleWanted(NamedTuple):
    """`change` more nodes of a role (fewer if negative) would meet the goals; 0 takes that back."""

    role: str
    change: int
    reason: str


Order = MoveCap | RegimeChange | ScaleWanted
