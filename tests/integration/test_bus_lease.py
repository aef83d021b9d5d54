"""The leader's seat on a real server: one at a time, epochs that only grow, holders that die or lose NATS."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import nats.errors
import pytest
from nats.js.kv import KeyValue

from flowkv_common.bus.connection import Bus, connect
from flowkv_common.bus.lease import KEY, Lease
from flowkv_common.bus.registry import Found, open_bucket, read_key
from flowkv_common.config import NatsSettings
from flowkv_common.wire.messages import decode, encode
from flowkv_common.wire.nodes import Leader
from flowkv_common.wire.subjects import LEADER_BUCKET
from tests.nats_server import NatsServer
from tests.waiting import reconnected

TTL_S = 0.8


class Seat:
    """What the test sees of all candidates: who leads now, and every term in order."""

    def __init__(self) -> None:
        self.terms: list[tuple[str, int]] = []  # name, epoch
        self.leading: list[str] = []
        self.most_at_once = 0
        self._changed = asyncio.Event()

    def change(self) -> None:
        self._changed.set()

    async def until(self, is_met: Callable[[], bool], timeout_s: float = 8.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not is_met():
                self._changed.clear()
                await self._changed.wait()

    async def until_led_by(self, name: str) -> None:
        await self.until(lambda: self.leading == [name])

    async def stays_for(self, seconds: float) -> None:
        num_terms = len(self.terms)
        with pytest.raises(TimeoutError):
            await self.until(lambda: len(self.terms) > num_terms, seconds)


class Candidate:
    """A lease that campaigns on a connection of its own."""

    def __init__(self, name: str, seat: Seat, bus: Bus, ttl_s: float = TTL_S) -> None:
        self.name = name
        self.bus = bus
        self.lease = Lease(bus, name, ttl_s)
        self._seat = seat
        self._campaign = asyncio.create_task(self.lease.campaign(self._lead))

    async def stop(self) -> None:
        """A clean exit."""
        self._campaign.cancel()
        await asyncio.gather(self._campaign, return_exceptions=True)

    async def die(self) -> None:
        """Its connection goes first, as in a crash: the seat is not given up."""
        await self.bus.nc.close()
        await self.stop()

    async def _lead(self) -> None:
        assert self.lease.is_held
        self._seat.terms.append((self.name, self.lease.epoch))
        self._seat.leading.append(self.name)
        self._seat.most_at_once = max(self._seat.most_at_once, len(self._seat.leading))
        self._seat.change()
        try:
            await asyncio.Event().wait()
        finally:
            self._seat.leading.remove(self.name)
            self._seat.change()


@contextlib.asynccontextmanager
async def candidate(
    server: NatsServer, seat: Seat, name: str, ttl_s: float = TTL_S
) -> AsyncIterator[Candidate]:
    async with connect(server.url, name=name) as bus:
        one = Candidate(name, seat, bus, ttl_s)
        try:
            yield one
        finally:
            await one.stop()


async def seat_record(bus: Bus) -> Found:
    async with asyncio.timeout(5):
        return await read_key(await open_bucket(bus, LEADER_BUCKET), KEY)


def leader_in(found: Found) -> Leader:
    assert found.value is not None
    return decode(found.value, Leader)


async def test_one_leads_and_its_clean_exit_lets_another_take_over_at_once(nats_server: NatsServer) -> None:
    seat = Seat()
    async with candidate(nats_server, seat, "a") as a, candidate(nats_server, seat, "b") as b:
        await seat.until(lambda: len(seat.leading) == 1)
        first, second = (a, b) if seat.leading == ["a"] else (b, a)
        await seat.stays_for(2 * TTL_S)  # the first one renews
        assert (first.lease.is_held, second.lease.is_held) == (True, False)
        assert second.lease.highest_epoch == first.lease.epoch == 1
        assert leader_in(await seat_record(a.bus)) == Leader(scheduler_id=first.name, epoch=1)
        await first.stop()
        assert not first.lease.is_held
        await seat.until(lambda: seat.leading == [second.name], timeout_s=TTL_S / 2)
    assert seat.terms == [(first.name, 1), (second.name, 2)]


async def test_dead_holder_is_replaced_after_the_ttl_and_not_before(nats_server: NatsServer) -> None:
    seat, clock = Seat(), asyncio.get_running_loop().time
    async with candidate(nats_server, seat, "a") as a:
        await seat.until_led_by("a")
        async with candidate(nats_server, seat, "b"):
            await a.die()
            died_at = clock()
            await seat.until_led_by("b")
            # It had renewed within the last quarter of a TTL.
            assert clock() - died_at > TTL_S / 2
    assert seat.terms == [("a", 1), ("b", 2)]


async def test_server_that_restarts_finds_the_same_leader_with_a_higher_epoch(
    nats_server: NatsServer,
) -> None:
    seat = Seat()
    async with candidate(nats_server, seat, "a") as a:
        await seat.until_led_by("a")
        async with candidate(nats_server, seat, "b") as b:  # it may not have had a look yet
            nats_server.kill()
            await seat.until(lambda: seat.leading == [])
            assert not a.lease.is_held
            assert not b.lease.is_held
            nats_server.start()  # the record was in memory
            await seat.until_led_by("a")
            await seat.stays_for(2 * TTL_S)
    assert seat.terms[:2] == [("a", 1), ("a", 2)]


async def test_leader_that_dies_with_the_server_is_replaced_with_a_higher_epoch(
    nats_server: NatsServer,
) -> None:
    seat = Seat()
    async with candidate(nats_server, seat, "a") as a:
        await seat.until_led_by("a")
        async with candidate(nats_server, seat, "b"):
            await seat.stays_for(TTL_S / 2)  # it has had a look
            nats_server.kill()
            await a.die()
            nats_server.start()
            await seat.until_led_by("b")
    assert seat.terms == [("a", 1), ("b", 2)]


async def test_record_of_a_server_that_began_anew_is_not_taken_for_an_old_one(
    nats_server: NatsServer,
) -> None:
    async def write_as_another(bus: Bus) -> Found:
        async with asyncio.timeout(5):
            bucket = await open_bucket(bus, LEADER_BUCKET)
            await bucket.put(KEY, encode(Leader(scheduler_id="another", epoch=1)))
        return await seat_record(bus)

    seat, back = Seat(), asyncio.Event()
    async with connect(nats_server.url, name="test") as bus:
        before = await write_as_another(bus)
        async with candidate(nats_server, seat, "b") as b:
            await seat.stays_for(TTL_S / 2)  # it has had a look
            b.bus.on_reconnect(back.set)
            b.bus.nc.options["reconnect_time_wait"] = 2 * TTL_S  # the other one comes first
            nats_server.kill()
            await asyncio.sleep(TTL_S)  # the outage itself
            nats_server.start()
            async with asyncio.timeout(5), connect(nats_server.url, name="another") as other:
                after = await write_as_another(other)
                await back.wait()
            assert before == after  # nothing in it tells that it was written just now
            await seat.stays_for(TTL_S / 2)
            assert seat.terms == []
            await seat.until_led_by("b")


async def test_holder_that_is_cut_off_for_a_moment_goes_on_after_a_renewal(nats_server: NatsServer) -> None:
    seat = Seat()
    async with candidate(nats_server, seat, "a", ttl_s=10.0) as a:  # reconnecting takes up to 0.5 s
        await seat.until_led_by("a")
        revision = (await seat_record(a.bus)).revision
        states: list[bool] = []
        back = asyncio.Event()

        def note() -> None:
            states.append(a.lease.is_held)
            back.set()

        a.bus.on_reconnect(note)
        transport: Any = a.bus.nc._transport
        transport.close()  # the socket alone, as a flaky network would
        async with asyncio.timeout(5):
            await back.wait()
            while (await seat_record(a.bus)).revision == revision:
                pass
        assert states == [False]  # not before it has asked
        assert a.lease.is_held
    assert seat.terms == [("a", 1)]


async def test_record_that_was_deleted_costs_the_term_and_no_epoch_comes_twice(
    nats_server: NatsServer,
) -> None:
    seat = Seat()
    async with candidate(nats_server, seat, "a") as a:
        await seat.until_led_by("a")
        async with asyncio.timeout(5):
            await (await open_bucket(a.bus, LEADER_BUCKET)).delete(KEY)
        await seat.until(lambda: len(seat.terms) == 2)
        last_write = (await seat_record(a.bus)).revision
        await a.stop()
        async with asyncio.timeout(5):
            await (await open_bucket(a.bus, LEADER_BUCKET)).delete(KEY)
        async with candidate(nats_server, seat, "knows nothing"):
            await seat.until_led_by("knows nothing")
    assert seat.terms[0] == ("a", 1)
    assert 1 < seat.terms[1][1] <= last_write < seat.terms[2][1]


async def test_epoch_is_higher_than_all_that_was_heard(nats_server: NatsServer) -> None:
    seat = Seat()
    async with connect(nats_server.url, name="a") as bus:
        a = Candidate("a", seat, bus)
        a.lease.hear(7)
        await seat.until_led_by("a")
        assert a.lease.epoch == 8
        a.lease.hear(8)  # our own, come back to us
        a.lease.hear(41)  # a former life of the cluster, which the server has forgotten
        async with asyncio.timeout(TTL_S / 4):  # it does not wait for the next renewal
            while leader_in(await seat_record(bus)).epoch != 42:
                pass
        assert (a.lease.is_held, a.lease.epoch) == (True, 42)
        await a.stop()
    assert seat.terms == [("a", 8)]


async def test_spoilt_record_locks_nobody_out(nats_server: NatsServer) -> None:
    seat = Seat()
    async with connect(nats_server.url, name="test") as bus:
        async with asyncio.timeout(5):
            await (await open_bucket(bus, LEADER_BUCKET)).put(KEY, b"none of ours")
        async with candidate(nats_server, seat, "a"):
            await seat.until_led_by("a")


async def test_what_lead_raises_ends_the_campaign_and_frees_the_seat(nats_server: NatsServer) -> None:
    seat = Seat()

    async def fail() -> None:
        raise ZeroDivisionError

    async with connect(nats_server.url, name="test") as bus:
        with pytest.raises(ZeroDivisionError):
            async with asyncio.timeout(5):
                await Lease(bus, "a", TTL_S).campaign(fail)
        async with candidate(nats_server, seat, "b"):
            await seat.until(lambda: seat.leading == ["b"], timeout_s=TTL_S / 2)
    assert seat.terms == [("b", 2)]


async def test_never_two_and_epochs_grow_whoever_comes_goes_and_dies(nats_server: NatsServer) -> None:
    seat, rng = Seat(), random.Random(3)
    async with contextlib.AsyncExitStack() as stack:

        async def join(name: str) -> Candidate:
            return await stack.enter_async_context(candidate(nats_server, seat, name))

        candidates = [await join(f"c{i}") for i in range(4)]
        for i in range(6):
            await seat.until(lambda: len(seat.leading) == 1)
            [leader] = [one for one in candidates if one.name in seat.leading]
            candidates.remove(leader)
            await (leader.die() if rng.random() < 0.3 else leader.stop())
            candidates.append(await join(f"d{i}"))
        await seat.until(lambda: len(seat.leading) == 1)
        epochs = [epoch for _, epoch in seat.terms]  # before they end, one after the other, and others lead
    assert len(epochs) == 7
    assert epochs == sorted(set(epochs))
    assert seat.most_at_once == 1


@pytest.mark.parametrize("namespace", ["flowkv", "another"])
async def test_a_renewal_whose_answer_is_lost_costs_no_term(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch, namespace: str
) -> None:
    """As when the connection goes between a write and its answer."""
    seat, is_lost = Seat(), asyncio.Event()
    write = KeyValue.update

    async def lose_one_answer(bucket: KeyValue, *arguments: Any, **named: Any) -> int:
        revision = await write(bucket, *arguments, **named)
        if seat.leading and not is_lost.is_set():
            is_lost.set()
            raise nats.errors.TimeoutError
        return revision

    monkeypatch.setattr(KeyValue, "update", lose_one_answer)
    settings = NatsSettings(nats_url=nats_server.url, namespace=namespace)
    async with connect(settings, name="a") as bus:
        a = Candidate("a", seat, bus)
        async with asyncio.timeout(5):
            await is_lost.wait()
        await seat.stays_for(2 * TTL_S)
        assert a.lease.is_held
        await a.stop()
    assert seat.terms == [("a", 1)]


async def test_a_bucket_on_disk_outlives_the_server(nats_server: NatsServer) -> None:
    on_disk = NatsSettings(nats_url=nats_server.url, nats_storage="file")
    async with connect(on_disk, name="test") as bus:
        back = reconnected(bus)
        await (await open_bucket(bus, LEADER_BUCKET)).put(KEY, b"kept")
        nats_server.kill()
        nats_server.start()
        async with asyncio.timeout(5):
            await back.wait()
        assert (await seat_record(bus)).value == b"kept"
