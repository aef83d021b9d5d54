"""A NATS connection with typed messages, that knows when it hears nothing. `connect` gives a `Bus`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import UnionType
from typing import Any, Self, overload

import msgspec
import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription
from nats.js import JetStreamContext

from flowkv_common import errors
from flowkv_common.bus.access import Access
from flowkv_common.bus.client import BarrierClient
from flowkv_common.config import NatsSettings
from flowkv_common.tracing import NO_TRACING, Tracing
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import M, Message, Refusal, decode, encode

# After NATS itself was away, others get this long to be heard again before anyone is called dead: two report
# periods, and the time that a client takes to connect.
SETTLE_S = 4.0
# An order to another service is answered within this, or the service is as good as gone.
CONTROL_TIMEOUT_S = 2.0
# More messages than this, or bytes, that wait in one subscription are dropped.
MAX_PENDING_MESSAGES = 8192
_MAX_PENDING_BYTES = 64 * 1024 * 1024
# nats-py waits for ever for a full buffer to drain when the link is gone, unless told otherwise.
_FLUSH_TIMEOUT_S = 5.0
_DRAIN_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 2.0

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def connect(
    nats_settings: NatsSettings | str,
    *,
    name: str,
    user: str = "",
    on_closed: Callable[[], None] | None = None,
    connect_timeout_s: float = 30.0,
    tracing: Tracing = NO_TRACING,
) -> AsyncIterator[Bus]:
    """A connection for as long as the context lasts; on exit it is drained, then closed.

    All that is said and heard by `wire/subjects.py` is under the settings' namespace: clusters of others hear
    none of it. A string is the URL of a server, or of several of one cluster with commas between. `name` is
    what the server's connection reports show. With a `user` answers to our requests come under
    `_INBOX.<user>`, beside the default namespace `_INBOX.<namespace>-<user>`, so that the server can keep
    them from others; it is no secret, and the same whatever the server calls us.
    `on_closed` is called when the connection ends for good, since NATS has refused us for `nats_give_up_s`:
    the body should then end too. Requests carry the current span of `tracing`.

    Raises `CannotStart` when a file that the settings name can't be read, `Unavailable` when no server takes
    us within `connect_timeout_s`, and at the end when the connection has ended for good.
    """
    if isinstance(nats_settings, str):
        nats_settings = NatsSettings(nats_url=nats_settings)
    access = Access(nats_settings)
    bus = Bus(access, on_closed, tracing)
    try:
        async with asyncio.timeout(connect_timeout_s):
            await bus._open(name, user)
    except BaseException as error:
        bus._is_closing = True
        await bus.nc.close()
        if not isinstance(error, TimeoutError):
            raise
        where = bus.nc.known_servers.where
        raise errors.Unavailable(
            f"no NATS at {where} in {connect_timeout_s} s: {bus.nc.last_error}"
        ) from None
    try:
        yield bus
    finally:
        closed_by = bus.nc.last_error if bus.is_closed else None
        await bus._close()
    if closed_by is not None:
        raise errors.Unavailable(f"NATS closed the connection for good: {closed_by}")


class Bus:
    """Typed access to one NATS connection, made by `connect`. `nc` is nats-py's client underneath.

    Subjects are those of `wire/subjects.py`, or any that belong to no namespace.
    """

    def __init__(self, access: Access, on_closed: Callable[[], None] | None, tracing: Tracing) -> None:
        self.nc = BarrierClient(self._begin_anew, access)
        self.tracing = tracing
        self.num_slow_consumer_drops = 0
        self._access = access
        self._on_closed = on_closed
        self._reconnect_callbacks: list[Callable[[], None]] = []
        self._connected_at: float | None = None
        self._is_closing = False

    @property
    def settings(self) -> NatsSettings:
        """How NATS is reached, and how buckets are kept there."""
        return self._access.nats

    @property
    def namespace(self) -> str:
        """Under which all is said and heard."""
        return self.settings.namespace

    @property
    def is_connected(self) -> bool:
        """Whether NATS is heard: a connection that brings not even the answer to a ping is none."""
        return self.nc.is_hearing

    @property
    def is_closed(self) -> bool:
        """NATS has closed the connection for good, or we have."""
        return bool(self.nc.is_closed)

    @property
    def connected_for_s(self) -> float:
        """Seconds since NATS was heard again after it was not; 0 while it is not."""
        if self._connected_at is None or not self.is_connected:
            return 0.0
        return asyncio.get_running_loop().time() - self._connected_at

    @property
    def is_settled(self) -> bool:
        """Whether the silence of others is theirs. While we are cut off, and just after, it may be ours.

        Until then nobody is called dead (docs/architecture.md, rule 8).
        """
        return self.connected_for_s > SETTLE_S

    @property
    def max_payload(self) -> int:
        """Bytes that this server takes in one message."""
        return int(self.nc.max_payload)

    def full_name(self, name: str) -> str:
        """What a subject or bucket of `wire/subjects.py` is called on the server."""
        return subjects.in_namespace(name, self.namespace)

    def plain_name(self, name: str) -> str:
        """The reverse of `full_name`: as `wire/subjects.py` has it."""
        if not name.startswith((f"{self.namespace}.", f"{self.namespace}_")):
            return name
        return subjects.DEFAULT_NAMESPACE + name.removeprefix(self.namespace)

    def on_reconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` each time NATS is heard again after it was not, subscriptions restored.

        Returns a function that takes the callback back.
        """
        self._reconnect_callbacks.append(callback)
        return lambda: self._reconnect_callbacks.remove(callback)

    async def change_server(self, why: str) -> None:
        """Go to another server of the cluster, if there is one: ours is heard, but hears nobody itself."""
        if not self.nc.has_other_servers or not self.is_connected:
            return
        log.warning("leaving NATS at %s for another server: %s", self.nc.server, why)
        with contextlib.suppress(nats.errors.Error):
            await self.nc.flush(CONTROL_TIMEOUT_S)
        await self.nc.force_reconnect()

    def jetstream(self) -> JetStreamContext:
        """JetStream on this connection. Its calls wait for ever: put each under `asyncio.timeout`.

        nats-py's own timer is `asyncio.wait_for`, which on Python 3.11 can lose a cancellation.
        """
        return self.nc.jetstream(timeout=None)

    async def publish(
        self,
        subject: str,
        message: msgspec.Struct,
        *,
        headers: dict[str, str] | None = None,
        reply: str = "",
    ) -> None:
        """Send; answers, if any, go to the subject `reply`.

        While cut off, up to 2 MiB are kept and sent after the reconnect.
        Raises `TooLarge` over the server's `max_payload`, `Unavailable` when closed or the buffer is full.
        """
        payload = encode(message)
        self._check_size(payload, headers or {})
        try:
            await self.nc.publish(self.full_name(subject), payload, reply=reply, headers=headers)
        except nats.errors.Error as error:
            raise errors.Unavailable(f"can't publish on {subject}: {error}") from error

    @overload
    async def request(self, subject: str, message: Message, reply: type[M], *, timeout_s: float) -> M: ...

    @overload
    async def request(
        self, subject: str, message: Message, reply: UnionType, *, timeout_s: float
    ) -> Message: ...

    async def request(self, subject: str, message: Message, reply: Any, *, timeout_s: float) -> Any:
        """Ask and wait for the one answer, a `reply` (or one of a union of kinds).

        Raises `Unavailable` at once when nobody listens or we are cut off, `DeadlineExceeded` after
        `timeout_s`, `TooLarge` like `publish`, `Internal` when the answer is no `reply`, and any
        `FlowKVError` that the other side raised.
        """
        payload, headers = encode(message), self.tracing.headers()
        self._check_size(payload, headers)
        if not self.is_connected:
            raise errors.Unavailable(f"not connected to NATS, can't ask {subject}")
        try:
            # The timer is ours, see `jetstream`.
            async with asyncio.timeout(timeout_s):
                answer = await self.nc.request(
                    self.full_name(subject),
                    payload,
                    timeout=None,  # type: ignore[arg-type]
                    headers=headers or None,
                )
        except TimeoutError:
            raise errors.DeadlineExceeded(f"no answer from {subject} within {timeout_s} s") from None
        except nats.errors.NoRespondersError:
            raise errors.Unavailable(f"nobody listens on {subject}") from None
        except nats.errors.Error as error:
            raise errors.Unavailable(f"can't ask {subject}: {error}") from error
        if answer.headers and subjects.ERROR_CODE_HEADER in answer.headers:
            raise _error_in(answer.data, answer.headers)
        try:
            return decode(answer.data, reply)
        except msgspec.DecodeError as error:
            raise errors.Internal(f"the answer of {subject} is no {reply}: {error}") from None

    async def subscribe(
        self,
        subject: str,
        kind: type[M],
        handler: Callable[[M], Awaitable[None] | None],
        *,
        on_bad: Callable[[str, str], None] | None = None,
    ) -> Subscription:
        """Hand every `kind` that arrives on `subject` to `handler`, one after the other.

        When this returns the server knows of it. A payload that is no `kind` is logged, or told to `on_bad`
        with its subject's plain name and what is wrong. An error of the handler is logged. The subscription
        goes on. Over the pending limits messages are dropped and counted (`num_slow_consumer_drops`). Raises
        `Unavailable`.
        """

        num_bad = 0

        async def on_message(msg: Msg) -> None:
            nonlocal num_bad
            try:
                message = decode(msg.data, kind)
            except msgspec.DecodeError as error:
                num_bad += 1
                if on_bad is None:
                    if _is_worth_a_line(num_bad):
                        text = "message on %s is no %s: %s (%d such so far)"
                        log.warning(text, msg.subject, kind.__name__, error, num_bad)
                else:
                    on_bad(self.plain_name(msg.subject), str(error))
                return
            try:
                pending = handler(message)
                if pending is not None:
                    await pending
            except Exception:
                log.exception("handler of %s failed", msg.subject)

        return await self.subscribe_raw(subject, on_message)

    async def subscribe_raw(self, subject: str, on_message: Callable[[Msg], Awaitable[None]]) -> Subscription:
        """`subscribe` without decoding: `on_message` gets full names of subjects, and must not raise."""
        try:
            inner = await self.nc.subscribe(
                self.full_name(subject),
                cb=on_message,
                pending_msgs_limit=MAX_PENDING_MESSAGES,
                pending_bytes_limit=_MAX_PENDING_BYTES,
            )
            subscription = Subscription(self.nc, inner)
            try:
                if self.is_connected:  # else the reconnect restores it
                    await self.nc.flush(_FLUSH_TIMEOUT_S)
            except nats.errors.Error:
                await subscription.drain()  # the caller can't
                raise
        except nats.errors.Error as error:
            raise errors.Unavailable(f"can't subscribe to {subject}: {error}") from error
        return subscription

    def _check_size(self, payload: bytes, headers: Mapping[str, str]) -> None:
        size = len(payload) + sum(len(key) + len(value) + 4 for key, value in headers.items())
        if size > self.max_payload:
            raise errors.TooLarge(f"a message of {size} bytes, NATS takes {self.max_payload}")

    def _inbox_of(self, user: str) -> str:
        return f"_INBOX.{subjects.service_in_namespace(user, self.namespace)}" if user else "_INBOX"

    async def _open(self, name: str, user: str) -> None:
        await self.nc.open(
            name=name,
            inbox_prefix=self._inbox_of(user),
            error_cb=self._on_error,
            disconnected_cb=self._on_disconnected,
            reconnected_cb=self._on_reconnected,
            closed_cb=self._on_nats_closed,
            lame_duck_mode_cb=self._on_lame_duck,
            max_reconnect_attempts=-1,
            # Drawn once per process: many clients don't come back in one wave.
            reconnect_time_wait=random.uniform(0.2, 0.5),
            flush_timeout=_FLUSH_TIMEOUT_S,
            drain_timeout=_DRAIN_TIMEOUT_S,
        )
        self._connected_at = asyncio.get_running_loop().time()
        log.info("connected to NATS at %s", self.nc.server)

    async def _close(self) -> None:
        self._is_closing = True
        try:
            async with asyncio.timeout(_DRAIN_TIMEOUT_S + _CLOSE_TIMEOUT_S):
                if self.is_connected:  # else nobody would answer
                    await self.nc.drain()
        except (TimeoutError, OSError, nats.errors.Error) as error:
            # Cut off just now (`ConnectionReconnectingError`): what was buffered is lost.
            log.warning("closing NATS without a drain: %s", error)
        with contextlib.suppress(TimeoutError, OSError, nats.errors.Error):
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self.nc.close()

    # --- what nats-py tells ----------------------------------------------------------------------

    async def _on_error(self, error: Exception) -> None:
        if isinstance(error, nats.errors.SlowConsumerError):
            self.num_slow_consumer_drops += 1
            if _is_worth_a_line(self.num_slow_consumer_drops):
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
        log.info("reconnected to NATS at %s", self.nc.server)
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
        log.info("NATS server %s is about to stop", self.nc.server)


