"""The scheduler as a process: feeds the state from NATS, asks the pure policy, answers and tells everyone.

Holds nothing that a restarted scheduler would not learn again within a report period.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from flowkv_common import __version__, errors
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.registry import watch_nodes
from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.config import SchedulerSettings
from flowkv_common.metrics import serve_http, service_app
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Assignment, LoadReport, ScheduleRequest, Wait
from flowkv_scheduler.planner import Goals, Planner
from flowkv_scheduler.policy import Choice

log = logging.getLogger(__name__)

# The fencing number of a leader; there is one scheduler, so there is one epoch.
EPOCH = 1


class Scheduler:
    """Answers schedule requests from the state it is fed. `clock` gives monotonic seconds."""

    def __init__(
        self, bus: Bus, registry: CollectorRegistry, clock: Callable[[], float], *, lends: bool = True
    ) -> None:
        self.planner = Planner(Goals(), lends=lends)
        self._bus = bus
        self._clock = clock
        self._decisions = Counter(
            "flowkv_schedule_decisions", "Schedule requests by outcome", ["outcome"], registry=registry
        )
        self._seconds = Histogram("flowkv_schedule_seconds", "Time to decide", registry=registry)
        usable = Gauge("flowkv_usable_nodes", "Nodes that may get new work", registry=registry)
        usable.set_function(lambda: sum(node.is_usable for node in self.planner.state.views(clock())))

    def on_report(self, report: LoadReport) -> None:
        self.planner.add_report(report, self._clock())

    def on_reconnect(self) -> None:
        self.planner.touch_all(self._clock())

    async def schedule(self, request: ScheduleRequest) -> Assignment | Wait:
        """The pair for one attempt, published too; or when to ask again. Raises as `admission.decide`."""
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
        assignment = _assignment(request, decision)
        await self._bus.publish(subjects.assignment(request.request_id), assignment)
        return assignment


def _assignment(request: ScheduleRequest, choice: Choice) -> Assignment:
    return Assignment(
        request_id=request.request_id,
        attempt=request.attempt,
        epoch=EPOCH,
        prefill=choice.prefill.descriptor.node,
        decode=choice.decode.descriptor.node,
        reason=choice.reason,
        prefill_candidates=choice.prefill_candidates,
        decode_candidates=choice.decode_candidates,
    )


async def serve(settings: SchedulerSettings, stop: asyncio.Event) -> None:
    """Schedule until `stop` is set, then answer what is in hand and leave.

    Raises `Unavailable` when NATS can't be reached or has closed the connection for good.
    """
    registry = CollectorRegistry()
    async with connect(settings.nats_url, name="flowkv-scheduler", on_closed=stop.set) as bus:
        clock = asyncio.get_running_loop().time
        scheduler = Scheduler(bus, registry, clock, lends=settings.lending)
        bus.on_reconnect(scheduler.on_reconnect)
        app = service_app(registry, lambda: None if bus.is_connected else "not connected to NATS")
        service = Service(
            bus,
            name="scheduler",
            version=__version__,
            service_id=f"scheduler-{secrets.token_hex(4)}",
            endpoints=[Endpoint(subjects.SCHEDULE, ScheduleRequest, scheduler.schedule)],
            metadata={"epoch": str(EPOCH)},
        )
        async with (
            serve_http(app, settings.host, settings.http_port) as http_port,
            await bus.subscribe(subjects.LOAD_ALL, LoadReport, lambda report, _: scheduler.on_report(report)),
            asyncio.TaskGroup() as tasks,
        ):
            watch = tasks.create_task(watch_nodes(bus, scheduler.planner.set_descriptors))
            async with service:
                log.info("scheduler is ready, metrics on http://%s:%d/metrics", settings.host, http_port)
                await stop.wait()
            watch.cancel()
        if bus.nc.is_closed:
            raise errors.Unavailable("NATS closed the connection for good")
