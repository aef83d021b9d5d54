"""The attempts of gateways on this node: which live, which are over for good, and what gateways are told.

A cancel may overtake the message that it cancels, so a cancelled attempt leaves a tombstone for longer than
any request's deadline (docs/architecture.md, rule 2). The keepalive is a request: a gateway that is gone
shows at once, and a gateway can name attempts that it no longer wants, should a cancel have been lost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from flowkv_common.bus.connection import Bus
from flowkv_common.errors import DeadlineExceeded, FlowKVError, Stale, TooLarge, Unavailable
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Keepalive, KeepaliveReply, NodeRef, StepTokens, TokenChunk

log = logging.getLogger(__name__)

TOMBSTONE_S = 3600.0
# A bound of some 25 MB. At more cancels than these in an hour the oldest tombstones go before their time.
MAX_TOMBSTONES = 100_000
KEEPALIVE_PERIOD_S = 1.0
KEEPALIVE_TIMEOUT_S = 2.0
# A gateway is gone when two keepalives in a row found nobody; not while NATS itself is coming back.
MISSES_UNTIL_GONE = 2


@dataclass(slots=True)
class Attempt:
    """One attempt on this node. `state` is shown to the gateway.

    `stop(is_cut_off)` frees all that the attempt holds.
    """

    transfer_id: str
    gateway_id: str
    state: str
    stop: Callable[[bool], None]


class Attempts:
    """The attempts of this node by transfer id. Ending or cancelling one twice does no harm."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._live: dict[str, Attempt] = {}
        # transfer_id -> when to forget; oldest first. A dict would be slow to be taken from at that end.
        self._tombstones: OrderedDict[str, float] = OrderedDict()
        self._some_ended = asyncio.Event()

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Attempt]:
        return iter(list(self._live.values()))

    def __contains__(self, transfer_id: str) -> bool:
        return transfer_id in self._live

    def refuse_ended(self, transfer_id: str) -> None:
        """Raises Stale if this attempt was cancelled here, or a later one of the same request runs here."""
        if transfer_id in self._tombstones:
            raise Stale(f"attempt {transfer_id} has ended")
        request_id, _, number = transfer_id.rpartition(".")
        if f"{request_id}.{int(number) + 1}" in self._live:
            raise Stale(f"attempt {transfer_id} is older than the one that runs")

    def begin(self, attempt: Attempt) -> None:
        """Note an attempt; it takes the place of its own earlier phase, and ends older attempts.

        Raises Stale if it was cancelled before it came.
        """
        self.refuse_ended(attempt.transfer_id)
        request_id, _, number = attempt.transfer_id.rpartition(".")
        for older in range(int(number)):
            self.cancel(f"{request_id}.{older}", is_cut_off=True)
        self._live[attempt.transfer_id] = attempt

    def set_state(self, transfer_id: str, state: str) -> None:
        if attempt := self._live.get(transfer_id):
            attempt.state = state

    def end(self, transfer_id: str) -> None:
        """The attempt is over on this node by itself; a late cancel finds nothing to do."""
        self._live.pop(transfer_id, None)
        self._some_ended.set()

    async def wait_empty(self) -> None:
        """Until no attempt lives here."""
        while self._live:
            self._some_ended.clear()
            await self._some_ended.wait()

    def cancel(self, transfer_id: str, *, is_cut_off: bool = False) -> None:
        """Stop the attempt if it is here, and refuse it if it comes later. As fast with many tombstones.

        `is_cut_off`: its output has not ended: its gateway is gone, or lets it go on elsewhere.
        """
        now, tombstones = self._clock(), self._tombstones
        tombstones[transfer_id] = now + TOMBSTONE_S
        tombstones.move_to_end(transfer_id)
        while len(tombstones) > MAX_TOMBSTONES or tombstones[next(iter(tombstones))] <= now:
            tombstones.popitem(last=False)
        if attempt := self._live.pop(transfer_id, None):
            attempt.stop(is_cut_off)
            self._some_ended.set()

    def cancel_gateway(self, gateway_id: str) -> int:
        """Stop all attempts of a gateway that is gone; returns their number."""
        mine = [attempt for attempt in self if attempt.gateway_id == gateway_id]
        for attempt in mine:
            self.cancel(attempt.transfer_id, is_cut_off=True)
        return len(mine)


