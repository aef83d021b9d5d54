"""A server that stands still: who hears nobody knows it, says nothing of others, and is back at once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from flowkv_common import errors
from flowkv_common.bus import client
from flowkv_common.bus.connection import connect
from flowkv_common.bus.lease import Lease
from flowkv_common.bus.registry import keep_announced, watch_nodes
from flowkv_common.config import NatsSettings
from flowkv_common.wire.messages import Accepted, Cancel
from flowkv_common.wire.nodes import Drain, NodeDescriptor
from tests.described_nodes import descriptor
from tests.echo import ANSWER, SUBJECT, ask, echo
from tests.nats_server import NatsServer
from tests.nats_users import Users, server_with_users
from tests.waiting import reconnected, until


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """All times of a connection a tenth of what they are."""
    monkeypatch.setattr(client, "PING_EVERY_S", 0.025)


async def test_who_hears_nothing_is_cut_off_and_is_back_as_soon_as_the_server_is(
    nats_server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with connect(nats_server.url, name="test") as bus, echo(bus):
        back = reconnected(bus)
        with nats_server.frozen():
            await until(lambda: not bus.is_connected)
            assert bus.connected_for_s == 0.0
            assert not bus.is_settled
            with pytest.raises(errors.Unavailable, match="not connected"):
                await bus.request(SUBJECT, Drain(), Accepted, timeout_s=30)
        async with asyncio.timeout(1.0):
            await back.wait()
        assert bus.is_connected
        assert 0.0 < bus.connected_for_s < 1.0
        assert await ask(bus) == ANSWER
        assert bus.nc.stats["reconnects"] == 0  # the same connection: nothing is lost
    assert [text for text in caplog.messages if "says nothing" in text or "heard again" in text] == [
        f"NATS at {nats_server.url.removeprefix('nats://')} says nothing any more",
        f"NATS at {nats_server.url.removeprefix('nats://')} is heard again",
    ]


async def test_what_is_published_to_a_server_that_stands_still_arrives(nats_server: NatsServer) -> None:
    got: list[str] = []
    async with connect(nats_server.url, name="test") as bus:
        async with await bus.subscribe(SUBJECT, Cancel, lambda message: got.append(message.transfer_id)):
            with nats_server.frozen():
                for number in range(5):
                    await bus.publish(SUBJECT, Cancel(transfer_id=f"r.{number}", reason=""))
                await until(lambda: not bus.is_connected)
                await bus.publish(SUBJECT, Cancel(transfer_id="r.5", reason=""))
            await until(lambda: len(got) == 6)
    assert got == [f"r.{number}" for number in range(6)]


async def test_a_silent_server_is_left_after_a_while_and_its_return_is_noticed_at_once(
    nats_server: NatsServer,
) -> None:
    async with connect(nats_server.url, name="test") as bus, echo(bus):
        back = reconnected(bus)
        with nats_server.frozen():
            await until(lambda: not bus.nc.is_connected)
        async with asyncio.timeout(1.0):
            await back.wait()
        assert bus.nc.stats["reconnects"] == 1
        assert await ask(bus) == ANSWER


async def test_a_connection_that_can_send_no_more_is_left_too(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="test") as bus, echo(bus):
        back = reconnected(bus)

        async def flood() -> None:
            while True:
                await bus.publish(SUBJECT, Drain(reason="x" * 500_000))

        with nats_server.frozen():
            flooding = asyncio.create_task(flood())
            await until(lambda: not bus.nc.is_connected)
            flooding.cancel()
            await asyncio.wait([flooding])
        async with asyncio.timeout(1.0):
            await back.wait()
        assert await ask(bus) == ANSWER


async def test_the_pong_of_a_flush_that_was_cancelled_makes_nobody_deaf(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="test") as bus, echo(bus):
        back = reconnected(bus)
        with nats_server.frozen():
            await until(lambda: not bus.is_connected)
            num_pings = len(bus.nc._pongs)
            flush = asyncio.create_task(bus.nc.flush())
            await until(lambda: len(bus.nc._pongs) > num_pings)
            flush.cancel()
            await asyncio.wait([flush])
            assert flush.cancelled()
        async with asyncio.timeout(1.0):
            await back.wait()
        assert await ask(bus) == ANSWER
        assert bus.nc.stats["reconnects"] == 0


async def test_a_read_loop_that_fails_is_replaced_at_once(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with connect(nats_server.url, name="test") as bus, echo(bus):
        back = reconnected(bus)

        async def fail(data: bytes) -> None:
            monkeypatch.undo()
            raise RuntimeError("on purpose")

        monkeypatch.setattr(bus.nc._ps, "parse", fail)
        async with asyncio.timeout(1.0):
            await back.wait()
        assert await ask(bus) == ANSWER
    assert "on purpose" in caplog.text


async def test_who_waits_for_a_full_connection_can_be_cancelled(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "HANG_UP_AFTER_PINGS", 10_000)
    async with connect(nats_server.url, name="test") as bus:
        with nats_server.frozen():

            async def flood() -> None:
                while True:
                    await bus.publish(SUBJECT, Drain(reason="x" * 500_000))

            task = asyncio.create_task(flood())
            await until(lambda: not bus.is_connected)
            task.cancel()
            done, _ = await asyncio.wait([task], timeout=1.0)
            assert task in done
            assert task.cancelled()


async def test_a_process_that_was_held_up_does_not_take_its_own_pause_for_silence(
    nats_server: NatsServer,
) -> None:
    async with connect(nats_server.url, name="test") as bus:
        back = reconnected(bus)
        await bus.nc.flush()
        time.sleep(0.3)  # noqa: ASYNC251 (the loop itself stands still, longer than it takes to be deaf)
        assert bus.is_connected
        await bus.nc.flush()
        assert bus.is_connected
        assert not back.is_set()


async def test_the_watch_on_nodes_ends_when_it_is_cancelled_also_without_a_connection() -> None:
    with server_with_users("test") as users:
        await _watch_until_refused(users)


async def _watch_until_refused(users: Users) -> None:
    shown = asyncio.Event()
    connection = connect(NatsSettings(nats_url=users.url("test"), nats_give_up_s=0.1), name="test")
    bus = await connection.__aenter__()
    watch = asyncio.create_task(watch_nodes(bus, lambda _: shown.set()))
    async with asyncio.timeout(5.0):
        await shown.wait()
    users.refuse("test")
    await until(lambda: bus.is_closed)
    watch.cancel()
    done, _ = await asyncio.wait([watch], timeout=1.0)
    assert watch in done
    assert watch.cancelled()
    with pytest.raises(errors.Unavailable, match="for good"):
        await connection.__aexit__(None, None, None)


async def test_nodes_that_could_not_renew_while_the_server_stood_still_stay_known(
    nats_server: NatsServer,
) -> None:
    told: list[set[str]] = []

    def on_change(nodes: dict[str, NodeDescriptor]) -> None:
        told.append(set(nodes))

    async with connect(nats_server.url, name="node") as node, connect(nats_server.url, name="test") as bus:
        async with asyncio.TaskGroup() as tasks:
            mine = [
                tasks.create_task(keep_announced(node, lambda: descriptor("p", "prefill"), ttl_s=1.0)),
                tasks.create_task(watch_nodes(bus, on_change, ttl_s=1.0)),
            ]
            await until(lambda: {"p"} in told)
            back, node_back = reconnected(bus), reconnected(node)
            with nats_server.frozen():
                await asyncio.sleep(1.5)  # its record expires
            async with asyncio.timeout(2.0):
                await back.wait()
                await node_back.wait()
            await asyncio.sleep(1.2)  # longer than what is not confirmed is kept
            for task in mine:
                task.cancel()
    assert told == [set(), {"p"}] or told == [{"p"}]


async def test_who_leads_takes_the_seat_again_as_soon_as_the_server_is_back(nats_server: NatsServer) -> None:
    terms: asyncio.Queue[int] = asyncio.Queue()
    async with connect(nats_server.url, name="a") as a, connect(nats_server.url, name="b") as b:
        leases = [Lease(a, "a", ttl_s=1.0), Lease(b, "b", ttl_s=1.0)]

        def lead(lease: Lease) -> Callable[[], Coroutine[Any, Any, None]]:
            async def leading() -> None:
                await terms.put(lease.epoch)
                await asyncio.Event().wait()

            return leading

        async with asyncio.TaskGroup() as tasks:
            campaigns = [tasks.create_task(lease.campaign(lead(lease))) for lease in leases]
            async with asyncio.timeout(5.0):
                assert await terms.get() == 1
            first = next(lease for lease in leases if lease.is_held)
            with nats_server.frozen():
                await until(lambda: not first.is_held)
                await asyncio.sleep(1.2)  # longer than a lease
                assert not any(lease.is_held for lease in leases)
            async with asyncio.timeout(1.0):
                assert await terms.get() == 2
            assert first.is_held
            for campaign in campaigns:
                campaign.cancel()
