"""KV blocks between two pools of one process: what a connector promises, without a transport."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from flowkv_common.errors import BadRequest, FlowKVError, Stale, TransferFailed
from flowkv_common.wire.messages import Run
from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.reservations import Reservations
from flowkv_engine.kv.segments import Copy, ids_of
from flowkv_engine.transport.base import ConnectorUnavailable, KVLink, TransferStats, find_stray


class Switchboard:
    """Who listens where. Connectors that share one can reach each other."""

    def __init__(self) -> None:
        self.listening: dict[str, InProcessConnector] = {}
        self.numbers = itertools.count(1)

    def find(self, address: str) -> InProcessConnector:
        """Raises `ConnectorUnavailable`."""
        if address not in self.listening:
            raise ConnectorUnavailable(f"nobody listens at {address}")
        return self.listening[address]


class InProcessConnector:
    """Both ends in one event loop."""

    name = "inprocess"
    connect_timeout_s = 1.0

    def __init__(
        self,
        pool: KVPool,
        reservations: Reservations,
        admits: Callable[[str], bool],
        switchboard: Switchboard,
    ) -> None:
        self.pool = pool
        self._reservations = reservations
        self._admits = admits
        self._switchboard = switchboard

    async def listen(self) -> str:
        address = f"inprocess-{next(self._switchboard.numbers)}"
        self._switchboard.listening[address] = self
        return address

    async def connect(self, address: str, token: str, num_blocks: int) -> KVLink:
        self._switchboard.find(address).greet(token, self.pool)
        return InProcessLink(self.pool, address, self._switchboard)

    def greet(self, token: str, sender: KVPool) -> None:
        """Raises `ConnectorUnavailable` if `sender` may not send here."""
        if not self._admits(token):
            raise ConnectorUnavailable("wrong link token")
        if sender.layout != self.pool.layout:
            raise ConnectorUnavailable(
                f"layouts differ: receiver {self.pool.layout!r}, sender {sender.layout!r}"
            )

    async def receive(self, transfer_id: str, token: str, source: KVPool, copies: Sequence[Copy]) -> None:
        """Copies, as long as the reservation stands. Raises `Stale` or `BadRequest`."""
        if stray := find_stray(copies, source.num_blocks, self.pool.num_blocks):
            raise BadRequest(f"{stray} is outside the pools")
        dst_blocks = ids_of(Run(copy.dst, copy.length) for copy in copies)
        with self._reservations.copying(transfer_id, token, dst_blocks) as reservation:
            for src, dst, length in copies:
                await asyncio.sleep(0)  # where a cancel or a revocation gets its turn
                if reservation.revoked:
                    raise Stale(f"the reservation of transfer {transfer_id} has ended")
                self.pool.bytes_of(Run(dst, length))[:] = source.bytes_of(Run(src, length))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for address, connector in list(self._switchboard.listening.items()):
            if connector is self:
                del self._switchboard.listening[address]


class InProcessLink:
    """A `KVLink` to whoever listens at `address` when it sends."""

    name = "inprocess"

    def __init__(self, pool: KVPool, address: str, switchboard: Switchboard) -> None:
        self.closed = False
        self._pool = pool
        self._address = address
        self._switchboard = switchboard
        self._turn = asyncio.Lock()

    @property
    def is_lost(self) -> bool:
        return self._address not in self._switchboard.listening

    async def send_blocks(self, transfer_id: str, token: str, copies: Sequence[Copy]) -> TransferStats:
        async with self._turn:
            if self.closed:
                raise TransferFailed("inprocess: the link is closed")
            try:
                peer = self._switchboard.find(self._address)
                await peer.receive(transfer_id, token, self._pool, copies)
            except (ConnectorUnavailable, FlowKVError) as error:
                raise TransferFailed(f"inprocess: {error}") from error
        return TransferStats(
            num_bytes=sum(copy.length for copy in copies) * self._pool.layout.block_bytes,
            num_copies=len(copies),
            num_calls=len(copies),
        )

    async def close(self) -> None:
        self.closed = True
        async with self._turn:
            pass  # the transfer under way has ended