class Outbox:
    """Collects the chunks of a step and sends them on `flush()`, one message per gateway."""

    def __init__(self, bus: Bus, node: NodeRef, attempts: Attempts) -> None:
        self._bus = bus
        self._node = node
        self._attempts = attempts
        self._chunks: defaultdict[str, list[TokenChunk]] = defaultdict(list)
        self._misses: defaultdict[str, int] = defaultdict(int)  # keepalives in a row that found nobody

    def add_chunk(self, gateway_id: str, chunk: TokenChunk) -> None:
        """Output that goes on where the last chunk has ended becomes one with it."""
        chunks = self._chunks[gateway_id]
        last = chunks[-1] if chunks and chunks[-1].token_ids and chunk.token_ids else None
        if last and (last.transfer_id, last.index + len(last.token_ids)) == (chunk.transfer_id, chunk.index):
            chunk = msgspec.structs.replace(
                chunks.pop(),
                token_ids=last.token_ids + chunk.token_ids,
                logprobs=last.logprobs + chunk.logprobs,
                finish_reason=chunk.finish_reason,
            )
        chunks.append(chunk)

    def add_failure(self, gateway_id: str, transfer_id: str, error: FlowKVError) -> None:
        """The attempt has failed here; what was sent before stays good."""
        chunk = TokenChunk(transfer_id=transfer_id, index=0, token_ids=[], error=error.to_wire())
        self._chunks[gateway_id].append(chunk)

    async def flush(self) -> None:
        """Publish what was added.

        What can't be sent in a long outage is lost here; gateways notice the gap and ask for it again.
        """
        chunks, self._chunks = self._chunks, defaultdict(list)
        for gateway_id, mine in chunks.items():
            try:
                await self._publish(gateway_id, mine)
            except FlowKVError as error:
                log.warning("tokens for %s are lost: %s", gateway_id, error.message)
            except Exception:  # of nats-py: no reason to end the node
                log.exception("tokens for %s are lost", gateway_id)

    async def _publish(self, gateway_id: str, chunks: list[TokenChunk]) -> None:
        """In several messages if one can't carry them: log probabilities of many sequences are long."""
        try:
            message = StepTokens(node_id=self._node.node_id, chunks=chunks)
            await self._bus.publish(subjects.tokens(gateway_id), message)
        except TooLarge:
            if len(chunks) == 1:
                raise
            middle = len(chunks) // 2
            await self._publish(gateway_id, chunks[:middle])
            await self._publish(gateway_id, chunks[middle:])

    async def keep_alive(self) -> None:
        """Until cancelled: show every gateway its attempts, drop those of gateways that are gone."""
        while True:
            states: defaultdict[str, dict[str, str]] = defaultdict(dict)
            for attempt in self._attempts:
                states[attempt.gateway_id][attempt.transfer_id] = attempt.state
            for gateway_id in self._misses.keys() - states.keys():
                del self._misses[gateway_id]  # it has not been asked since: in a row means in a row
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(asyncio.sleep(KEEPALIVE_PERIOD_S))
                for gateway_id, mine in states.items():
                    tasks.create_task(self._show_attempts(gateway_id, mine))

    async def _show_attempts(self, gateway_id: str, states: dict[str, str]) -> None:
        keepalive = Keepalive(node=self._node, states=states)
        subject = subjects.keepalive(gateway_id)
        try:
            reply = await self._bus.request(subject, keepalive, KeepaliveReply, timeout_s=KEEPALIVE_TIMEOUT_S)
        except (Unavailable, DeadlineExceeded) as error:
            if not self._bus.is_settled:
                self._misses.clear()  # cut off ourselves: no verdict on others (docs/architecture.md, rule 8)
                return
            self._misses[gateway_id] += 1
            if self._misses[gateway_id] < MISSES_UNTIL_GONE:
                return
            num = self._attempts.cancel_gateway(gateway_id)
            reason = "no responders" if isinstance(error, Unavailable) else str(error)
            log.warning("dropped %d requests of gateway %s: %s", num, gateway_id, reason)
        except FlowKVError as error:
            # A gateway that refuses lives; and a keepalive too large to be sent says nothing of it.
            log.warning("keepalive to %s: %s", gateway_id, error.message)
        else:
            for transfer_id in reply.unknown:
                self._attempts.cancel(transfer_id)  # a cancel was lost
        self._misses.pop(gateway_id, None)
