"""The registry of nodes: what each is, kept in the JetStream bucket `flowkv_nodes` while it lives.

For discovery, late joiners and people. Whether a node is alive is judged from its load reports, not here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import msgspec
import nats.errors
import nats.js.errors
from nats.js.api import KeyValueConfig, StorageType
from nats.js.kv import KV_DEL, KV_PURGE, KeyValue

from flowkv_common.bus.connection import Bus
from flowkv_common.wire.messages import NodeDescriptor, decode, encode
from flowkv_common.wire.subjects import NODES_BUCKET

log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 3.0
_FIRST_RETRY_S = 0.1
_STREAM_NAME_IN_USE = 10058

# What JetStream may answer, or not answer, while it starts or restarts.
_TROUBLE = (nats.errors.Error, TimeoutError, OSError)


async def keep_announced(bus: Bus, descriptor: Callable[[], NodeDescriptor], ttl_s: float = 6.0) -> None:
    """Keep the node's record in the registry until cancelled, then delete it.

    Renews every third of `ttl_s` and after each reconnect, makes the bucket anew when it is gone, and tries
    for ever.
    """
    bucket: KeyValue | None = None
    revision = 0
    retry_s = _FIRST_RETRY_S
    woken = asyncio.Event()
    forget_callback = bus.on_reconnect(woken.set)
    try:
        while True:
            woken.clear()
            pause_s = ttl_s / 3
            try:
                if bus.is_connected:  # else the reconnect wakes us
                    async with _until_reconnect(bus), asyncio.timeout(_CALL_TIMEOUT_S):
                        bucket = bucket or await _open_bucket(bus, ttl_s)
                        record = descriptor()
                        revision = await bucket.put(record.node.node_id, encode(record))
                    retry_s = _FIRST_RETRY_S
            except _TROUBLE as error:
                log.warning("the node is not announced: %s", str(error) or type(error).__name__)
                bucket = None
                pause_s, retry_s = retry_s, min(2 * retry_s, ttl_s / 3)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await woken.wait()
    finally:
        forget_callback()
        if bucket is not None and bus.is_connected:
            await _delete(bucket, descriptor().node.node_id, revision)


async def watch_nodes(
    bus: Bus, on_change: Callable[[dict[str, NodeDescriptor]], None], ttl_s: float = 6.0
) -> None:
    """Call `on_change` with all nodes, by id, once they are known and at each change, until cancelled.

    After a reconnect, an error or `ttl_s` of silence the watch is opened anew. What was known and is not in
    the new watch stays for another `ttl_s`: nodes come back a moment after the server did.
    """
    known = _KnownNodes(on_change, ttl_s)
    retry_s = _FIRST_RETRY_S
    while True:
        try:
            async with _until_reconnect(bus):
                await _follow(bus, known, ttl_s)
            retry_s = _FIRST_RETRY_S
        except _Reconnected:
            retry_s = _FIRST_RETRY_S
        except _TROUBLE as error:
            log.warning("the watch on nodes ended: %s", str(error) or type(error).__name__)
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, ttl_s / 3)


class _Reconnected(TimeoutError):
    """The connection was lost and is back: what was asked before will not be answered."""


@asynccontextmanager
async def _until_reconnect(bus: Bus) -> AsyncIterator[None]:
    """Cut the body off at the next reconnect. Raises `_Reconnected`."""
    loop = asyncio.get_running_loop()

    def cut() -> None:
        if not life.expired():
            life.reschedule(loop.time())

    forget_callback = bus.on_reconnect(cut)
    try:
        async with asyncio.timeout(None) as life:
            yield
    except TimeoutError:
        if life.expired():
            raise _Reconnected("reconnected to NATS") from None
        raise
    finally:
        forget_callback()


class _KnownNodes:
    """The nodes as last told, and until when those count that the present watch has not shown."""

    def __init__(self, on_change: Callable[[dict[str, NodeDescriptor]], None], grace_s: float) -> None:
        self._on_change = on_change
        self._grace_s = grace_s
        self._nodes: dict[str, NodeDescriptor] = {}
        self._unconfirmed: set[str] = set()
        self._confirm_by = 0.0
        self._told: dict[str, NodeDescriptor] | None = None

    def reopen(self, now: float) -> None:
        self._unconfirmed = set(self._nodes)
        self._confirm_by = now + self._grace_s

    def take(self, entry: KeyValue.Entry) -> None:
        self._unconfirmed.discard(entry.key)
        # Expiry shows as an empty value in some calls of nats-py: empty is absent.
        if entry.operation in (KV_DEL, KV_PURGE) or not entry.value:
            self._nodes.pop(entry.key, None)
            return
        try:
            self._nodes[entry.key] = decode(entry.value, NodeDescriptor)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            log.warning("record %s in the registry is no node: %s", entry.key, error)

    def tell(self, now: float) -> None:
        """Drop what was not confirmed in time, then report if anything is new."""
        if now >= self._confirm_by:
            for node_id in self._unconfirmed:
                self._nodes.pop(node_id, None)
            self._unconfirmed.clear()
        if self._nodes != self._told:
            self._told = dict(self._nodes)
            self._on_change(dict(self._nodes))


async def _follow(bus: Bus, known: _KnownNodes, ttl_s: float) -> None:
    """One watch, from its opening to `ttl_s` of silence: living nodes renew more often, so it may be dead."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(_CALL_TIMEOUT_S):
        bucket = await _open_bucket(bus, ttl_s)
        watch = await bucket.watchall()
    try:
        known.reopen(loop.time())
        has_all = False
        with suppress(TimeoutError):
            while True:
                async with asyncio.timeout(ttl_s):
                    entry = await anext(watch)
                if entry is None:
                    has_all = True
                else:
                    known.take(entry)
                if has_all:
                    known.tell(loop.time())
        if has_all and bus.is_connected:
            known.tell(loop.time())
    finally:
        await watch.stop()  # type: ignore[no-untyped-call]


async def _delete(bucket: KeyValue, node_id: str, revision: int) -> None:
    """Delete our record, unless a next life of the node has written it since."""
    try:
        async with asyncio.timeout(_CALL_TIMEOUT_S):
            await bucket.delete(node_id, last=revision)
    except _TROUBLE as error:
        log.info("record of node %s is left to expire: %s", node_id, str(error) or type(error).__name__)


async def _open_bucket(bus: Bus, ttl_s: float) -> KeyValue:
    """The bucket, made if need be. Its first maker sets the TTL."""
    config = KeyValueConfig(
        bucket=NODES_BUCKET,
        ttl=ttl_s,
        # Without markers a watch never hears of an expiry.
        limit_marker_ttl=max(1.0, ttl_s),
        storage=StorageType.MEMORY,
    )
    jetstream = bus.jetstream()
    try:
        return await jetstream.create_key_value(config)
    except nats.js.errors.BadRequestError as error:
        if error.err_code != _STREAM_NAME_IN_USE:
            raise
        return await jetstream.key_value(NODES_BUCKET)
