"""The registry of nodes: one record per node in a JetStream bucket, which expires when its node dies.

At the end: JetStream key-value buckets as nats-py really has them, how they are opened, read, and get lost.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

import msgspec
import nats.errors
import nats.js.errors
from nats.js.api import KeyValueConfig, StorageType
from nats.js.kv import KV_DEL, KV_PURGE, KeyValue

from flowkv_common import errors
from flowkv_common.aio import Backoff, jittered, wait_event
from flowkv_common.bus.connection import Bus
from flowkv_common.wire.messages import decode, encode
from flowkv_common.wire.nodes import Check, Checked, NodeDescriptor
from flowkv_common.wire.subjects import NODE_CHECK, NODES_BUCKET, at

# One call of JetStream. Its own timers are off, see `Bus.jetstream`: put each call under `asyncio.timeout`.
CALL_TIMEOUT_S = 3.0
# What JetStream may answer, or not answer, while it starts or restarts.
TROUBLE = (nats.errors.Error, TimeoutError, OSError)
_FIRST_RETRY_S = 0.1
# A registry that can't be read for so long is none.
_CLAIM_TIMEOUT_S = 30.0
_STREAM_NAME_IN_USE = 10058
# Of the nodes that are asked whether they hear us.
_MOST_ASKED = 8
_ANSWER_TIMEOUT_S = 1.0

log = logging.getLogger(__name__)


class NodeIdTaken(errors.Unavailable):
    """Another node serves under this id."""

    def __init__(self, node_id: str, other: NodeDescriptor | None) -> None:
        where = f" on {other.host}, process {other.pid}" if other else ""
        super().__init__(
            f"a node {node_id!r} is running already{where}: stop it, or give this one another FLOWKV_NODE_ID"
        )


async def claim_node_id(bus: Bus, node_id: str, ttl_s: float = 6.0) -> None:
    """Make sure that no node lives under this id. Call it before the node itself listens, or it would answer.

    A node is dead when it neither answers nor renews its record. The record is then deleted, so that a killed
    node starts again at once. Raises NodeIdTaken, and Unavailable when there is no registry.
    """
    trouble = ""
    try:
        async with asyncio.timeout(_CLAIM_TIMEOUT_S):
            while True:
                try:
                    return await _claim(bus, node_id, ttl_s)
                except TROUBLE as error:
                    trouble = log_once("the registry of nodes can't be read", error, trouble)
                await asyncio.sleep(_FIRST_RETRY_S)
    except TimeoutError:
        raise errors.Unavailable(f"no registry of nodes for {_CLAIM_TIMEOUT_S} s: {trouble}") from None


async def _claim(bus: Bus, node_id: str, ttl_s: float) -> None:
    async with asyncio.timeout(CALL_TIMEOUT_S):
        bucket = await open_bucket(bus, NODES_BUCKET, ttl_s)
        before = await read_key(bucket, node_id)
    is_answered = True
    try:
        # Longer than a living node takes to renew its record: one that does not answer shows there.
        await bus.request(at(NODE_CHECK, node_id), Check(), Checked, timeout_s=ttl_s / 2)
    except (errors.Unavailable, errors.DeadlineExceeded):
        is_answered = False
    except errors.FlowKVError:
        pass  # an answer all the same
    if is_answered:
        raise NodeIdTaken(node_id, _descriptor(before))
    async with asyncio.timeout(CALL_TIMEOUT_S):
        after = await read_key(bucket, node_id)
        if after.value is None:
            return
        if after.revision != before.revision:
            raise NodeIdTaken(node_id, _descriptor(after))
        log.info("taking the place of a former life of %s", node_id)
        await bucket.delete(node_id, last=after.revision)


async def keep_announced(bus: Bus, descriptor: Callable[[], NodeDescriptor], ttl_s: float = 6.0) -> None:
    """Keep the node's record in the registry until cancelled, then delete it. Claim its id before.

    Renews every third of `ttl_s` and after each reconnect, makes the bucket anew when it is gone, and tries
    for ever. Raises NodeIdTaken when another incarnation has come, after this one was cut off or at the same
    instant.
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
            pause_s = jittered(ttl_s / 3)  # a reconnect wakes all nodes at once
            try:
                if bus.is_connected:  # else the reconnect wakes us
                    async with until_reconnect(bus), asyncio.timeout(CALL_TIMEOUT_S):
                        bucket = bucket or await open_bucket(bus, NODES_BUCKET, ttl_s)
                        revision = await _write(bucket, descriptor(), revision)
                    trouble = ""
                    backoff.reset()
            except TROUBLE as error:
                trouble = log_once("the node is not announced", error, trouble)
                bucket = None
                pause_s = backoff.advance()
            await wait_event(woken, pause_s)
    finally:
        forget_callback()
        if bucket is not None and bus.is_connected:
            node_id = descriptor().node.node_id
            try:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    await bucket.delete(node_id, last=revision)  # unless a next incarnation has written it
            except TROUBLE as error:
                log.info("record of node %s is left to expire: %s", node_id, describe(error))


