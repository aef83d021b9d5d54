"""What a node tells gateways: tokens, one message per step and gateway, and once a second a keepalive.

The keepalive is a request, so a gateway that is gone shows at once, and a gateway can say which attempts it
no longer wants, should a cancel have been lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict

from flowkv_common.bus.connection import Bus
from flowkv_common.errors import DeadlineExceeded, FlowKVError, TooLarge, Unavailable
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Keepalive, KeepaliveReply, NodeRef, StepTokens, TokenChunk
from flowkv_node.attempts import Attempts, Cause

log = logging.getLogger(__name__)

KEEPALIVE_PERIOD_S = 1.0
KEEPALIVE_TIMEOUT_S = 2.0
# A gateway is gone when two keepalives in a row found nobody; not while NATS itself is coming back.
MISSES_UNTIL_GONE = 2


class Outbox:
    """Collects the chunks of a step, sends them on `flush()`."""

    def __init__(self, bus: Bus, node: NodeRef, attempts: Attempts) -> None:
        self._bus = bus
        self._node = node
        self._attempts = attempts
        self._chunks: defaultdict[str, list[TokenChunk]] = defaultdict(list)
        self._misses: defaultdict[str, int] = defaultdict(int)

    def add(self, gateway_id: str, chunk: TokenChunk) -> None:
        self._chunks[gateway_id].append(chunk)

    async def flush(self) -> None:
        """Publish what was added, one message per gateway.

        What can't be sent in a long outage is lost here; gateways notice the gap and ask for it again.
        """
        chunks, self._chunks = self._chunks, defaultdict(list)
        for gateway_id, mine in chunks.items():
            try:
                await self._publish(gateway_id, mine)
            except FlowKVError as error:
                log.warning("tokens for %s are lost: %s", gateway_id, error.message)

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

    def fail(self, gateway_id: str, transfer_id: str, error: FlowKVError) -> None:
        """Add that the attempt has failed here; what was sent before stays good."""
        self.add(
            gateway_id, TokenChunk(transfer_id=transfer_id, index=0, token_ids=[], error=error.to_wire())
        )

    async def keep_alive(self) -> None:
        """Until cancelled: show every gateway its attempts, drop those of gateways that are gone."""
        while True:
            states = self._attempts.states_by_gateway()
            for gateway_id in self._misses.keys() - states.keys():
                del self._misses[gateway_id]  # it has not been asked since: in a row means in a row
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(asyncio.sleep(KEEPALIVE_PERIOD_S))
                for gateway_id, mine in states.items():
                    tasks.create_task(self._show(gateway_id, mine))

    async def _show(self, gateway_id: str, states: dict[str, str]) -> None:
        try:
            reply = await self._bus.request(
                subjects.keepalive(gateway_id),
                Keepalive(node=self._node, states=states),
                KeepaliveReply,
                timeout_s=KEEPALIVE_TIMEOUT_S,
            )
        except (Unavailable, DeadlineExceeded) as error:
            self._miss(gateway_id, error)
        except FlowKVError as error:
            # Whoever refuses lives; and what is too large to be sent says nothing of the gateway.
            self._misses.pop(gateway_id, None)
            log.warning("keepalive to %s: %s", gateway_id, error.message)
        else:
            self._misses.pop(gateway_id, None)
            for transfer_id in reply.unknown:
                self._attempts.cancel(transfer_id, Cause.UNWANTED)  # a cancel was lost

    def _miss(self, gateway_id: str, error: FlowKVError) -> None:
        if not self._bus.is_settled:
            self._misses.clear()  # cut off ourselves: no verdict on others (docs/architecture.md, rule 8)
            return
        self._misses[gateway_id] += 1
        if self._misses[gateway_id] >= MISSES_UNTIL_GONE:
            del self._misses[gateway_id]
            num = self._attempts.cancel_gateway(gateway_id)
            reason = "no responders" if isinstance(error, Unavailable) else str(error)
            log.warning("dropped %d requests of gateway %s: %s", num, gateway_id, reason)
