"""All that a scheduler decides, in one pure object: the process, the replay and the simulator run this one.

Reads no clock and does no I/O: `now` is seconds of any monotonic clock, what is decided is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec

from flowkv_common.wire.messages import LoadReport, NodeDescriptor, NodeRef, ScheduleRequest, Wait
from flowkv_scheduler import admission, policy
from flowkv_scheduler.policy import Choice
from flowkv_scheduler.state import ClusterState


class Goals(msgspec.Struct, frozen=True):
    """What users are to see. Seconds."""

    ttft_s: float = 5.0
    itl_s: float = 0.2


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
    """`change` more nodes of a role (fewer if negative) would meet the goals."""

    role: str
    change: int
    reason: str


Order = MoveCap | RegimeChange | ScaleWanted
Chooser = Callable[[ScheduleRequest, ClusterState, Goals, float], Choice | None]


class Planner:
    """Fed with descriptors and reports; answers requests, and once per period says what should change."""

    def __init__(self, goals: Goals, *, lends: bool = True) -> None:
        self.state = ClusterState()
        self._goals = goals
        self._limits = admission.Limits()

    def set_descriptors(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        self.state.set_descriptors(descriptors)

    def add_report(self, report: LoadReport, now: float) -> None:
        self.state.add_report(report, now)

    def touch_all(self, now: float) -> None:
        """After a reconnect: the silence was ours, not the nodes'."""
        self.state.touch_all(now)

    def schedule(self, request: ScheduleRequest, now: float) -> Choice | Wait:
        """The pair for one attempt, counted at once; or when to ask again. Raises as `admission.decide`."""
        decision = admission.decide(request, self.state.views(now), self._limits)
        if isinstance(decision, Choice):
            for_prefill, for_decode = policy.added_work(request, decision)
            self.state.add_work(decision.prefill.descriptor.node, for_prefill, now)
            self.state.add_work(decision.decode.descriptor.node, for_decode, now)
        return decision

    def tick(self, now: float) -> list[Order]:
        """Once per period: regimes, lending, scaling."""
        return []