class Subscription:
    """Interest in a subject; leaving the context drains it: what has arrived is still handled."""

    def __init__(self, nc: BarrierClient, inner: NatsSubscription) -> None:
        self._nc = nc
        self._inner: NatsSubscription | None = inner

    async def drain(self, timeout_s: float = _DRAIN_TIMEOUT_S) -> None:
        """Take nothing new and handle what is here. Idempotent; gives up after `timeout_s`."""
        inner, self._inner = self._inner, None
        if inner is None:
            return
        # Without a server there is nothing to drain, and `drain()` would wait for its answer.
        leave: Callable[[], Awaitable[None]] = inner.drain if self._nc.is_hearing else inner.unsubscribe
        try:
            with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):
                async with asyncio.timeout(timeout_s):
                    await leave()
        finally:
            self._nc.forget(inner)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.drain()


def _is_worth_a_line(number: int) -> bool:
    """The first, and then each power of two: a flood must not cause another."""
    return number & (number - 1) == 0


def _error_in(payload: bytes, headers: Mapping[str, str]) -> errors.FlowKVError:
    """The error of an answer: from its body, or from its headers where another service wrote the body."""
    try:
        return errors.from_wire(decode(payload, Refusal))
    except msgspec.DecodeError:
        code = headers[subjects.ERROR_CODE_HEADER]
        text = headers.get(subjects.ERROR_HEADER, "error without a text")
        return errors.from_wire(Refusal(code=int(code) if code.isdecimal() else 500, message=text))
