"""The scheduler process: a planner on the bus that answers gateways and applies orders while it leads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AsyncExitStack
from typing import TypeVar

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from flowkv_common import __version__, errors
from flowkv_common.aio import running
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.lease import Lease
from flowkv_common.bus.registry import watch_nodes
from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.config import SchedulerSettings
from flowkv_common.telemetry import process_registry, serve_http, service_app
from flowkv_common.tracing import Attributes, open_tracing
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import (
    Accepted,
    Assignment,
    NodeRef,
    NodesSeen,
    ReadyReply,
    ReadyRequest,
    ScheduleRequest,
    Wait,
)
from flowkv_common.wire.nodes import (
    REGIMES,
    CapMoved,
    LoadReport,
    NodeDescriptor,
    RegimeChanged,
    ScaleWanted,
    SetPrefillCap,
)
from flowkv_scheduler.belief import why_untrue
from flowkv_scheduler.cluster import Goals, num_pairs, why_apart
from flowkv_scheduler.planner import TICK_PERIOD_S, Planner
from flowkv_scheduler.prefixes import following_prefixes
from flowkv_scheduler.rebalance import NORMAL, SIDES, Order
from flowkv_scheduler.slices import Sliced

log = logging.getLogger(__name__)

T = TypeVar("T")

# As long as the planner's period: what has failed by then is asked anew by what it orders next.
ORDER_TIMEOUT_S = 0.5
# Turns of the loop from the bytes of an ask to those of its answer: six, and what the request's event takes.
TURNS_PER_ASK = 8
# Of a gateway's word on nodes so much is taken at once, some 0.3 ms.
SEEN_PER_SLICE = 100
# A decision takes some 0.1 ms.
DECISION_BUCKETS = (5e-5, 1e-4, 1.5e-4, 2e-4, 3e-4, 4e-4, 6e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.025, 0.1, 1.0)
OUTCOMES = ("assigned", "wait", "400", "429", "503")


class Orders:
    """Applies a leader's orders. `budget_of`: the chunk budget in a node's last report, None without one.

    Nothing is kept for later: an order that fails is logged, and the planner repeats it if it still wants it.
    """

    def __init__(
        self,
        bus: Bus,
        lease: Lease,
        registry: CollectorRegistry,
        budget_of: Callable[[NodeRef], int | None],
    ) -> None:
        self._bus = bus
        self._lease = lease
        self._budget_of = budget_of
        self._regimes_told: dict[str, RegimeChanged] = {}  # by model, the last ones
        self._wanted: dict[tuple[str, str], int] = {}  # model, role -> change, as last told
        self._models: Set[str] = frozenset()
        self._shows_metrics = False
        self._num_moves = Counter("flowkv_cap_moves", "Prefill chunk budgets moved", registry=registry)
        self._regimes = Gauge(
            "flowkv_regime", "1 for what the leader sees", ["model_name", "regime"], registry=registry
        )
        self._scale = Gauge(
            "flowkv_scale_wanted",
            "Nodes to add, or take away, to meet the goals",
            ["model_name", "role"],
            registry=registry,
        )

    @property
    def regime(self) -> tuple[str, str]:
        """The worst of all models, and why, as last told."""
        worst = max(self._regimes_told.values(), key=lambda told: REGIMES.index(told.after), default=None)
        if worst is None:
            return NORMAL, ""
        whose = f"{worst.model}: " if len(self._models) > 1 else ""
        return worst.after, whose + worst.reason

    def set_models(self, names: Set[str]) -> None:
        """The models that have nodes: no other's metrics are shown."""
        for name in self._models - names:
            self._regimes_told.pop(name, None)
            if self._shows_metrics:
                self._forget_metrics(name)
        new, self._models = names - self._models, names
        if self._shows_metrics:
            for name in new:
                self._show_metrics(name)

    @contextlib.contextmanager
    def showing_metrics(self) -> Iterator[None]:
        """While we lead, show what our planner finds; else that is another's to show."""
        self._shows_metrics = True
        for name in self._models:
            self._show_metrics(name)
        try:
            yield
        finally:
            self._shows_metrics = False
            self._regimes.clear()
            self._scale.clear()
            self._wanted.clear()
            self._regimes_told.clear()

    def _show_metrics(self, model: str) -> None:
        self._show_regime(model)
        for role in SIDES:
            self._scale.labels(model, role).set(self._wanted.get((model, role), 0))

    def _forget_metrics(self, model: str) -> None:
        for regime in REGIMES:
            self._regimes.remove(model, regime)
        for role in SIDES:
            self._scale.remove(model, role)
            self._wanted.pop((model, role), None)

    def _show_regime(self, model: str) -> None:
        told = self._regimes_told.get(model)
        for regime in REGIMES:
            self._regimes.labels(model, regime).set(regime == (told.after if told else NORMAL))

    async def apply_orders(self, orders: Iterable[Order]) -> None:
        """All of them at once. Raises nothing of what goes wrong at nodes or on NATS."""
        async with asyncio.TaskGroup() as tasks:
            for order in orders:
                order = msgspec.structs.replace(order, epoch=self._lease.epoch)
                match order:
                    case SetPrefillCap():
                        tasks.create_task(self._move_budget(order))
                    case RegimeChanged():
                        tasks.create_task(self._change_regime(order))
                    case ScaleWanted():
                        tasks.create_task(self._want_scale(order))

    async def _move_budget(self, order: SetPrefillCap) -> None:
        node_id, before, after = (
            order.node.node_id,
            self._budget_of(order.node),
            order.max_prefill_tokens_per_step,
        )
        if not self._lease.is_held:
            return  # our process was held up: another may lead. What slips through is refused by its epoch
        subject = subjects.at(subjects.NODE_CAP, node_id)
        try:
            await self._bus.request(subject, order, Accepted, timeout_s=ORDER_TIMEOUT_S)
        except errors.FlowKVError as error:
            log.warning(
                "the prefill chunk budget of %s is not moved to %d: %s", node_id, after, error.message
            )
            return
        self._num_moves.inc()
        log.info(
            "moved the prefill chunk budget of %s from %s to %d: %s", node_id, before, after, order.reason
        )
        moved = CapMoved(node=order.node, epoch=order.epoch, after=after, reason=order.reason, before=before)
        await self._publish_event(subjects.event("cap_moved", node_id), moved)

    async def _change_regime(self, order: RegimeChanged) -> None:
        if order.model in self._models:
            self._regimes_told[order.model] = order
            self._show_regime(order.model)
        log.info(
            "the regime of %s is %s, it was %s: %s", order.model, order.after, order.before, order.reason
        )
        await self._publish_event(subjects.event("regime_changed", self._lease.holder_id), order)

    async def _want_scale(self, order: ScaleWanted) -> None:
        if self._wanted.get((order.model, order.role), 0) == order.change:
            return  # told before
        if order.model in self._models:
            self._wanted[order.model, order.role] = order.change
            self._scale.labels(order.model, order.role).set(order.change)
        log.info("%+d %s nodes are wanted of %s: %s", order.change, order.role, order.model, order.reason)
        await self._publish_event(subjects.event("scale_wanted", order.role), order)

    async def _publish_event(self, subject: str, event: msgspec.Struct) -> None:
        try:
            await self._bus.publish(subject, event)
        except errors.FlowKVError as error:
            log.warning("not told on %s: %s", subject, error.message)


