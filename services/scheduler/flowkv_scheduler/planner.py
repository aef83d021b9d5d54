"""All that a scheduler decides, in one pure object: the process, the replay and the simulator run this one.

Reads no clock and does no I/O: `now` is seconds of any monotonic clock, what is decided is returned.
"""

from __future__ import annotations

from collections.abc import Mapping

from flowkv_common import errors
from flowkv_common.wire.messages import ScheduleRequest, Wait
from flowkv_common.wire.nodes import LoadReport, NodeDescriptor
from flowkv_scheduler import admission, policy
from flowkv_scheduler.cluster import CHOICES_COUNT_FOR_PERIODS, ClusterState
from flowkv_scheduler.policy import Choice, Chooser, Goals, Weighing
from flowkv_scheduler.rebalance import Order, Rate, Regimes, Thresholds
from flowkv_scheduler.waiting import Waiting

# Prompts: enough to see through a burst, few enough to follow the traffic.
NUM_REMEMBERED = 40


class Planner:
    """Fed with descriptors and reports; answers requests, and once per period says what should change."""

    def __init__(self, goals: Goals, *, lends: bool = True, choose: Chooser = policy.choose) -> None:
        """With another `choose` it is another policy, within the same admission."""
        self.state = ClusterState()
        self._prefill_tokens = Rate(NUM_REMEMBERED)
        self._output_tokens = Rate(NUM_REMEMBERED)
        self._goals = goals
        self._lends = lends
        self.begin_term()
        self._limits = admission.Limits(lends=lends)
        self._choose = choose
        self._waiting = Waiting()

    def begin_term(self) -> None:
        """Forget what was lent: others may have led since. Whom they have lent shows in the nodes' caps."""
        self.regimes = Regimes(self._goals, Thresholds(), lends=self._lends)
        self.state.set_leaving({})

    def set_descriptors(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        self.state.set_descriptors(descriptors)
        self.regimes.follow(descriptors.values())

    def add_report(self, report: LoadReport, now: float) -> None:
        self.state.add_report(report, now)

    def touch_all(self, now: float) -> None:
        """After a reconnect: the silence was ours, not the nodes'."""
        self.state.touch_all(now)

    def schedule(self, request: ScheduleRequest, now: float) -> Choice | Wait:
        """The pair for one attempt, counted at once; or when to ask again. Raises as `admission.decide`."""
        self._waiting.forget_gone(now)
        try:
            decision = admission.decide(
                request, self.state, self._goals, self._limits, now, self._choose, self._waiting
            )
        except errors.FlowKVError:
            self._waiting.forget(request.request_id)
            raise
        if isinstance(decision, Choice):
            self._waiting.forget(request.request_id)
            self._count(request, decision, now)
            return decision
        self._waiting.note(request, decision.node_id, decision.need, decision.wait.retry_in_s, now)
        return decision.wait

    def why_not_ready(self, fingerprint: str, now: float) -> str | None:
        """Why a request for the model, however short, would be given no nodes; None if it would."""
        least = ScheduleRequest(
            request_id="", attempt=0, fingerprint=fingerprint, num_prompt_tokens=1, max_new_tokens=1
        )
        weighing = Weighing(least, self.state, self._goals, now)
        if any(weighing.stands(group) for group in weighing.groups):
            return None
        return "no node of the model is ready"

    def tick(self, now: float) -> list[Order]:
        """Once per period: regimes, lending, scaling."""
        orders = self.regimes.tick(
            list(self.state.usable(now)), self._prefill_tokens.at(now), now, self._output_tokens.at(now)
        )
        self.state.set_leaving(self.regimes.leaving)
        return orders

    def _count(self, request: ScheduleRequest, choice: Choice, now: float) -> None:
        """Load reports lag: what we have just given must not be given twice."""
        self.state.see_prompt(request.num_prompt_tokens)
        self._prefill_tokens.add(choice.prefill_s / choice.prefill.speed.prefill_token_s, now)
        for_prefill, for_decode = policy.added_work(request, choice)
        self._output_tokens.add(for_decode.output_tokens, now)
        arrives_in_s = choice.first_token_s
        self.state.add_prompt(choice.prefill.descriptor.node, for_prefill, now)
        self.state.add_sequence(choice.decode.descriptor.node, for_decode, arrives_in_s, now)
        until = now + choice.predicted_s + CHOICES_COUNT_FOR_PERIODS * choice.prefill.report.period_s
        nodes = {node.node_id: node.descriptor.node for node in (choice.prefill, choice.decode)}
        self.state.prefixes.expect(nodes.values(), request.block_hashes, until)
