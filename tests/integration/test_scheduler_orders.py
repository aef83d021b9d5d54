"""What the planner orders is done and told: caps at nodes, events, metrics. On a real server."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from nats.aio.msg import Msg
from prometheus_client import CollectorRegistry

from flowkv_common import errors
from flowkv_common.aio import running
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.lease import Lease
from flowkv_common.bus.service import Endpoint, Service
from flowkv_common.config import SchedulerSettings
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Accepted, NodeRef, decode
from flowkv_common.wire.nodes import CapMoved, RegimeChanged, ScaleWanted, SetPrefillCap
from flowkv_scheduler.app import Orders, between_asks, serve, serve_and_tick
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.planner import Planner
from flowkv_scheduler.rebalance import Order
from flowkv_scheduler.slices import Sliced
from tests.described_nodes import ReportingNode, is_assigned, reporting, until_answer
from tests.nats_server import NatsServer

D0, D1 = NodeRef(node_id="d0", incarnation="i1"), NodeRef(node_id="d1", incarnation="i1")
WHY = "the test wants it"


def move(node: NodeRef, budget: int) -> SetPrefillCap:
    return SetPrefillCap(node=node, epoch=0, max_prefill_tokens_per_step=budget, reason=WHY)


def scale(change: int) -> ScaleWanted:
    return ScaleWanted(epoch=0, role="prefill", change=change, reason=WHY, model="m")


class Caps:
    """The cap endpoints of some nodes. `deaf` ones never answer, `unwilling` ones refuse."""

    def __init__(self, deaf: tuple[str, ...] = (), unwilling: tuple[str, ...] = ()) -> None:
        self.asked: list[SetPrefillCap] = []
        self._deaf = deaf
        self._unwilling = unwilling

    async def set_cap(self, request: SetPrefillCap) -> Accepted:
        self.asked.append(request)
        if request.node.node_id in self._unwilling:
            raise errors.Stale("a newer leader")
        if request.node.node_id in self._deaf:
            await asyncio.Event().wait()
        return Accepted(node_id=request.node.node_id)

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(subjects.at(subjects.NODE_CAP, name), SetPrefillCap, self.set_cap)
            for name in ("d0", "d1")
        ]


class Events:
    """All events, in order."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()

    async def take(self, msg: Msg) -> None:
        self.queue.put_nowait((msg.subject, msg.data))

    async def next(self, kind: type) -> tuple[str, Any]:
        async with asyncio.timeout(5):
            subject, payload = await self.queue.get()
        return subject.removeprefix("flowkv.v1.event."), decode(payload, kind)


class Office:
    """Orders of a process that leads, and all that can be seen of them."""

    def __init__(self, bus: Bus, lease: Lease) -> None:
        self.registry = CollectorRegistry()
        self.lease = lease
        self.events = Events()
        self.orders = Orders(bus, lease, self.registry, {D0: 16}.get)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


@contextlib.asynccontextmanager
async def office(server: NatsServer, caps: Caps) -> AsyncIterator[Office]:
    async with connect(server.url, name="test") as bus:
        found = Office(bus, Lease(bus, "s"))
        leads = asyncio.Event()

        async def lead() -> None:
            with found.orders.showing_metrics():
                leads.set()
                await asyncio.Event().wait()

        service = Service(
            bus,
            name="node",
            version="0.1.0",
            service_id="d",
            endpoints=caps.endpoints(),
            drain_timeout_s=0.1,
        )
        async with (
            service,
            await bus.subscribe_raw(subjects.event("*", ">"), found.events.take),
            running(found.lease.campaign(lead)),
            asyncio.timeout(10),
        ):
            await leads.wait()
            yield found


