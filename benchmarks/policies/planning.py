"""A planner whose pairs come from a `Chooser`: what a policy needs around it to take a scheduler's place."""

from __future__ import annotations

from collections.abc import Mapping

from flowkv_common.wire.messages import LoadReport, NodeDescriptor, ScheduleRequest, Wait
from flowkv_scheduler import policy
from flowkv_scheduler.planner import Chooser, Goals, Order
from flowkv_scheduler.policy import Choice
from flowkv_scheduler.state import ClusterState

RETRY_IN_S = 0.25


class ChoosingPlanner:
    """Counts its choices as FlowKV's planner does; refuses nothing, lends nothing."""

    def __init__(self, choose: Chooser, goals: Goals) -> None:
        self.state = ClusterState()
        self._choose = choose
        self._goals = goals

    def set_descriptors(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        self.state.set_descriptors(descriptors)

    def add_report(self, report: LoadReport, now: float) -> None:
        self.state.add_report(report, now)

    def touch_all(self, now: float) -> None:
        self.state.touch_all(now)

    def schedule(self, request: ScheduleRequest, now: float) -> Choice | Wait:
        choice = self._choose(request, self.state, self._goals, now)
        if choice is None:
            return Wait(retry_in_s=RETRY_IN_S, reason="no pair could take it")
        for_prefill, for_decode = policy.added_work(request, choice)
        self.state.add_work(choice.prefill.descriptor.node, for_prefill, now)
        self.state.add_work(choice.decode.descriptor.node, for_decode, now)
        return choice

    def tick(self, now: float) -> list[Order]:
        return []