class Scheduler:
    """A planner on the bus: hears reports always, decides while `lease` is held.

    `clock` gives monotonic seconds.
    """

    def __init__(
        self,
        bus: Bus,
        lease: Lease,
        planner: Planner,
        registry: CollectorRegistry,
        clock: Callable[[], float],
    ) -> None:
        self.planner = planner
        self._bus = bus
        self._lease = lease
        self._clock = clock
        self._told_bad: set[str] = set()  # subjects of reports that were dropped
        self._apart: str | None = None  # what was last told of nodes that can't serve together
        self._orders = Orders(bus, lease, registry, self._budget_of)
        self._decisions = Counter(
            "flowkv_schedule_decisions", "Schedule requests by outcome", ["outcome"], registry=registry
        )
        for outcome in OUTCOMES:
            self._decisions.labels(outcome)
        self._seconds = Histogram(
            "flowkv_schedule_seconds", "Time to decide", buckets=DECISION_BUCKETS, registry=registry
        )
        self._bad_reports = Counter(
            "flowkv_bad_reports", "Load reports that can't be true, dropped", registry=registry
        )
        usable = Gauge("flowkv_usable_nodes", "Nodes that may get new work", registry=registry)
        usable.set_function(lambda: sum(1 for _ in self.planner.state.usable(clock())))
        pairs = Gauge(
            "flowkv_pairs", "Pairs of a prefill and a decode node that can exchange blocks", registry=registry
        )
        pairs.set_function(lambda: num_pairs(self.planner.state.usable(clock())))
        doubted = Gauge("flowkv_doubted_nodes", "Nodes slower than they say", registry=registry)
        doubted.set_function(lambda: len(self.planner.state.doubted))
        is_leader = Gauge("flowkv_scheduler_is_leader", "1 if this scheduler leads", registry=registry)
        is_leader.set_function(lambda: float(lease.is_held))
        epoch = Gauge("flowkv_scheduler_epoch", "The highest epoch known here", registry=registry)
        epoch.set_function(lambda: lease.highest_epoch)

    def on_report(self, report: LoadReport) -> None:
        descriptor = self.planner.state.descriptor_of(report.node)
        if descriptor is not None and (why := why_untrue(report, descriptor)):
            self.on_bad_report(subjects.load(report.node.node_id), why)
            return
        self._lease.hear(report.epoch)
        self.planner.add_report(report, self._clock())

    def on_bad_report(self, subject: str, why: str) -> None:
        """One that can't be true is dropped whole: its node falls silent if it sends no better one."""
        self._bad_reports.inc()
        if subject not in self._told_bad:
            self._told_bad.add(subject)
            log.warning("reports on %s are dropped, look at that node: %s", subject, why)

    async def on_seen(self, seen: NodesSeen) -> None:
        """In parts, so that asks don't wait for all of it."""
        for first in range(0, len(seen.nodes), SEEN_PER_SLICE):
            part = seen.nodes[first : first + SEEN_PER_SLICE]
            self.planner.add_seen(msgspec.structs.replace(seen, nodes=part), self._clock())
            await answer_asks()

    def on_nodes(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        self.planner.set_descriptors(descriptors)
        self._orders.set_models({descriptor.model.name for descriptor in descriptors.values()})
        self._told_bad &= set(map(subjects.load, descriptors))
        apart = why_apart(descriptors.values())
        if apart and apart != self._apart:
            log.warning("%s", apart)
        self._apart = apart

    def on_reconnect(self) -> None:
        self.planner.touch_all(self._clock())

    def metadata(self) -> dict[str, str]:
        """What the ADR-32 service shows of us."""
        epoch = str(self._lease.highest_epoch)
        if not self._lease.is_held:
            return {"state": "standby", "epoch": epoch}
        regime, reason = self._orders.regime
        return {"state": "leader", "epoch": epoch, "regime": regime, "regime_reason": reason}

    def why_not_ready(self) -> str | None:
        """A standby is ready while another leads."""
        if not self._bus.is_connected:
            return "not connected to NATS"
        return None if self._lease.has_leader else "nobody leads"

    async def schedule(self, request: ScheduleRequest) -> Assignment | Wait:
        """The pair for one attempt, published too; or when to ask again.

        Raises as `admission.decide`, and `Unavailable` when we can't be sure to lead.
        """
        about: Attributes = {"flowkv.request_id": request.request_id, "flowkv.attempt": request.attempt}
        with self._bus.tracing.begin("schedule", about, kind="server") as span:
            answer = await self._answer(request)
            is_assigned = isinstance(answer, Assignment)
            span.describe({"flowkv.reason": answer.reason, "flowkv.is_assigned": is_assigned})
            return answer

    async def _answer(self, request: ScheduleRequest) -> Assignment | Wait:
        self._check_leads()
        try:
            with self._seconds.time():
                decision = self.planner.schedule(request, self._clock())
        except errors.FlowKVError as error:
            self._decisions.labels(str(error.code)).inc()
            raise
        if isinstance(decision, Wait):
            self._decisions.labels("wait").inc()
            return decision
        self._decisions.labels("assigned").inc()
        promised_s = decision.prefill.own_word(decision.first_token_s)
        assignment = Assignment(
            request_id=request.request_id,
            attempt=request.attempt,
            epoch=self._lease.epoch,
            prefill=decision.prefill.descriptor.node,
            decode=decision.decode.descriptor.node,
            reason=decision.reason,
            prefill_candidates=decision.prefill_candidates,
            decode_candidates=decision.decode_candidates,
            first_token_in_s=decision.first_token_s,
            due_in_s=decision.due_in_s,
            interruptible_for_s=decision.interruptible_for_s,
            # What comes before it is not known yet.
            promised_first_token_in_s=None if decision.interruptible_for_s else promised_s,
            itl_goal_s=self.planner.goals.of_request(request).itl_s,
        )
        await self._bus.publish(subjects.assignment(request.request_id), assignment)
        return assignment

    async def ready(self, request: ReadyRequest) -> ReadyReply:
        """Raises `Unavailable` when we can't be sure to lead."""
        self._check_leads()
        why_not = self.planner.why_not_ready(request.fingerprint, self._clock())
        doubted = self.planner.find_doubted(request.fingerprint)
        return ReadyReply(epoch=self._lease.epoch, why_not=why_not, doubted=doubted)

    def _check_leads(self) -> None:
        if not self._lease.is_held:
            raise errors.Unavailable(f"{self._lease.holder_id} does not lead")

    async def lead(self, service: Service) -> None:
        """Until cancelled: answer schedule requests, and look after the cluster once per period."""
        self.planner.start_term()
        with self._orders.showing_metrics():
            endpoints = [
                Endpoint(subjects.SCHEDULE, ScheduleRequest, self.schedule),
                Endpoint(subjects.SCHEDULER_READY, ReadyRequest, self.ready),
            ]
            await serve_and_tick(service, endpoints, self._tick)

    async def _tick(self) -> None:
        if self._lease.is_held:
            await self._orders.apply_orders(await between_asks(self.planner.tick(self._clock())))

    def _budget_of(self, node: NodeRef) -> int | None:
        view = self.planner.state.view(node.node_id)
        return view.chunk_budget if view is not None and view.descriptor.node == node else None


async def between_asks(work: Sliced[T]) -> T:
    """Whatever else is due comes before the next slice."""
    while True:
        try:
            next(work)
        except StopIteration as ended:
            result: T = ended.value
            return result
        await answer_asks()


async def answer_asks() -> None:
    """Until those that have come are answered, and all else is done that was due."""
    for _ in range(TURNS_PER_ASK):
        await asyncio.sleep(0)


async def serve_and_tick(
    service: Service, endpoints: Sequence[Endpoint], tick: Callable[[], Awaitable[None]]
) -> None:
    """Until cancelled: serve `endpoints`, and call `tick` once per period.

    A tick that takes longer than the period delays the next one; one that fails is logged and costs nothing
    else.
    """
    clock = asyncio.get_running_loop().time
    while True:
        try:
            async with AsyncExitStack() as served:
                for endpoint in endpoints:
                    await served.enter_async_context(service.also_serving(endpoint))
                due = clock()
                while True:
                    try:
                        await tick()
                    except Exception:
                        log.exception("the planner failed")
                    due = max(due + TICK_PERIOD_S, clock())
                    await asyncio.sleep(due - clock())
        except errors.Unavailable as error:
            # Cut off just now. Either the connection comes back in time, or the lease ends and so do we.
            log.warning("can't serve gateways: %s", error.message)
            await asyncio.sleep(TICK_PERIOD_S)


def planner_of(settings: SchedulerSettings) -> Planner:
    goals = Goals(settings.ttft_goal_s, settings.itl_goal_s, settings.max_wait_s)
    return Planner(goals, lends=settings.lending)


async def serve(settings: SchedulerSettings, stop: asyncio.Event, planner: Planner | None = None) -> None:
    """Lead or stand by until `stop` is set, then answer what is in hand and leave.

    Raises `Unavailable` when NATS can't be reached or has closed the connection for good.
    """
    registry = process_registry()
    scheduler_id = f"scheduler-{secrets.token_hex(4)}"
    name = f"flowkv-scheduler/{scheduler_id}"
    async with (
        open_tracing("flowkv-scheduler", scheduler_id) as tracing,
        connect(settings, name=name, user="scheduler", on_closed=stop.set, tracing=tracing) as bus,
    ):
        lease = Lease(bus, scheduler_id)
        clock = asyncio.get_running_loop().time
        scheduler = Scheduler(bus, lease, planner or planner_of(settings), registry, clock)
        bus.on_reconnect(scheduler.on_reconnect)
        app = service_app(registry, scheduler.why_not_ready)
        service = Service(
            bus,
            name="scheduler",
            version=__version__,
            service_id=scheduler_id,
            endpoints=[],
            metadata=scheduler.metadata,
        )

        def on_nodes(descriptors: Mapping[str, NodeDescriptor]) -> None:
            scheduler.on_nodes(descriptors)
            follow_prefixes(descriptors)

        async with (
            serve_http(app, settings.host, settings.http_port) as http_port,
            await bus.subscribe(
                subjects.LOAD_ALL, LoadReport, scheduler.on_report, on_bad=scheduler.on_bad_report
            ),
            await bus.subscribe(subjects.SEEN_ALL, NodesSeen, scheduler.on_seen),
            following_prefixes(bus, scheduler.planner.state.prefixes) as follow_prefixes,
            service,
            running(watch_nodes(bus, on_nodes), lease.campaign(lambda: scheduler.lead(service))),
        ):
            log.info("scheduler is ready, metrics on http://%s:%d/metrics", settings.host, http_port)
            await stop.wait()