async def test_cap_is_asked_for_with_the_epoch_and_told_once_accepted(nats_server: NatsServer) -> None:
    caps = Caps()
    async with office(nats_server, caps) as at:
        await at.orders.apply_orders([move(D0, 512), move(D1, 256)])
        assert sorted(request.max_prefill_tokens_per_step for request in caps.asked) == [256, 512]
        assert {request.epoch for request in caps.asked} == {1}
        told = dict([await at.events.next(CapMoved) for _ in range(2)])
        assert told == {
            "cap_moved.d0": CapMoved(node=D0, epoch=1, before=16, after=512, reason=WHY),
            "cap_moved.d1": CapMoved(node=D1, epoch=1, before=None, after=256, reason=WHY),
        }
        assert at.metric("flowkv_cap_moves_total") == 2


async def test_nodes_that_fail_cost_the_others_nothing(nats_server: NatsServer) -> None:
    caps = Caps(deaf=("d1",))
    async with office(nats_server, caps) as at:
        gone = NodeRef(node_id="gone", incarnation="i1")
        await at.orders.apply_orders([move(gone, 512), move(D1, 512), move(D0, 512)])
        assert len(caps.asked) == 2
        assert (await at.events.next(CapMoved))[0] == "cap_moved.d0"
        assert at.metric("flowkv_cap_moves_total") == 1
        assert at.events.queue.empty()


async def test_refused_cap_is_not_told(nats_server: NatsServer) -> None:
    caps = Caps(unwilling=("d0",))
    async with office(nats_server, caps) as at:
        await at.orders.apply_orders([move(D0, 512), move(D1, 512)])
        assert (await at.events.next(CapMoved))[0] == "cap_moved.d1"
        assert at.metric("flowkv_cap_moves_total") == 1


async def test_regime_and_wish_for_nodes_are_told_and_shown(nats_server: NatsServer) -> None:
    regime_changed = RegimeChanged(epoch=0, before="normal", after="overload", reason=WHY, model="m")
    async with office(nats_server, Caps()) as at:
        at.orders.set_models({"m", "n"})
        for model in ("m", "n"):
            assert at.metric("flowkv_regime", model_name=model, regime="normal") == 1
            assert at.metric("flowkv_scale_wanted", model_name=model, role="prefill") == 0
        await at.orders.apply_orders([regime_changed])
        await at.orders.apply_orders([scale(2)])
        await at.orders.apply_orders([scale(2)])  # the same again: nothing new to tell
        await at.orders.apply_orders([scale(0)])
        assert at.metric("flowkv_regime", model_name="m", regime="normal") == 0
        assert at.metric("flowkv_regime", model_name="m", regime="overload") == 1
        assert at.metric("flowkv_regime", model_name="n", regime="normal") == 1
        assert at.orders.regime == ("overload", f"m: {WHY}")
        assert await at.events.next(RegimeChanged) == (
            "regime_changed.s",
            msgspec.structs.replace(regime_changed, epoch=1),
        )
        for change in (2, 0):
            assert await at.events.next(ScaleWanted) == (
                "scale_wanted.prefill",
                msgspec.structs.replace(scale(change), epoch=1),
            )
        assert at.metric("flowkv_scale_wanted", model_name="m", role="prefill") == 0
        at.orders.set_models({"n"})  # the nodes of the other have gone
        assert at.metric("flowkv_regime", model_name="m", regime="overload") is None
        assert at.metric("flowkv_scale_wanted", model_name="m", role="prefill") is None
        assert at.orders.regime == ("normal", "")
    assert at.metric("flowkv_scale_wanted", model_name="m", role="prefill") is None
    assert at.metric("flowkv_regime", model_name="m", regime="overload") is None


async def test_who_does_not_lead_orders_nothing_of_nodes(nats_server: NatsServer) -> None:
    caps = Caps()
    async with office(nats_server, caps) as at:
        pass
    assert not at.lease.is_held
    await at.orders.apply_orders([move(D0, 512)])
    assert caps.asked == []


