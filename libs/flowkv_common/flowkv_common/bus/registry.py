"""JetStream key-value buckets as nats-py really has them: how they are opened, read, and get lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

import msgspec
import nats.errors
import nats.js.errors
from nats.js.api import KeyValueConfig, StorageType
from nats.js.kv import KV_DEL, KV_PURGE, KeyValue

from flowkv_common import errors
from flowkv_common.aio import Backoff, wait_event
from flowkv_common.bus.connection import Bus
from flowkv_common.wire.messages import decode, encode
from flowkv_common.wire.nodes import Check, Checked, NodeDescriptor
from flowkv_common.wire.subjects import NODE_CHECK, NODES_BUCKET, at

# One call of JetStream. Its own timers are off, see `Bus.jetstream`: put each call under `asyncio.timeout`.
CALL_TIMEOUT_S = 3.0
# What JetStream may answer, or not answer, while it starts or restarts.
TROUBLE = (nats.errors.Error, TimeoutError, OSError)

_STREAM_NAME_IN_USE = 10058


class Found(NamedTuple):
    """What stands under a key: no value when it is absent; `revision` is 0 when it never was there."""

    value: bytes | None
    revision: int


async def open_bucket(bus: Bus, name: str, ttl_s: float | None = None) -> KeyValue:
    """The bucket in the server's memory, made if need be. Its first maker sets the TTL; None: values stay."""
    config = KeyValueConfig(
        bucket=name,
        ttl=ttl_s,
        # Without markers a watch never hears of an expiry.
        limit_marker_ttl=max(1.0, ttl_s) if ttl_s else None,
        storage=StorageType.MEMORY,
    )
    jetstream = bus.jetstream()
    try:
        return await jetstream.create_key_value(config)
    except nats.js.errors.BadRequestError as error:
        if error.err_code != _STREAM_NAME_IN_USE:
            raise
        return await jetstream.key_value(name)


async def read(bucket: KeyValue, key: str) -> Found:
    """The latest value under `key`. A bucket that is gone reads as empty: only a write tells."""
    try:
        entry = await bucket.get(key)
    except nats.js.errors.KeyNotFoundError as error:
        return Found(None, error.entry.revision if error.entry else 0)
    return Found(value_of(entry), entry.revision or 0)


def value_of(entry: KeyValue.Entry) -> bytes | None:
    """The value, None where the entry says that the key is gone."""
    # Expiry shows as an empty value in some calls of nats-py: empty is absent.
    if entry.operation in (KV_DEL, KV_PURGE) or not entry.value:
        return None
    return entry.value


def describe(error: BaseException) -> str:
    """What went wrong, for a log line: timeouts have no text of their own, nor has JetStream that is off."""
    if isinstance(error, nats.js.errors.ServiceUnavailableError) and error.code is None:
        return "JetStream is off at this NATS server, and FlowKV needs it: start it as `nats-server -js`"
    return str(error) or type(error).__name__


class Reconnected(TimeoutError):
    """The connection was lost and is back: what was asked before will not be answered."""


@asynccontextmanager
async def until_reconnect(bus: Bus) -> AsyncIterator[None]:
    """Cut the body off at the next reconnect. Raises `Reconnected`."""
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
            raise Reconnected("reconnected to NATS") from None
        raise
    finally:
        forget_callback()


log = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.1
# A registry that can't be read for so long is none.
_CLAIM_TIMEOUT_S = 30.0


class NodeIdTaken(errors.Unavailable):
    """Another node serves under this id."""

    def __init__(self, node_id: str, other: NodeDescriptor | None) -> None:
        where = f" on {other.host}, process {other.pid}" if other else ""
        super().__init__(
            f"a node {node_id!r} is running already{where}: stop it, or give this one another FLOWKV_NODE_ID"
        )


async def claim_node_id(bus: Bus, node_id: str, ttl_s: float = 6.0) -> None:
    """Make sure that nobody lives under this id. Asked before the node listens itself, or it would answer.

    The record of a dead life is taken away: a node that was killed starts again at once. Dead is who neither
    answers nor renews its record. Raises NodeIdTaken, and Unavailable when there is no registry.
    """
    trouble = ""
    try:
        async with asyncio.timeout(_CLAIM_TIMEOUT_S):
            while True:
                try:
                    return await _claim(bus, node_id, ttl_s)
                except TROUBLE as error:
                    trouble = _log_once("the registry of nodes can't be read", error, trouble)
                await asyncio.sleep(_FIRST_RETRY_S)
    except TimeoutError:
        raise errors.Unavailable(f"no registry of nodes for {_CLAIM_TIMEOUT_S} s: {trouble}") from None


