"""The scheduler on a real server, fed by nodes that announce themselves and report their load."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator

import httpx
import pytest
from prometheus_client import CollectorRegistry

from flowkv_common import errors
from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.lease import Lease
from flowkv_common.config import SchedulerSettings
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Assignment, NodeRef, NodeSeen, NodesSeen
from flowkv_scheduler.app import Scheduler, serve
from flowkv_scheduler.cluster import Goals
from flowkv_scheduler.planner import Planner
from tests.described_nodes import (
    INCARNATION,
    ReportingNode,
    descriptor,
    is_assigned,
    is_wait,
    reporting,
    request,
    schedule,
    until_answer,
)
from tests.nats_server import NatsServer
from tests.scheduler_process import metrics_url, scheduler_process
from tests.waiting import reconnected


@contextlib.asynccontextmanager
async def scheduler(server: NatsServer) -> AsyncIterator[None]:
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(serve(SchedulerSettings(nats_url=server.url), stop))
        try:
            yield
        finally:
            stop.set()


async def test_waits_for_nodes_then_pairs_them_and_tells_everyone(nats_server: NatsServer) -> None:
    told: asyncio.Queue[Assignment] = asyncio.Queue()
    async with connect(nats_server.url, name="test") as bus, scheduler(nats_server):
        async with await bus.subscribe(subjects.assignment("r"), Assignment, told.put):
            await until_answer(bus, is_wait)
            async with reporting(ReportingNode(bus, "p0", "prefill"), ReportingNode(bus, "d0", "decode")):
                answer = await until_answer(bus, is_assigned("p0", "d0"))
                assert isinstance(answer, Assignment)
                assert answer.epoch == 1
                assert [c.node_id for c in answer.prefill_candidates] == ["p0"]
                async with asyncio.timeout(5):
                    assert await told.get() == answer


def busy_with_its_own(bus: Bus, node_id: str) -> ReportingNode:
    """A decode node that has no time for a new prompt, only for sequences."""
    return ReportingNode(bus, node_id, "decode", queued_prefill_tokens=500_000)


async def test_one_watch_on_the_registry_feeds_all(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="test") as bus, scheduler(nats_server):
        async with reporting(ReportingNode(bus, "p0", "prefill"), ReportingNode(bus, "d0", "decode")):
            await until_answer(bus, is_assigned("p0", "d0"))
            watches = await bus.nc.jetstream().consumers_info(f"KV_{subjects.NODES_BUCKET}")
            assert len(watches) == 1


async def test_live_load_moves_requests_to_the_idler_node(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="test") as bus, scheduler(nats_server):
        p0, p1 = (
            ReportingNode(bus, "p0", "prefill"),
            ReportingNode(bus, "p1", "prefill", queued_prefill_tokens=3000),
        )
        async with reporting(p0, p1, busy_with_its_own(bus, "d0")):
            await until_answer(bus, is_assigned("p0", "d0"))
            p0.changes = {"queued_prefill_tokens": 9000}
            await until_answer(bus, is_assigned("p1", "d0"))


async def test_a_node_that_stalls_by_the_word_of_a_gateway_gets_no_more(nats_server: NatsServer) -> None:
    stalls = NodesSeen(
        gateway_id="g",
        nodes=[NodeSeen(node=NodeRef(node_id="p0", incarnation=INCARNATION), prompt_stall_s=30.0)],
    )
    async with connect(nats_server.url, name="test") as bus, scheduler(nats_server):
        p0 = ReportingNode(bus, "p0", "prefill")
        p1 = ReportingNode(bus, "p1", "prefill", queued_prefill_tokens=3000)
        async with reporting(p0, p1, busy_with_its_own(bus, "d0")):
            answer = await until_answer(bus, is_assigned("p0", "d0"))
            assert isinstance(answer, Assignment)
            assert answer.promised_first_token_in_s == answer.first_token_in_s
            await bus.publish(subjects.seen("g"), stalls)
            await until_answer(bus, is_assigned("p1", "d0"))


async def test_a_burst_between_two_reports_is_spread(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="test") as bus, scheduler(nats_server):
        nodes = [
            ReportingNode(bus, name, role)
            for name, role in (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"))
        ]
        for node in nodes:
            node.changes = {"period_s": 30.0}  # choices count for a minute: no report can hide them
        async with reporting(*nodes):
            await until_answer(bus, lambda m: isinstance(m, Assignment) and len(m.prefill_candidates) == 2)
            answers = [await schedule(bus) for _ in range(10)]
    chosen = [answer.prefill.node_id for answer in answers if isinstance(answer, Assignment)]
    assert abs(chosen.count("p0") - chosen.count("p1")) <= 2
    assert len(chosen) == 10


async def test_a_node_whose_reports_cant_be_true_gets_nothing(
    nats_server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    """By their types, or by what the node is."""
    async with connect(nats_server.url, name="test") as bus, scheduler(nats_server):
        p0 = ReportingNode(bus, "p0", "prefill")
        p1 = ReportingNode(bus, "p1", "prefill", queued_prefill_tokens=3000)
        async with reporting(p0, p1, busy_with_its_own(bus, "d0")):
            for changes in ({"queued_prefill_tokens": -5}, {"max_prefill_tokens_per_step": 10**6}):
                await until_answer(bus, is_assigned("p0", "d0"))
                p0.changes = changes
                await until_answer(bus, is_assigned("p1", "d0"))
                p0.changes = {}
    [told] = [record.message for record in caplog.records if "are dropped" in record.message]
    assert subjects.load("p0") in told
    assert "queued_prefill_tokens" in told


async def test_silent_and_draining_nodes_get_nothing(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="test") as bus, scheduler(nats_server):
        d0, d1 = ReportingNode(bus, "d0", "decode"), ReportingNode(bus, "d1", "decode", num_running=9)
        async with reporting(ReportingNode(bus, "p0", "prefill"), d1):
            async with reporting(d0):
                await until_answer(bus, is_assigned("p0", "d0"))
                d0.changes = {"draining": True}
                await until_answer(bus, is_assigned("p0", "d1"))
                d0.changes = {}
                await until_answer(bus, is_assigned("p0", "d0"))
            await until_answer(bus, is_assigned("p0", "d1"))


async def test_refusals_arrive_as_errors(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="test") as bus, scheduler(nats_server):
        p0 = ReportingNode(bus, "p0", "prefill")
        async with reporting(p0, busy_with_its_own(bus, "d0")):
            await until_answer(bus, is_assigned("p0", "d0"))
            with pytest.raises(errors.BadRequest) as bad:
                await schedule(bus, request(num_prompt_tokens=5000))
            assert bad.value.field == "prompt"
            p0.changes = {"queued_prefill_tokens": 90_000}
            with pytest.raises(errors.Full) as full:
                await until_answer(bus, lambda _: False)
            assert full.value.retry_after_s is not None
            assert 25 < full.value.retry_after_s < 35


@pytest.mark.parametrize("lending", [True, False])
async def test_the_planner_is_told_whether_it_lends(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch, lending: bool
) -> None:
    told: list[bool] = []

    class NotingPlanner(Planner):
        def __init__(self, goals: Goals, *, lends: bool = True) -> None:
            told.append(lends)
            super().__init__(goals, lends=lends)

    monkeypatch.setattr("flowkv_scheduler.app.Planner", NotingPlanner)
    stop = asyncio.Event()
    stop.set()
    await serve(SchedulerSettings(nats_url=nats_server.url, lending=lending), stop)
    assert told == [lending]


async def test_scheduling_goes_on_after_a_server_restart(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="test") as bus, scheduler(nats_server):
        async with reporting(ReportingNode(bus, "p0", "prefill"), ReportingNode(bus, "d0", "decode")):
            await until_answer(bus, is_assigned("p0", "d0"))
            back = reconnected(bus)
            nats_server.kill()
            nats_server.start()
            async with asyncio.timeout(5):
                await back.wait()
            await until_answer(bus, is_assigned("p0", "d0"))


async def test_process_serves_metrics_and_leaves_on_sigterm(nats_server: NatsServer) -> None:
    async with (
        connect(nats_server.url, name="test") as bus,
        scheduler_process(nats_server, stderr=asyncio.subprocess.PIPE) as process,
        asyncio.timeout(20),
        httpx.AsyncClient() as http,
    ):
        url = await metrics_url(process)
        await until_answer(bus, is_wait)
        metrics = (await http.get(url)).text
        ready = await http.get(url.replace("/metrics", "/health"))
        assert 'flowkv_schedule_decisions_total{outcome="wait"} 1.0' in metrics
        assert "flowkv_usable_nodes 0.0" in metrics
        assert "flowkv_pairs 0.0" in metrics
        assert "flowkv_scheduler_is_leader 1.0" in metrics
        assert "flowkv_scheduler_epoch 1.0" in metrics
        assert "flowkv_regime{" not in metrics  # no model has nodes
        assert ready.status_code == 200
        process.send_signal(signal.SIGTERM)
        await process.communicate()
        assert process.returncode == 0


async def test_scheduler_never_loads_torch() -> None:
    code = "import sys, flowkv_scheduler.__main__; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(20):
        output, _ = await process.communicate()
    assert output.strip() == b"[]"


async def test_nodes_that_cant_serve_together_are_named_once(
    nats_server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = {"p0": descriptor("p0", "prefill"), "d0": descriptor("d0", "decode", block_size=32)}
    async with connect(nats_server.url, name="test") as bus:
        lease, clock = Lease(bus, "s0"), asyncio.get_running_loop().time
        scheduler = Scheduler(bus, lease, Planner(Goals()), CollectorRegistry(), clock)
        for _ in range(2):
            scheduler.on_nodes(nodes)
        scheduler.on_nodes({"p0": nodes["p0"]})
        scheduler.on_nodes(nodes)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == 2 * ["p0 can't exchange KV with d0: block size 16, not 32"]
