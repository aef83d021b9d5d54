"""Publish, subscribe and request over a real server, and what happens when it goes away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import pytest
from nats.aio.msg import Msg
from nats.errors import FlushTimeoutError

from flowkv_common import errors
from flowkv_common.bus import connection
from flowkv_common.bus.connection import connect
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Accepted, Cancel, Wait, encode
from flowkv_common.wire.nodes import Drain
from tests.nats_server import NatsServer
from tests.waiting import reconnected, soon, until

SUBJECT = "flowkv.v1.test.cancel.x"


async def test_subscriber_gets_what_is_published(nats_server: NatsServer) -> None:
    got: asyncio.Queue[Cancel] = asyncio.Queue()
    async with connect(nats_server.url, name="test") as bus:
        async with await bus.subscribe(SUBJECT, Cancel, got.put):
            await bus.publish(SUBJECT, Cancel(transfer_id="r.1", reason="gone"))
            assert await soon(got.get()) == Cancel(transfer_id="r.1", reason="gone")


async def test_bad_payload_and_failing_handler_are_logged_and_survived(
    nats_server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    got: asyncio.Queue[Cancel] = asyncio.Queue()

    def handler(message: Cancel) -> None:
        if message.reason == "raise":
            raise ValueError("on purpose")
        got.put_nowait(message)

    async with connect(nats_server.url, name="test") as bus:
        async with await bus.subscribe(SUBJECT, Cancel, handler):
            await bus.nc.publish(SUBJECT, b"\xff not json")
            for _ in range(8):  # a flood of them fills no disk
                await bus.publish(SUBJECT, Drain())
            await bus.publish(SUBJECT, Cancel(transfer_id="r.1", reason="raise"))
            await bus.publish(SUBJECT, Cancel(transfer_id="r.2", reason="fine"))
            assert (await soon(got.get())).transfer_id == "r.2"
    said = [message.partition(":")[0] for message in caplog.messages]
    assert said.count(f"message on {SUBJECT} is no Cancel") == 4  # the first, second, fourth, eighth
    assert said.count(f"handler of {SUBJECT} failed") == 1
    assert "on purpose" in caplog.text


async def test_flush_comes_back_behind_all_that_was_published(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="test") as bus:
        async with await bus.subscribe(SUBJECT, Drain, lambda message: None):
            num_before = bus.nc.stats["in_msgs"]
            for _ in range(100):
                await bus.publish(SUBJECT, Drain(reason="x" * 10_000))
            await bus.nc.flush()
            assert bus.nc.stats["in_msgs"] == num_before + 100


async def test_leaving_a_subscription_handles_what_has_arrived(nats_server: NatsServer) -> None:
    num_handled = 0

    async def slow(message: Drain) -> None:
        nonlocal num_handled
        await asyncio.sleep(0)
        num_handled += 1

    async with connect(nats_server.url, name="test") as bus:
        async with await bus.subscribe(SUBJECT, Drain, slow):
            for _ in range(100):
                await bus.publish(SUBJECT, Drain(reason="x" * 10_000))
        assert num_handled == 100


async def test_over_the_pending_limit_messages_are_dropped_and_counted(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_PENDING_MESSAGES", 4)
    may_go_on = asyncio.Event()

    async def stuck(message: Cancel) -> None:
        await may_go_on.wait()

    async with connect(nats_server.url, name="test") as bus:
        async with await bus.subscribe(SUBJECT, Cancel, stuck):
            for number in range(20):
                await bus.publish(SUBJECT, Cancel(transfer_id=f"r.{number}", reason=""))
            await bus.nc.flush()
            assert bus.num_slow_consumer_drops >= 15
            may_go_on.set()


async def test_request_without_a_responder_fails_at_once(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="test") as bus:
        with pytest.raises(errors.Unavailable, match="nobody listens"):
            await soon(bus.request(SUBJECT, Drain(), Accepted, timeout_s=30), timeout_s=2)


async def test_request_without_an_answer_ends_at_its_deadline(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="test") as bus:
        async with await bus.subscribe(SUBJECT, Drain, lambda message: None):
            with pytest.raises(errors.DeadlineExceeded):
                await bus.request(SUBJECT, Drain(), Accepted, timeout_s=0.05)


async def test_answer_may_be_one_of_a_union_and_must_be_of_it(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="test") as bus:

        async def answer(msg: Msg) -> None:
            await msg.respond(encode(Wait(retry_in_s=1.0, reason="full")))

        async with await bus.subscribe_raw(SUBJECT, answer):
            reply = await bus.request(SUBJECT, Drain(), Accepted | Wait, timeout_s=5)
            assert reply == Wait(retry_in_s=1.0, reason="full")
            with pytest.raises(errors.Internal):
                await bus.request(SUBJECT, Drain(), Accepted, timeout_s=5)


async def test_error_of_a_foreign_service_is_rebuilt_from_its_headers(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="test") as bus:

        async def refuse(msg: Msg) -> None:
            headers = {subjects.ERROR_HEADER: "not here", subjects.ERROR_CODE_HEADER: "404"}
            await bus.nc.publish(msg.reply, b"", headers=headers)

        async with await bus.subscribe_raw(SUBJECT, refuse):
            with pytest.raises(errors.NotFound, match="not here"):
                await bus.request(SUBJECT, Drain(), Accepted, timeout_s=5)


async def test_message_over_max_payload_is_too_large(nats_server: NatsServer) -> None:
    async with connect(nats_server.url, name="test") as bus:
        message = Drain(reason="x" * bus.nc.max_payload)
        with pytest.raises(errors.TooLarge):
            await bus.publish(SUBJECT, message)
        with pytest.raises(errors.TooLarge):
            await bus.request(SUBJECT, message, Accepted, timeout_s=5)


async def test_everything_works_again_after_a_server_restart(nats_server: NatsServer) -> None:
    got: asyncio.Queue[Cancel] = asyncio.Queue()
    async with connect(nats_server.url, name="test") as bus:
        back = reconnected(bus)
        async with await bus.subscribe(SUBJECT, Cancel, got.put):
            nats_server.kill()
            nats_server.start()
            await soon(back.wait())
            assert bus.is_connected
            assert bus.connected_for_s < 5.0
            await bus.publish(SUBJECT, Cancel(transfer_id="r.1", reason="after"))
            assert (await soon(got.get())).reason == "after"


async def test_cut_off_requests_fail_at_once_and_the_exit_is_quick(
    nats_server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with contextlib.AsyncExitStack() as stack:
        bus = await stack.enter_async_context(connect(nats_server.url, name="test"))
        await stack.enter_async_context(await bus.subscribe(SUBJECT, Cancel, lambda message: None))
        assert bus.connected_for_s > 0.0
        lost = asyncio.Event()
        handler = _Notify("lost the connection", lost)
        logging.getLogger("flowkv_common.bus.connection").addHandler(handler)
        stack.callback(logging.getLogger("flowkv_common.bus.connection").removeHandler, handler)
        nats_server.kill()
        await soon(lost.wait())

        assert not bus.is_connected
        assert bus.connected_for_s == 0.0
        with pytest.raises(errors.Unavailable):
            await bus.request(SUBJECT, Drain(), Accepted, timeout_s=30)
        await bus.publish(SUBJECT, Cancel(transfer_id="r.1", reason="buffered"))
        started = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - started < 5.0


async def test_a_question_that_nobody_waits_for_is_not_asked_after_a_reconnect(
    nats_server: NatsServer,
) -> None:
    """What is only said comes late, and so does what is still waited for."""
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def answer(msg: Msg) -> None:
        heard.put_nowait(msg.data)
        if msg.reply:
            await msg.respond(b"answer")

    async with connect(nats_server.url, name="test") as bus:
        async with await bus.subscribe_raw(SUBJECT, answer):
            await bus.nc.request(SUBJECT, b"before", timeout=5)
            nats_server.kill()
            await until(lambda: not bus.nc.is_connected)
            given_up = asyncio.create_task(bus.nc.request(SUBJECT, b"given up", timeout=5))
            waiting = asyncio.create_task(bus.nc.request(SUBJECT, b"waiting", timeout=5))
            await until(lambda: len(bus.nc._pending) == 2)
            given_up.cancel()
            await asyncio.wait([given_up])
            await bus.nc.publish(SUBJECT, b"said")
            await bus.nc._process_ping()  # as a connection that can send no more leaves its answer
            nats_server.start()
            assert (await waiting).data == b"answer"
            assert [await soon(heard.get()) for _ in range(3)] == [b"before", b"waiting", b"said"]
            assert heard.empty()


async def test_no_server_is_unavailable_after_the_timeout(nats_server: NatsServer) -> None:
    nats_server.kill()
    with pytest.raises(errors.Unavailable, match="no NATS at"):
        async with connect(nats_server.url, name="test", connect_timeout_s=0.3):
            pass


async def test_of_several_servers_any_will_do(nats_server: NatsServer) -> None:
    with NatsServer() as other:
        async with connect(f"{other.url},{nats_server.url}", name="test") as bus:
            back = reconnected(bus)
            for server in (other, nats_server):  # whichever it has chosen
                assert bus.nc.connected_url is not None
                if bus.nc.connected_url.geturl() == server.url:
                    server.kill()
                    break
            await soon(back.wait())
            assert bus.is_connected


async def test_no_error_tells_a_password() -> None:
    urls = "nats://node:secret@127.0.0.1:1,nats://node:secret@127.0.0.1:2"
    with pytest.raises(errors.Unavailable, match="no NATS at 127.0.0.1:1, 127.0.0.1:2 in") as caught:
        async with connect(urls, name="test", connect_timeout_s=0.2):
            pass
    assert "secret" not in str(caught.value)


class _Notify(logging.Handler):
    """Sets an event when a log line holds a text."""

    def __init__(self, text: str, event: asyncio.Event) -> None:
        super().__init__()
        self.text = text
        self.event = event

    def emit(self, record: logging.LogRecord) -> None:
        if self.text in record.getMessage():
            self.event.set()


async def test_what_could_not_be_subscribed_or_drained_does_not_come_back_with_a_reconnect(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: float) -> None:
        raise FlushTimeoutError

    async with (
        connect(nats_server.url, name="listener") as bus,
        connect(nats_server.url, name="asker") as asker,
    ):
        drained = await bus.subscribe(SUBJECT, Drain, lambda *_: None)
        with monkeypatch.context() as broken:
            broken.setattr(bus.nc, "flush", fail)  # as when the connection goes just then
            with pytest.raises(errors.Unavailable, match="can't subscribe"):
                await bus.subscribe(SUBJECT, Drain, lambda *_: None)
            await drained.drain()
        back = reconnected(bus)
        transport: Any = bus.nc._transport
        transport.close()
        await soon(back.wait())
        await soon(bus.nc.flush(5))
        with pytest.raises(errors.Unavailable, match="nobody listens"):
            await asker.request(SUBJECT, Drain(), Drain, timeout_s=5)
