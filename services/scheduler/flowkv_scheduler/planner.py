"""All that a scheduler decides, in one pure object: the process, the replay and the simulator run this one.

Reads no clock and does no I/O: `now` is seconds of any monotonic clock, decisions are returned.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from flowkv_common import errors
from flowkv_common.wire.messages import NodeRef, NodesSeen, ScheduleRequest, Wait
from flowkv_common.wire.nodes import LoadReport, NodeDescriptor
from flowkv_scheduler import admission, moves, policy
from flowkv_scheduler.admission import MAX_RETRY_S
from flowkv_scheduler.cluster import CHOICES_COUNT_FOR_PERIODS, ClusterState, Goals
from flowkv_scheduler.demand import Demand, OutputLengths
from flowkv_scheduler.policy import Choice, Chooser, RequestCosts
from flowkv_scheduler.prefixes import NO_HITS, Hits, keys_of
from flowkv_scheduler.rebalance import Order, Rebalancer
from flowkv_scheduler.slices import Sliced
from flowkv_scheduler.waiting import WaitingQueue

TICK_PERIOD_S = 0.5  # of `tick`


class Planner:
    """Fed with descriptors and reports; answers requests, and once per period says what should change."""

    def __init__(self, goals: Goals, *, lends: bool = True, choose: Chooser = policy.choose) -> None:
        """With another `choose` it is another policy, within the same admission."""
        self.state = ClusterState()
        self._demands: dict[str, Demand] = {}
        self._queue = WaitingQueue(goals.ttft_s)
        self.goals = goals
        self._lends = lends
        self._choose = choose
        self.start_term()

    def start_term(self) -> None:
        """Forget what was lent: others may have led since. What they lent shows in the nodes' budgets."""
        self.rebalancer = Rebalancer(self.goals, lends=self._lends)
        self.state.set_leaving({})

    def set_descriptors(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        self.state.set_descriptors(descriptors)
        models = {descriptor.model.fingerprint for descriptor in descriptors.values()}
        self._demands = {model: demand for model, demand in self._demands.items() if model in models}
        self.rebalancer.set_descriptors(descriptors.values())

    def add_report(self, report: LoadReport, now: float) -> None:
        self.state.add_report(report, now)

    def add_seen(self, seen: NodesSeen, now: float) -> None:
        self.state.add_seen(seen, now)

    def touch_all(self, now: float) -> None:
        """After a reconnect: the silence was ours, not the nodes'."""
        self.state.touch_all(now)

    def schedule(self, request: ScheduleRequest, now: float) -> Choice | Wait:
        """The pair for one attempt, counted at once; or when to ask again. Raises as `admission.decide`."""
        self._queue.forget_gone(now)
        hits = self.state.prefixes.hits(keys_of(request.block_hashes), now)
        if request.runs_on:
            return self._schedule_move(request, hits, now)
        demand = self._demand_of(request.fingerprint)
        # What fills the gaps is nobody's loss, and no reason to move a node.
        counts = not request.is_batch
        was_lost = self._queue.is_late(request.request_id)
        is_new = counts and not (
            request.request_id in self._queue or request.attempt or request.num_output_tokens
        )
        try:
            decision = admission.decide(
                request, self.state, self.goals, now, self._queue, hits=hits, choose=self._choose
            )
        except errors.FlowKVError as error:
            self._queue.forget(request.request_id)
            if isinstance(error, errors.Full) and counts and not was_lost:
                demand.add_loss(now)
            # What no pool could hold is nobody's demand.
            is_new = is_new and not isinstance(error, errors.BadRequest)
            raise
        finally:
            if is_new:
                num_cached = self._num_cached(request, hits)
                demand.add_request(request.num_prompt_tokens, num_cached, request.max_new_tokens, now)
        if isinstance(decision, Choice):
            self._queue.forget(request.request_id)
            self._count_choice(request, decision, now)
            return decision
        self._queue.add_waiter(request, decision, now)
        if decision.is_late and not was_lost:
            demand.add_loss(now)
        return decision.wait

    def _schedule_move(self, request: ScheduleRequest, hits: Hits, now: float) -> Choice | Wait:
        """Of an attempt that runs: it goes on there unless a pair with room now would end it sooner."""
        try:
            decision = admission.decide(
                request, self.state, self.goals, now, self._queue, hits=hits, choose=self._choose
            )
        except errors.FlowKVError as error:
            return Wait(retry_in_s=MAX_RETRY_S, reason=error.message)
        if not isinstance(decision, Choice):
            return Wait(retry_in_s=MAX_RETRY_S, reason=decision.wait.reason)
        lengths = self.state.lengths_of(request.fingerprint)
        if why := moves.why_stay(request, decision, self.state.view(request.runs_on), lengths):
            return Wait(retry_in_s=MAX_RETRY_S, reason=why)
        self._count_choice(request, decision, now)
        return decision

    def find_doubted(self, fingerprint: str) -> list[NodeRef]:
        """The nodes of the model that are far slower than they say: what runs there may ask to move."""
        return [
            node.descriptor.node
            for ref in self.state.doubted
            if (node := self.state.view(ref.node_id))
            and node.group.fingerprint == fingerprint
            and moves.is_worth_asking(node.doubt)
        ]

    def why_not_ready(self, fingerprint: str, now: float) -> str | None:
        """Why a request for the model, however short, would be given no nodes; None if it would."""
        least = ScheduleRequest(
            request_id="", attempt=0, fingerprint=fingerprint, num_prompt_tokens=1, max_new_tokens=1
        )
        costs = RequestCosts(least, self.state, self.goals, now, hits=NO_HITS)
        return None if costs.has_nodes() else "no node of the model is ready"

    def tick(self, now: float) -> Sliced[list[Order]]:
        """Once per period: whom to believe, regimes, lending, scaling. Between its slices others may ask."""
        yield from self.state.doubt_nodes(now)
        yield
        # As they are now: what comes meanwhile is for the next tick.
        nodes = list(self.state.usable(now))
        demands = {model: demand.copy() for model, demand in self._demands.items()}
        lengths = defaultdict(
            OutputLengths, {model: each.copy() for model, each in self.state.lengths.items()}
        )
        orders = yield from self.rebalancer.tick(nodes, demands, lengths, now)
        self.state.set_leaving(self.rebalancer.leaving)
        return orders

    def _demand_of(self, fingerprint: str) -> Demand:
        """That of a model without nodes is not kept."""
        known = self._demands.get(fingerprint)
        if known is None:
            known = Demand()
            if self.state.groups_of(fingerprint):
                self._demands[fingerprint] = known
        return known

    def _num_cached(self, request: ScheduleRequest, hits: Hits) -> int:
        """Tokens of the prompt that the node has cached which has the most of them."""
        longest = next(hits.longest_first(), "")
        node = self.state.view(longest)
        if node is None:
            return 0
        return min(
            hits.num_blocks(longest) * node.descriptor.layout.block_size, request.num_prompt_tokens - 1
        )

    def _count_choice(self, request: ScheduleRequest, choice: Choice, now: float) -> None:
        """Load reports lag: what we have just given must not be given twice."""
        self.state.learn_prompt_length(request.fingerprint, request.num_prompt_tokens)
        for_prefill, for_decode = choice.added_work(request, self.state.lengths_of(request.fingerprint))
        prefill, decode = choice.prefill.descriptor.node, choice.decode.descriptor.node
        self.state.add_prompt(prefill, for_prefill, now)
        self.state.add_sequence(decode, for_decode, choice.first_token_s, now)
        until = now + choice.predicted_s + CHOICES_COUNT_FOR_PERIODS * choice.prefill.report.period_s
        self.state.prefixes.expect(
            {prefill.node_id: prefill, decode.node_id: decode}.values(), request.block_hashes, until
        )
