"""A gateway is ready while a request would be scheduled, a scheduler while somebody leads."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from flowkv_common.bus.connection import Bus
from flowkv_common.errors import FlowKVError
from flowkv_common.wire.messages import ModelFiles
from flowkv_gateway import readiness
from flowkv_gateway.cluster import ModelNodes, OwnModel
from flowkv_gateway.dispatch import Dispatch, open_dispatch
from flowkv_gateway.readiness import READY_PERIOD_S, SCHEDULER_SILENT_S
from tests.described_nodes import ReportingNode, reporting, schedule
from tests.nats_server import NatsServer
from tests.scheduler_process import metrics_url, scheduler_process

NO_NODE = "no node of the model is ready"
NO_SCHEDULER = "no scheduler answers"
LOOK_EVERY_S = 0.02


@pytest.fixture
async def gateway(nats_server: NatsServer) -> AsyncIterator[Dispatch]:
    async with open_dispatch(nats_server.url, [ModelNodes(OwnModel(ModelFiles()))]) as dispatch:
        yield dispatch


async def until(gateway: Dispatch, expected: str | None, timeout_s: float = 10.0) -> float:
    """Until this is what the gateway misses; the seconds that it took."""
    began = time.monotonic()
    missing = gateway.readiness.why_not_ready()
    while missing != expected:
        assert time.monotonic() - began < timeout_s, f"still {missing!r}, not {expected!r}"
        await asyncio.sleep(LOOK_EVERY_S)
        missing = gateway.readiness.why_not_ready()
    return time.monotonic() - began


def pair(bus: Bus) -> tuple[ReportingNode, ReportingNode]:
    return ReportingNode(bus, "p0", "prefill"), ReportingNode(bus, "d0", "decode")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
async def test_a_scheduler_that_is_gone_makes_a_gateway_unready(
    nats_server: NatsServer, bus: Bus, gateway: Dispatch, end: signal.Signals
) -> None:
    async with reporting(*pair(bus)):
        async with scheduler_process(nats_server) as process:
            await until(gateway, None)
            process.send_signal(end)
            assert await until(gateway, NO_SCHEDULER) < SCHEDULER_SILENT_S + 2 * READY_PERIOD_S
        async with scheduler_process(nats_server):
            await until_scheduled(bus)
            assert await until(gateway, None) < 4 * READY_PERIOD_S


async def until_scheduled(bus: Bus) -> None:
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(FlowKVError):
                await schedule(bus, timeout_s=1.0)
                return
            await asyncio.sleep(LOOK_EVERY_S)


async def test_what_is_missing_is_named(nats_server: NatsServer, bus: Bus, gateway: Dispatch) -> None:
    assert gateway.readiness.why_not_ready() == f"{NO_SCHEDULER}; {NO_NODE}"
    prefill, decode = pair(bus)
    async with scheduler_process(nats_server):
        await until(gateway, NO_NODE)
        async with reporting(prefill, decode):
            await until(gateway, None)
            prefill.changes = decode.changes = {"ready": False}
            await until(gateway, NO_NODE)
            prefill.changes = decode.changes = {}
            await until(gateway, None)
    nats_server.stop()
    await until(gateway, "not connected to NATS")


async def test_a_gateway_is_ready_as_soon_as_it_hears_nats_again(
    nats_server: NatsServer, bus: Bus, gateway: Dispatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it could not hear meanwhile is no sign that others are gone."""
    monkeypatch.setattr(readiness, "SCHEDULER_SILENT_S", 1.0)
    seen: list[str | None] = []
    gateway._bus.on_reconnect(lambda: seen.append(gateway.readiness.why_not_ready()))
    async with reporting(*pair(bus)), scheduler_process(nats_server):
        await until(gateway, None)
        with nats_server.frozen():
            await until(gateway, "not connected to NATS")
            await asyncio.sleep(0.5)  # all that was heard before is older than silence is borne
        await until(gateway, None)
    assert seen == [None]


async def test_a_successor_that_stands_by_keeps_gateways_ready(
    nats_server: NatsServer, bus: Bus, gateway: Dispatch
) -> None:
    async with reporting(*pair(bus)), scheduler_process(nats_server) as leader:
        await until(gateway, None)
        async with scheduler_process(nats_server, stderr=asyncio.subprocess.PIPE) as standby:
            url = (await metrics_url(standby)).removesuffix("/metrics")
            async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
                assert (await http.get("/health/ready")).status_code == 200
                leader.kill()
                seen = set()
                async with asyncio.timeout(10):
                    while "flowkv_scheduler_is_leader 1.0" not in (await http.get("/metrics")).text:
                        seen.add(gateway.readiness.why_not_ready())
                        await asyncio.sleep(LOOK_EVERY_S)
                assert seen == {None}
                await leader.wait()
                await until(gateway, None)