async def _write(bucket: KeyValue, record: NodeDescriptor, revision: int) -> int:
    """Write over our record of this `revision`; returns the new revision. Raises NodeIdTaken."""
    node_id, value = record.node.node_id, encode(record)
    try:
        return await bucket.update(node_id, value, last=revision)
    except nats.js.errors.KeyWrongLastSequenceError:
        found = await read_key(bucket, node_id)
    # It has expired, or we have not heard that it was written.
    other = _descriptor(found)
    if other is not None and other.node != record.node:
        raise NodeIdTaken(node_id, other)
    return await bucket.update(node_id, value, last=found.revision)


async def watch_nodes(
    bus: Bus,
    on_change: Callable[[dict[str, NodeDescriptor]], None],
    ttl_s: float = 6.0,
    *,
    own_id: str = "",
) -> None:
    """Call `on_change` with all nodes, by id, once they are known and at each change, until cancelled.

    After a reconnect, an error or `ttl_s / 2` of silence the watch is opened anew: living nodes renew more
    often. What was known and is not in the new watch stays for another `ttl_s`: nodes come back a moment
    after the server did. In a cluster of NATS servers we change ours when it seems to be cut off from the
    others. `own_id` is of the node that watches.
    """
    watch = _Watch(bus, on_change, ttl_s, own_id)
    backoff = Backoff(_FIRST_RETRY_S, ttl_s / 3)
    trouble = ""
    while True:
        await watch.leave_server_if_cut_off()
        try:
            async with until_reconnect(bus):
                await watch.follow()
            trouble = ""
            backoff.reset()
        except Reconnected:
            backoff.reset()
        except TROUBLE as error:
            trouble = log_once("the watch on nodes ended", error, trouble)
            await backoff.sleep()


class _Watch:
    """The nodes as last told, and until when those count that the present watch has not shown."""

    def __init__(
        self, bus: Bus, on_change: Callable[[dict[str, NodeDescriptor]], None], ttl_s: float, own_id: str
    ) -> None:
        self._bus = bus
        self._on_change = on_change
        self._ttl_s = ttl_s
        self._own_id = own_id
        self._nodes: dict[str, NodeDescriptor] = {}
        self._revisions: dict[str, int] = {}  # of their records
        self._unconfirmed: dict[str, float] = {}  # until when they count all the same
        self._told: dict[str, NodeDescriptor] | None = None
        self._renewed_at = -math.inf  # when any record last changed
        self._opened_at = -math.inf  # when a watch was last opened

    async def follow(self) -> None:
        """One watch, until `ttl_s / 2` of silence: living nodes renew more often, so it may be dead."""
        async with asyncio.timeout(CALL_TIMEOUT_S):
            bucket = await open_bucket(self._bus, NODES_BUCKET, self._ttl_s)
            entries = await bucket.watchall()
        try:
            self._opened_at = _now()
            for node_id in self._nodes:
                self._unconfirmed.setdefault(node_id, self._opened_at + self._ttl_s)
            has_all = False
            with suppress(TimeoutError):
                while True:
                    async with asyncio.timeout(self._ttl_s / 2):
                        entry = await anext(entries)
                    if entry is None:
                        has_all = True
                    else:
                        self._hear_entry(entry)
                    if has_all:
                        self._tell_changes()
            if has_all:
                self._tell_changes()
        finally:
            # Its own error would take the place of a cancel.
            with suppress(*TROUBLE):
                await entries.stop()  # type: ignore[no-untyped-call]

    async def leave_server_if_cut_off(self) -> None:
        """Whether nobody renews, or our server has lost the others of its cluster, shows by asking nodes.

        While the cluster chooses who keeps the bucket, which takes up to 9 s, nobody renews either.
        """
        last_sign = max(self._renewed_at, self._opened_at, _now() - self._bus.connected_for_s)
        silent_s = _now() - last_sign
        if silent_s < 0.9 * self._ttl_s / 2 or not self._bus.nc.has_other_servers:
            return
        if silent_s > 1.5 * self._ttl_s:
            await self._bus.change_server(f"JetStream has been silent for {silent_s:.0f} s")
            return
        others = [node_id for node_id in self._nodes if node_id != self._own_id]
        others = random.sample(others, min(_MOST_ASKED, len(others)))
        num_alive = sum(await asyncio.gather(*map(self._answers, others)))
        if num_alive < len(others) / 2:
            await self._bus.change_server(f"{len(others) - num_alive} of {len(others)} nodes don't answer")

    async def _answers(self, node_id: str) -> bool:
        try:
            await self._bus.request(at(NODE_CHECK, node_id), Check(), Checked, timeout_s=_ANSWER_TIMEOUT_S)
        except (errors.Unavailable, errors.DeadlineExceeded):
            return False
        except errors.FlowKVError:
            pass  # an answer all the same
        return True

    def _hear_entry(self, entry: KeyValue.Entry) -> None:
        """A record, or that it is gone. One that expired when nobody could renew stays, unconfirmed."""
        value = _value_of(entry)
        if value is None:
            # Others renew: so this one could have done so, too.
            could_renew = self._bus.connected_for_s > self._ttl_s
            could_renew = could_renew and _now() - self._renewed_at < self._ttl_s / 2
            if entry.operation == KV_DEL or could_renew:
                self._nodes.pop(entry.key, None)
                self._unconfirmed.pop(entry.key, None)
            elif entry.key in self._nodes:
                self._unconfirmed.setdefault(entry.key, _now() + self._ttl_s)
            return
        self._unconfirmed.pop(entry.key, None)
        if self._revisions.get(entry.key) != entry.revision:
            self._revisions[entry.key] = entry.revision or 0
            self._renewed_at = _now()
        try:
            descriptor = decode(value, NodeDescriptor)
        except msgspec.DecodeError as error:
            log.warning("record %s in the registry is no node: %s", entry.key, error)
            return
        # Most only renew what is known. What is kept is compared with what was told at a glance.
        if self._nodes.get(entry.key) != descriptor:
            self._nodes[entry.key] = descriptor

    def _tell_changes(self) -> None:
        """Drop what was not confirmed in time, then report if anything is new."""
        if not self._bus.is_connected:
            return
        for node_id in [node_id for node_id, until in self._unconfirmed.items() if _now() >= until]:
            del self._unconfirmed[node_id]
            self._nodes.pop(node_id, None)
            self._revisions.pop(node_id, None)
        if self._nodes != self._told:
            self._told = dict(self._nodes)
            self._on_change(dict(self._nodes))


