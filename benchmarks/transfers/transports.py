"""What moves the bytes: FlowKV's connectors and the libraries beside them, behind one interface."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from flowkv_engine.kv.blocks import Blocks
from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.reservations import Reservation, Reservations
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport import make_connectors
from flowkv_engine.transport.base import KVLink


class Unavailable(Exception):
    """This transport can't be had here; the message says why."""


class Transport(Protocol):
    """One side of one transport over one pool. A receiver listens, a sender connects."""

    async def listen(self) -> Any:
        """Begins to serve; returns what the sender needs to connect."""

    async def connect(self, address: Any) -> None: ...

    async def send(self, copies: Sequence[Copy], one_by_one: bool) -> int:
        """Moves the bytes and returns the calls made; `one_by_one` waits for each copy before the next."""

    async def receive(self, copies: Sequence[Copy], one_by_one: bool) -> None:
        """The receiver's part in `send`, where it has one: returns when all bytes have landed."""

    async def close(self) -> None: ...


class Unguarded(Reservations):
    """Any block may be written at any time. The product's check is one set comparison per transfer."""

    @contextlib.contextmanager
    def copying(self, transfer_id: str, token: str, dst_blocks: Sequence[int]) -> Iterator[Reservation]:
        yield Reservation(transfer_id, token, list(dst_blocks), num_cached_blocks=0, expires_at=math.inf)


class ConnectorTransport:
    """FlowKV's own connectors: a `send` is one `KVLink.send_blocks`, or one per copy."""

    _link: KVLink

    def __init__(self, name: str, pool: KVPool) -> None:
        self._num_blocks = pool.num_blocks
        self._lifetime = contextlib.AsyncExitStack()
        (self._connector,) = make_connectors([name], pool, Unguarded(Blocks(0)), lambda _: True)

    async def listen(self) -> str:
        await self._lifetime.enter_async_context(self._connector)
        return await self._connector.listen()

    async def connect(self, address: str) -> None:
        await self._lifetime.enter_async_context(self._connector)
        self._link = await self._connector.connect(address, "", self._num_blocks)

    async def send(self, copies: Sequence[Copy], one_by_one: bool) -> int:
        parts = [[copy] for copy in copies] if one_by_one else [copies]
        return sum([(await self._link.send_blocks("bench.1", "", part)).num_calls for part in parts])

    async def receive(self, copies: Sequence[Copy], one_by_one: bool) -> None:
        """Nothing to do: the connector serves."""

    async def close(self) -> None:
        await self._lifetime.aclose()


# Modules here, each with a class `Peer`; without one it is a connector.
PEERS = {"gloo": "gloo", "nixl": "nixl", "nixl-tcp": "nixl", "mooncake": "mooncake"}
TRANSPORTS = ("shm", "tcp", *PEERS)


def make_transport(name: str, pool: KVPool) -> Transport:
    """Raises `Unavailable` if its library can't be imported here."""
    if name not in PEERS:
        return ConnectorTransport(name, pool)
    try:
        module = importlib.import_module(f"benchmarks.transfers.{PEERS[name]}")
    except ImportError as error:
        raise Unavailable(f"can't be imported: {error}") from error
    transport: Transport = module.Peer(name, pool)
    return transport