async def test_endpoint_that_could_not_be_opened_is_opened_later(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticked = asyncio.Event()

    async def tick() -> None:
        ticked.set()

    async with connect(nats_server.url, name="test") as bus:
        caps, subscribe, num_tries = Caps(), bus.subscribe_raw, 0

        async def subscribe_at_second_try(*arguments: Any) -> Any:
            nonlocal num_tries
            num_tries += 1
            if num_tries == 1:
                raise errors.Unavailable("cut off just now")
            return await subscribe(*arguments)

        async with Service(bus, name="scheduler", version="0.1.0", service_id="s", endpoints=[]) as service:
            monkeypatch.setattr(bus, "subscribe_raw", subscribe_at_second_try)
            async with running(serve_and_tick(service, caps.endpoints(), tick)), asyncio.timeout(5):
                await ticked.wait()
                order = SetPrefillCap(node=D0, epoch=1, max_prefill_tokens_per_step=512, reason=WHY)
                subject = subjects.at(subjects.NODE_CAP, "d0")
                assert await bus.request(subject, order, Accepted, timeout_s=5) == Accepted(node_id="d0")
    assert num_tries == 1 + len(caps.endpoints())  # the one that failed, then all of them


async def test_an_ask_waits_for_one_slice_of_a_tick(nats_server: NatsServer) -> None:
    """The clients are in a thread: what they do takes no turns of the scheduler's loop."""
    num_slices, is_over = 0, False

    def tick() -> Sliced[str]:
        nonlocal num_slices
        while not is_over:
            num_slices += 1
            time.sleep(0.02)  # far more than a message takes
            yield
        return "orders"

    async def ask() -> list[int]:
        async with connect(nats_server.url, name="client") as bus:
            waited = []
            for _ in range(21):
                before = num_slices
                order = move(D0, 512)
                await bus.request(subjects.at(subjects.NODE_CAP, "d0"), order, Accepted, timeout_s=5)
                waited.append(num_slices - before)
            return waited

    async with connect(nats_server.url, name="test") as bus, asyncio.timeout(20):
        endpoints = Caps().endpoints()
        async with Service(bus, name="scheduler", version="0.1.0", service_id="s", endpoints=endpoints):
            async with asyncio.TaskGroup() as tasks:
                ticking = tasks.create_task(between_asks(tick()))
                waited = await asyncio.to_thread(asyncio.run, ask())
                is_over = True
    assert ticking.result() == "orders"
    # The one that runs; now and then one more begins while the answer is on its way.
    assert statistics.median(waited) == 1, waited


class FailingOnce(Planner):
    """Its first tick raises; each later one moves the prefill chunk budget of `d0`."""

    def __init__(self) -> None:
        super().__init__(Goals())
        self.num_ticks = 0

    def tick(self, now: float) -> Sliced[list[Order]]:
        yield
        self.num_ticks += 1
        if self.num_ticks == 1:
            raise ZeroDivisionError
        return [move(D0, 512)]


async def test_leader_ticks_its_planner_and_outlives_its_failures(nats_server: NatsServer) -> None:
    planner, events, stop = FailingOnce(), Events(), asyncio.Event()
    settings = SchedulerSettings(nats_url=nats_server.url)
    async with connect(nats_server.url, name="test") as bus, asyncio.TaskGroup() as tasks:
        service = Service(
            bus,
            name="node",
            version="0.1.0",
            service_id="d",
            endpoints=Caps().endpoints(),
            drain_timeout_s=0.1,
        )
        async with (
            service,
            await bus.subscribe_raw(subjects.event("cap_moved", "*"), events.take),
            reporting(ReportingNode(bus, "p0", "prefill"), ReportingNode(bus, "d0", "decode")),
        ):
            tasks.create_task(serve(settings, stop, planner))
            await until_answer(bus, is_assigned("p0", "d0"))
            moves = [(await events.next(CapMoved))[1] for _ in range(3)]
            stop.set()
    assert {(move.node, move.after) for move in moves} == {(D0, 512)}
    assert moves[-1].before == 16  # as its report says
    assert planner.num_ticks >= 4