def _now() -> float:
    return asyncio.get_running_loop().time()


def log_once(what: str, error: BaseException, told: str) -> str:
    """Logs what is wrong, but not what was `told` last time already. Returns what to pass next time."""
    trouble = describe(error)
    if trouble != told:
        log.warning("%s: %s", what, trouble)
    return trouble


# --- JetStream buckets -----------------------------------------------------------------------------


class Found(NamedTuple):
    """What stands under a key: no value when it is absent; `revision` is 0 when it never was there."""

    value: bytes | None
    revision: int


async def open_bucket(bus: Bus, name: str, ttl_s: float | None = None) -> KeyValue:
    """The bucket, made if need be as the settings say. Its first maker sets the TTL; None: values stay.

    It is that of the bus's namespace. One that fewer servers keep than the settings say is given to more.
    """
    name = bus.full_name(name)
    jetstream, num_replicas = bus.jetstream(), bus.settings.nats_replicas
    try:
        # Not `create_key_value` at once: it needs a leader of the whole cluster, this only the bucket's.
        found = await jetstream.stream_info(f"KV_{name}")
    except nats.js.errors.NotFoundError:
        config = KeyValueConfig(
            bucket=name,
            ttl=ttl_s,
            # Without markers a watch never hears of an expiry.
            limit_marker_ttl=max(1.0, ttl_s) if ttl_s else None,
            storage=StorageType(bus.settings.nats_storage),
            replicas=num_replicas,
        )
        try:
            return await jetstream.create_key_value(config)
        except nats.js.errors.BadRequestError as error:
            if error.err_code != _STREAM_NAME_IN_USE:  # another was faster
                raise
    else:
        if (found.config.num_replicas or 1) < num_replicas:
            await jetstream.update_stream(found.config, num_replicas=num_replicas)
    return await jetstream.key_value(name)


async def read_key(bucket: KeyValue, key: str) -> Found:
    """The latest value under `key`. A bucket that is gone reads as empty: only a write tells."""
    try:
        entry = await bucket.get(key)
    except nats.js.errors.KeyNotFoundError as error:
        return Found(None, error.entry.revision if error.entry else 0)
    return Found(_value_of(entry), entry.revision or 0)


def _value_of(entry: KeyValue.Entry) -> bytes | None:
    """The value, None where the entry says that the key is gone."""
    # Expiry shows as an empty value in some calls of nats-py: empty is absent.
    if entry.operation in (KV_DEL, KV_PURGE) or not entry.value:
        return None
    return entry.value


def _descriptor(found: Found) -> NodeDescriptor | None:
    """None if nothing stands there, or nothing that can be read."""
    try:
        return decode(found.value, NodeDescriptor) if found.value else None
    except msgspec.DecodeError:
        return None


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