async def _claim(bus: Bus, node_id: str, ttl_s: float) -> None:
    async with asyncio.timeout(CALL_TIMEOUT_S):
        bucket = await open_bucket(bus, NODES_BUCKET, ttl_s)
        before = await read(bucket, node_id)
    # Longer than a living node takes to renew its record: what does not answer shows there.
    if await _answers(bus, node_id, timeout_s=ttl_s / 2):
        raise NodeIdTaken(node_id, _descriptor(before))
    async with asyncio.timeout(CALL_TIMEOUT_S):
        after = await read(bucket, node_id)
        if after.value is None:
            return
        if after.revision != before.revision:
            raise NodeIdTaken(node_id, _descriptor(after))
        log.info("taking the place of a former life of %s", node_id)
        await bucket.delete(node_id, last=after.revision)


async def _answers(bus: Bus, node_id: str, timeout_s: float) -> bool:
    """Does anyone listen where a node of this id would?"""
    try:
        await bus.request(at(NODE_CHECK, node_id), Check(), Checked, timeout_s=timeout_s)
    except (errors.Unavailable, errors.DeadlineExceeded):
        return False
    except errors.FlowKVError:
        return True  # be it with an error
    return True


async def keep_announced(bus: Bus, descriptor: Callable[[], NodeDescriptor], ttl_s: float = 6.0) -> None:
    """Keep the node's record in the registry until cancelled, then delete it. Claim its id before.

    Renews every third of `ttl_s` and after each reconnect, makes the bucket anew when it is gone, and tries
    for ever. Raises NodeIdTaken when another life has come, after ours was cut off or at the same instant.
    """
    bucket: KeyValue | None = None
    revision = 0
    backoff = Backoff(_FIRST_RETRY_S, ttl_s / 3)
    trouble = ""
    woken = asyncio.Event()
    forget_callback = bus.on_reconnect(woken.set)
    try:
        while True:
            woken.clear()
            pause_s = ttl_s / 3
            try:
                if bus.is_connected:  # else the reconnect wakes us
                    async with until_reconnect(bus), asyncio.timeout(CALL_TIMEOUT_S):
                        bucket = bucket or await open_bucket(bus, NODES_BUCKET, ttl_s)
                        revision = await _write(bucket, descriptor(), revision)
                    trouble = ""
                    backoff.reset()
            except TROUBLE as error:
                trouble = _log_once("the node is not announced", error, trouble)
                bucket = None
                pause_s = backoff.advance()
            await wait_event(woken, pause_s)
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
    backoff = Backoff(_FIRST_RETRY_S, ttl_s / 3)
    trouble = ""
    while True:
        try:
            async with until_reconnect(bus):
                await _follow(bus, known, ttl_s)
            trouble = ""
            backoff.reset()
        except Reconnected:
            backoff.reset()
        except TROUBLE as error:
            trouble = _log_once("the watch on nodes ended", error, trouble)
            await backoff.sleep()


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

    def take(self, entry: KeyValue.Entry, *, is_sure: bool) -> None:
        """A record, or that it is gone.

        Unless `is_sure`, one that has only expired stays, unconfirmed: while NATS is away nobody can renew.
        """
        self._unconfirmed.discard(entry.key)
        value = value_of(entry)
        if value is None:
            if entry.operation == KV_DEL or is_sure:
                self._nodes.pop(entry.key, None)
            elif entry.key in self._nodes:
                self._unconfirmed.add(entry.key)
            return
        try:
            self._nodes[entry.key] = decode(value, NodeDescriptor)
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
    async with asyncio.timeout(CALL_TIMEOUT_S):
        bucket = await open_bucket(bus, NODES_BUCKET, ttl_s)
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
                    known.take(entry, is_sure=bus.connected_for_s > ttl_s)
                if has_all and bus.is_connected:
                    known.tell(loop.time())
        if has_all and bus.is_connected:
            known.tell(loop.time())
    finally:
        # Its own error would take the place of a cancel.
        with suppress(*TROUBLE):
            await watch.stop()  # type: ignore[no-untyped-call]


def _log_once(what: str, error: BaseException, told: str) -> str:
    """Logs what is wrong, but not what was `told` last time already. Returns what to pass next time."""
    trouble = describe(error)
    if trouble != told:
        log.warning("%s: %s", what, trouble)
    return trouble


async def _write(bucket: KeyValue, record: NodeDescriptor, revision: int) -> int:
    """Over our record of this `revision`; the revision that it has then. Raises NodeIdTaken."""
    node_id, value = record.node.node_id, encode(record)
    try:
        return await bucket.update(node_id, value, last=revision)
    except nats.js.errors.KeyWrongLastSequenceError:
        found = await read(bucket, node_id)
    # It has expired, or we have not heard that it was written.
    other = _descriptor(found)
    if other is not None and other.node != record.node:
        raise NodeIdTaken(node_id, other)
    return await bucket.update(node_id, value, last=found.revision)


def _descriptor(found: Found) -> NodeDescriptor | None:
    """None if nothing stands there, or nothing that we can read."""
    try:
        return decode(found.value, NodeDescriptor) if found.value else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


async def _delete(bucket: KeyValue, node_id: str, revision: int) -> None:
    """Delete our record, unless a next life of the node has written it since."""
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            await bucket.delete(node_id, last=revision)
    except TROUBLE as error:
        log.info("record of node %s is left to expire: %s", node_id, describe(error))
