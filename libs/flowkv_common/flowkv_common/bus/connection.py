"""One NATS connection that comes back by itself, and typed publish, request and subscribe on it.

Knows no subject and no service. All that goes wrong on NATS leaves here as a `FlowKVError`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import UnionType
from typing import Any, overload
from urllib.parse import urlsplit

import msgspec
import nats.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from flowkv_common import errors
from flowkv_common.bus.answers import open_answer
from flowkv_common.bus.client import BarrierClient
from flowkv_common.bus.subscription import Subscription
from flowkv_common.wire.messages import M, Message, decode, encode

log = logging.getLogger(__name__)

# nats-py waits for ever for a full buffer to drain when the link is gone, unless told otherwise.
_FLUSH_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 2.0
# After NATS itself was away, others get this long to be heard again before anyone is called dead: two report
# periods, and the time that a client takes to connect.
SETTLE_S = 4.0


@contextlib.asynccontextmanager
async def connect(
    url: str,
    *,
    name: str,
    on_closed: Callable[[], None] | None = None,
    connect_timeout_s: float = 30.0,
    drain_timeout_s: float = 5.0,
) -> AsyncIterator[Bus]:
    """A connection for as long as the context lasts; on exit it is drained, then closed.

    `url` may be several, with commas between: of one cluster, each good enough. `name` is what the server's
    connection reports show. A user in the first one gets the answers to its requests under `_INBOX.<user>`,
    so that the server can keep them from others. `on_closed` is called when NATS ends the connection for good
    (its credentials are not good any more): the body should then end too. Raises `Unavailable` when no server
    answers within `connect_timeout_s`, and at the end when NATS has closed the connection for good.
    """
    bus = Bus(on_closed)
    try:
        async with asyncio.timeout(connect_timeout_s):
            await bus._open(url, name, drain_timeout_s)
    except BaseException as error:
        await bus.nc.close()
        if not isinstance(error, TimeoutError):
            raise
        where = ", ".join(one.rpartition("@")[2] for one in url.split(","))  # without passwords
        raise errors.Unavailable(
            f"no NATS at {where} in {connect_timeout_s} s: {bus.nc.last_error}"
        ) from None
    try:
        yield bus
    finally:
        closed_by = bus.nc.last_error if bus.is_closed else None
        await bus._close(drain_timeout_s)
    if closed_by is not None:
        raise errors.Unavailable(f"NATS closed the connection for good: {closed_by}")


class Bus:
    """Typed access to one NATS connection, made by `connect`. `nc` is nats-py's client underneath."""

    def __init__(self, on_closed: Callable[[], None] | None) -> None:
        self.nc = BarrierClient(self._on_deaf, self._on_heard_again)
        self.num_slow_consumer_drops = 0
        self._on_closed = on_closed
        self._reconnect_callbacks: list[Callable[[], None]] = []
        self._connected_at: float | None = None
        self._is_closing = False

    @property
    def is_connected(self) -> bool:
        """Do we hear NATS? A connection that brings nothing, not even an answer to a ping, is none."""
        return self.nc.is_hearing

    @property
    def is_closed(self) -> bool:
        """NATS has closed the connection for good, or we have."""
        return bool(self.nc.is_closed)

    @property
    def connected_for_s(self) -> float:
        """Seconds since NATS was last heard again after it was not, 0 while it is not."""
        if self._connected_at is None or not self.is_connected:
            return 0.0
        return asyncio.get_running_loop().time() - self._connected_at

    @property
    def is_settled(self) -> bool:
        """Is the silence of others theirs? While we are cut off ourselves, and just after, it may be ours.

        Until then nobody is called dead (docs/architecture.md, rule 8).
        """
        return self.connected_for_s > SETTLE_S

    @property
    def max_payload(self) -> int:
        """Bytes that this server takes in one message."""
        return int(self.nc.max_payload)

    def on_reconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` each time NATS is heard again after it was not, subscriptions restored.

        Returns what takes it back.
        """
        self._reconnect_callbacks.append(callback)
        return lambda: self._reconnect_callbacks.remove(callback)

    def jetstream(self) -> JetStreamContext:
        """JetStream on this connection. Its calls wait for ever: put each under `asyncio.timeout`.

        nats-py's own timer is `asyncio.wait_for`, which on Python 3.11 can lose a cancellation.
        """
        return self.nc.jetstream(timeout=None)

    async def publish(
        self, subject: str, message: msgspec.Struct, *, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send without an answer. While cut off, up to 2 MiB are kept and sent after the reconnect.

        Raises `TooLarge` over the server's `max_payload`, `Unavailable` when closed or the buffer is full.
        """
        await self.publish_bytes(subject, encode(message), headers=headers)

    async def publish_bytes(
        self, subject: str, payload: bytes, *, headers: Mapping[str, str] | None = None
    ) -> None:
        """`publish` of a payload that is encoded already."""
        self._check_size(payload, headers)
        try:
            await self.nc.publish(subject, payload, headers=dict(headers) if headers else None)
        except nats.errors.Error as error:
            raise errors.Unavailable(f"can't publish on {subject}: {error}") from error

    @overload
    async def request(
        self,
        subject: str,
        message: Message,
        reply: type[M],
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> M: ...

    @overload
    async def request(
        self,
        subject: str,
        message: Message,
        reply: UnionType,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> Message: ...

    async def request(
        self,
        subject: str,
        message: Message,
        reply: Any,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """Ask and wait for the one answer, a `reply` (or one of a union of kinds).

        Raises `Unavailable` at once when nobody listens or we are cut off, `DeadlineExceeded` after
        `timeout_s`, `TooLarge` like `publish`, `Internal` when the answer is no `reply`, and any
        `FlowKVError` that the other side raised.
        """
        payload = encode(message)
        self._check_size(payload, headers)
        if not self.is_connected:
            raise errors.Unavailable(f"not connected to NATS, can't ask {subject}")
        try:
            # The timer is ours, see `jetstream`.
            async with asyncio.timeout(timeout_s):
                answer = await self.nc.request(
                    subject,
                    payload,
                    timeout=None,  # type: ignore[arg-type]
                    headers=dict(headers) if headers else None,
                )
        except TimeoutError:
            raise errors.DeadlineExceeded(f"no answer from {subject} within {timeout_s} s") from None
        except nats.errors.NoRespondersError:
            raise errors.Unavailable(f"nobody listens on {subject}") from None
        except nats.errors.Error as error:
            raise errors.Unavailable(f"can't ask {subject}: {error}") from error
        return open_answer(subject, answer, reply)

    async def subscribe(
        self,
        subject: str,
        kind: type[M],
        handler: Callable[[M, Msg], Awaitable[None] | None],
        *,
        max_pending_messages: int = 8192,
        max_pending_bytes: int = 16 * 1024 * 1024,
    ) -> Subscription:
        """Hand every `kind` that arrives on `subject` to `handler`, one after the other.

        When this returns the server knows of it. A payload that is no `kind`, and a handler that raises, are
        counted and logged; the subscription goes on. Over the pending limits messages are dropped and counted
        (`num_slow_consumer_drops`). Raises `Unavailable`.
        """
        subscription = Subscription(self.nc, subject)

        async def on_message(msg: Msg) -> None:
            try:
                message = decode(msg.data, kind)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                subscription.num_undecodable += 1
                log.warning("message on %s is no %s: %s", msg.subject, kind.__name__, error)
                return
            try:
                pending = handler(message, msg)
                if pending is not None:
                    await pending
            except Exception:
                subscription.num_failed += 1
                log.exception("handler of %s failed", msg.subject)

        await subscription.start(on_message, max_pending_messages, max_pending_bytes)
        return subscription

    async def subscribe_raw(
        self,
        subject: str,
        on_message: Callable[[Msg], Awaitable[None]],
        *,
        max_pending_messages: int = 8192,
        max_pending_bytes: int = 64 * 1024 * 1024,
    ) -> Subscription:
        """`subscribe` without decoding; `on_message` must not raise."""
        subscription = Subscription(self.nc, subject)
        await subscription.start(on_message, max_pending_messages, max_pending_bytes)
        return subscription

    def _check_size(self, payload: bytes, headers: Mapping[str, str] | None) -> None:
        size = len(payload) + sum(len(key) + len(value) + 4 for key, value in (headers or {}).items())
        if size > self.max_payload:
            raise errors.TooLarge(f"a message of {size} bytes, NATS takes {self.max_payload}")

    async def _open(self, url: str, name: str, drain_timeout_s: float) -> None:
        urls = url.split(",")
        await self.nc.connect(
            urls,
            name=name,
            inbox_prefix=f"_INBOX.{user}" if (user := urlsplit(urls[0]).username) else "_INBOX",
            error_cb=self._on_error,
            disconnected_cb=self._on_disconnected,
            reconnected_cb=self._on_reconnected,
            closed_cb=self._on_nats_closed,
            lame_duck_mode_cb=self._on_lame_duck,
            max_reconnect_attempts=-1,
            # Drawn once per process: many clients don't come back in one wave.
            reconnect_time_wait=random.uniform(0.2, 0.5),  # type: ignore[arg-type]
            flush_timeout=_FLUSH_TIMEOUT_S,
            drain_timeout=drain_timeout_s,  # type: ignore[arg-type]
        )
        self._connected_at = asyncio.get_running_loop().time()
        log.info("connected to NATS at %s", self._server())

    async def _close(self, drain_timeout_s: float) -> None:
        self._is_closing = True
        try:
            async with asyncio.timeout(drain_timeout_s + _CLOSE_TIMEOUT_S):
                if self.is_connected:  # else nobody would answer
                    await self.nc.drain()
        except (TimeoutError, OSError, nats.errors.Error) as error:
            # Cut off just now (`ConnectionReconnectingError`): what was buffered is lost.
            log.warning("closing NATS without a drain: %s", error)
        with contextlib.suppress(TimeoutError, OSError, nats.errors.Error):
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self.nc.close()

    async def _on_error(self, error: Exception) -> None:
        if isinstance(error, nats.errors.SlowConsumerError):
            self.num_slow_consumer_drops += 1
            # One line for the first and then for each power of two: a flood must not cause another.
            if self.num_slow_consumer_drops & (self.num_slow_consumer_drops - 1) == 0:
                log.warning("dropped %d messages, last on %s", self.num_slow_consumer_drops, error.subject)
        elif self.is_connected:
            log.warning("NATS error: %s", error)
        else:
            log.debug("NATS attempt failed: %s", error)

    async def _on_disconnected(self) -> None:
        self._connected_at = None
        if not self._is_closing:
            log.warning("lost the connection to NATS")

    async def _on_reconnected(self) -> None:
        log.info("reconnected to NATS at %s", self._server())
        self._begin_anew()

    def _on_deaf(self) -> None:
        self._connected_at = None
        log.warning("NATS at %s says nothing any more", self._server())

    def _on_heard_again(self) -> None:
        log.info("NATS at %s is heard again", self._server())
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._connected_at = asyncio.get_running_loop().time()
        for callback in list(self._reconnect_callbacks):
            try:
                callback()
            except Exception:  # nats-py would stop reconnecting
                log.exception("a reconnect callback failed")

    async def _on_nats_closed(self) -> None:
        if self._is_closing:
            return
        log.error("NATS closed the connection for good: %s", self.nc.last_error)
        if self._on_closed is not None:
            self._on_closed()

    async def _on_lame_duck(self) -> None:
        log.info("NATS server %s is about to stop", self._server())

    def _server(self) -> str:
        url = self.nc.connected_url  # its netloc may hold a password
        return f"{url.hostname}:{url.port}" if url else "?"
