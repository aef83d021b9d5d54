"""JetStream key-value buckets as nats-py really has them: how they are opened, read, and get lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import nats.errors
import nats.js.errors
from nats.js.api import KeyValueConfig, StorageType
from nats.js.kv import KV_DEL, KV_PURGE, KeyValue

from flowkv_common.bus.connection import Bus

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
