"""Leader election: one of several processes leads at a time, with an epoch that fences all former leaders.

The lease is one record in the JetStream bucket `flowkv_leader`, which never expires there. A standby takes
the holder for dead when the record has not moved for `ttl_s` on the *standby's* clock since it was seen to
move. The holder counts from *before* it asked for its last renewal, and steps down earlier still. So two
never lead at once while their clocks run equally fast, whatever the server's timers do. What a paused process
sends late is refused by its epoch, and since the record stays, no epoch is forgotten while nobody leads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import nats.js.errors
from nats.js.kv import KeyValue

from flowkv_common.aio import running, wait_event
from flowkv_common.bus.connection import Bus
from flowkv_common.bus.registry import (
    TROUBLE,
    describe,
    log_once,
    open_bucket,
    read_key,
    until_reconnect,
)
from flowkv_common.wire.messages import decode, encode
from flowkv_common.wire.nodes import Leader
from flowkv_common.wire.subjects import LEADER_BUCKET

log = logging.getLogger(__name__)

KEY = "leader"
NOBODY = ""  # the holder has left: the lease is free

# Shares of the TTL: when the holder renews, when it steps down unless that has worked, how often others look.
_RENEW_AFTER = 1 / 4
_STEP_DOWN_AFTER = 7 / 8
_LOOK_EVERY = 1 / 8

_NOTHING_SEEN = (-1, 0.0)  # the last revision that was new to us, and when

# One look, or one try. While a cluster of NATS servers chooses who keeps the bucket, questions are lost.
_TRY_TIMEOUT_S = 1.0


class Lease:
    """One process's claim to lead. `holder_id` must be new with each start of the process.

    `epoch` is of our last term, 0 if there was none; `highest_epoch` is the highest that we know of.
    """

    def __init__(self, bus: Bus, holder_id: str, ttl_s: float = 2.0) -> None:
        self.holder_id = holder_id
        self.epoch = 0
        self.highest_epoch = 0
        self._bus = bus
        self._ttl_s = ttl_s
        self._bucket: KeyValue | None = None
        self._revision = 0  # of our record
        self._held_until = 0.0
        self._is_confirmed = False  # on this connection
        self._patient_until = 0.0
        self._seen = _NOTHING_SEEN
        self._seen_holder_id = NOBODY
        self._woken = asyncio.Event()

    @property
    def is_held(self) -> bool:
        """Whether we lead. False while cut off, and after a reconnect until the renewal has worked."""
        return (
            self._is_confirmed
            and self._bus.connected_for_s > 0
            and asyncio.get_running_loop().time() < self._held_until
        )

    @property
    def has_leader(self) -> bool:
        """Whether anyone leads, as far as we can see."""
        is_live = asyncio.get_running_loop().time() - self._seen[1] < self._ttl_s
        return self.is_held or (self._seen_holder_id not in (NOBODY, self.holder_id) and is_live)

    def hear(self, epoch: int) -> None:
        """A node has heard of a leader of this epoch. Ours becomes higher, at once if we lead."""
        if epoch > self.highest_epoch:
            self.highest_epoch = epoch
            if self.is_held:
                self._woken.set()

    async def campaign(self, lead: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Until cancelled: wait for the lease, run `lead()` while we hold it, begin anew when it is lost.

        `lead()` is cancelled when the lease is lost, and should never return. Trouble with NATS is logged and
        tried again; what `lead()` raises is raised. When cancelled, we free the lease, so that another takes
        it at once.
        """
        forget_callback = self._bus.on_reconnect(self._on_reconnect)
        try:
            while True:
                await self._win()
                log.info("%s leads, epoch %d", self.holder_id, self.epoch)
                try:
                    async with running(lead()):
                        why = await self._keep()
                    log.warning("%s does not lead any more: %s", self.holder_id, why)
                finally:
                    self._held_until = 0.0
                    await self._give_up()
                    self._bucket = None
        finally:
            forget_callback()

    def _on_reconnect(self) -> None:
        self._is_confirmed = False
        # The server may have begun anew, and with it the count of revisions: what we saw proves nothing now.
        self._seen = _NOTHING_SEEN
        self._patient_until = asyncio.get_running_loop().time() + self._ttl_s
        self._woken.set()

    async def _win(self) -> None:
        """Until the lease is ours."""
        trouble = ""
        while True:
            try:
                if self._bus.is_connected:
                    async with until_reconnect(self._bus), asyncio.timeout(_TRY_TIMEOUT_S):
                        if await self._try_to_win():
                            return
                    trouble = ""
            except TROUBLE as error:
                if not isinstance(error, TimeoutError):  # as when the bucket is gone
                    self._bucket = None
                trouble = log_once("can't look who leads", error, trouble)
            await self._pause(_LOOK_EVERY * self._ttl_s)

    async def _try_to_win(self) -> bool:
        """Take the lease if it is free: absent, given up, silent for too long, or ours of an earlier term."""
        if self._bucket is None:
            self._bucket = await open_bucket(self._bus, LEADER_BUCKET)
        found = await read_key(self._bucket, KEY)
        now = asyncio.get_running_loop().time()
        if found.revision != self._seen[0]:
            self._seen = (found.revision, now)
        self._seen_holder_id = NOBODY
        has_led_last = 0 < self.epoch == self.highest_epoch
        if found.revision == 0 and now < self._patient_until and not has_led_last:
            return False  # the server has just forgotten it: the last leader knows its epoch and goes first
        if found.value is None:
            # Someone has deleted it. Each epoch in this bucket took at least one write.
            self.hear(found.revision)
        else:
            leader = _leader(found.value)
            self.hear(leader.epoch)
            self._seen_holder_id = leader.scheduler_id
            is_live = now - self._seen[1] < self._ttl_s
            if is_live and leader.scheduler_id not in (NOBODY, self.holder_id):
                return False
        try:
            await self._write(self._bucket, self.highest_epoch + 1, found.revision)
        except nats.js.errors.KeyWrongLastSequenceError:
            return False  # another was faster
        return True

    async def _keep(self) -> str:
        """Renew until the lease is lost; returns why."""
        loop = asyncio.get_running_loop()
        assert self._bucket is not None
        trouble, pause = "the process was held up", _RENEW_AFTER
        while True:
            await self._pause(min(pause * self._ttl_s, self._held_until - loop.time()))
            if loop.time() >= self._held_until:
                return f"not renewed in time, {trouble}"
            if not self._bus.is_connected:
                trouble = "cut off from NATS"
                continue
            # Ours, unless we have heard of a higher one: a server that restarts forgets all epochs.
            epoch = self.epoch if self.highest_epoch <= self.epoch else self.highest_epoch + 1
            try:
                async with until_reconnect(self._bus), asyncio.timeout_at(self._held_until):
                    try:
                        await self._write(self._bucket, epoch, self._revision)
                    except nats.js.errors.NoStreamResponseError:
                        # Gone, or nobody keeps it just now: a cluster of NATS servers chooses who shall.
                        await self._bucket.status()
                        raise
                pause = _RENEW_AFTER
            except nats.js.errors.KeyWrongLastSequenceError:
                if not await self._take_unanswered_write():
                    return "the record is not ours any more"
                pause = 0.0
            except nats.js.errors.NotFoundError:
                return "its bucket is gone"
            except TROUBLE as error:
                trouble, pause = describe(error), _LOOK_EVERY

    async def _write(self, bucket: KeyValue, epoch: int, last: int) -> None:
        """Write our record over revision `last`, and only that; we lead from then on."""
        asked_at = asyncio.get_running_loop().time()
        record = encode(Leader(scheduler_id=self.holder_id, epoch=epoch))
        self._revision = await bucket.update(KEY, record, last=last)
        self.epoch = epoch
        self.highest_epoch = max(epoch, self.highest_epoch)
        self._held_until = asked_at + _STEP_DOWN_AFTER * self._ttl_s
        self._is_confirmed = True

    async def _take_unanswered_write(self) -> bool:
        """Whether what stands over our last revision is our own: a write whose answer we have not got."""
        try:
            async with until_reconnect(self._bus), asyncio.timeout_at(self._held_until):
                # Of the server that leads the bucket: another's copy may be old.
                bucket = self._bus.full_name(LEADER_BUCKET)
                found = await self._bus.jetstream().get_last_msg(f"KV_{bucket}", f"$KV.{bucket}.{KEY}")
        except TROUBLE:
            return False
        if not found.data:
            return False  # someone has deleted it
        record = _leader(found.data)
        if (record.scheduler_id, record.epoch) != (self.holder_id, self.epoch):
            return False
        self._revision = found.seq or 0
        return True

    async def _give_up(self) -> None:
        """Free the lease, unless another has it already."""
        if self._bucket is None or not self._bus.is_connected:
            return
        record = encode(Leader(scheduler_id=NOBODY, epoch=self.highest_epoch))
        try:
            async with asyncio.timeout(_STEP_DOWN_AFTER * self._ttl_s):
                await self._bucket.update(KEY, record, last=self._revision)
        except TROUBLE as error:
            log.info("the lease is left to be taken: %s", describe(error))

    async def _pause(self, seconds: float) -> None:
        """Until a reconnect or a higher epoch, but at most this long."""
        await wait_event(self._woken, seconds)
        self._woken.clear()


def _leader(value: bytes) -> Leader:
    """The record; if it can't be read nobody's, so that a spoilt one does not lock everyone out."""
    try:
        return decode(value, Leader)
    except msgspec.DecodeError as error:
        log.warning("the record of the leader is none: %s", error)
        return Leader(scheduler_id=NOBODY, epoch=0)
