"""`flowkv nats` shows messages, services and records as they are on the bus."""

from __future__ import annotations

import asyncio
import json

import pytest

from flowkv.nats_commands import shortened
from flowkv_common.bus.connection import Bus
from flowkv_common.errors import NotFound
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Cancel
from tests.described_nodes import ReportingNode, descriptor
from tests.nats_server import NatsServer
from tests.played_cluster import played_cluster, run

Captured = pytest.CaptureFixture[str]


async def publish_until(done: asyncio.Task[int], bus: Bus, *request_ids: str) -> int:
    """The command subscribes at some time: what came before is not heard."""
    while not done.done():
        for request_id in request_ids:
            attempt = f"{request_id}.0"
            await bus.publish(subjects.cancel(attempt), Cancel(transfer_id=attempt, reason="enough"))
        await asyncio.wait([done], timeout=0.02)
    return done.result()


async def test_sub_leaves_out_what_comes_all_the_time(
    bus: Bus, nats_server: NatsServer, capsys: Captured
) -> None:
    async with played_cluster(bus, ReportingNode(bus, "p0", "prefill")):
        sub = asyncio.create_task(
            run("nats", "--nats", nats_server.url, "sub", "--count", "2", "--grep", "r2")
        )
        assert await publish_until(sub, bus, "r1", "r2") == 0
        shown = capsys.readouterr().out
        assert shown.count("flowkv.v1.request.cancel.r2.0") == 2
        assert "r1" not in shown
        assert '"reason": "enough"' in shown
        every = ("--all", "--raw", "--count", "1", "--grep", "LoadReport")
        assert await run("nats", "sub", "--nats", nats_server.url, *every) == 0
        subject, payload = capsys.readouterr().out.split(" ", 1)
    assert subject == subjects.load("p0")
    assert json.loads(payload)["node"] == {"node_id": "p0", "incarnation": "i1"}


async def test_services_and_records(bus: Bus, nats_server: NatsServer, capsys: Captured) -> None:
    at = ("--nats", nats_server.url)
    async with played_cluster(bus, ReportingNode(bus, "p0", "prefill")):
        assert await run("nats", "ls", *at) == 0
        listed = capsys.readouterr().out
        assert await run("nats", "info", "scheduler-1", *at) == 0
        assert json.loads(capsys.readouterr().out)["metadata"]["state"] == "leader"
        with pytest.raises(NotFound, match="flowkv nats ls"):
            await run("nats", "info", "nobody", *at)
        assert await run("nats", "kv", "flowkv_nodes", "p0", "--raw", *at) == 0
        bucket, key, record = capsys.readouterr().out.split(" ", 2)
        with pytest.raises(NotFound, match="p9"):
            await run("nats", "kv", "flowkv_nodes", "p9", *at)
    assert [word in listed for word in ("gateway-1", "scheduler-1", "p0")] == [True] * 3
    assert (bucket, key) == ("flowkv_nodes", "p0")
    assert json.loads(record)["role"] == descriptor("p0", "prefill").role


def test_what_is_long_is_shortened_and_sentences_are_not() -> None:
    ids, packed, reason = list(range(9)), "A" * 999, "so it is " * 20
    short = shortened({"ids": ids, "packed": packed, "reason": reason})
    assert short["ids"] == [0, 1, 2, 3, "... 5 more"]
    assert short["packed"] == f"{'A' * 15}... (999 characters)"
    assert short["reason"] == reason
