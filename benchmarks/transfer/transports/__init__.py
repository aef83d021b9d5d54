"""What moves the bytes: FlowKV's connectors and the libraries they are measured beside, behind one face."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.segments import Copy


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


_MODULES = {
    "shm": "connectors",
    "tcp": "connectors",
    "gloo": "gloo",
    "nixl": "nixl",
    "nixl-tcp": "nixl",
    "mooncake": "mooncake",
}
TRANSPORTS = tuple(_MODULES)


def make_transport(name: str, pool: KVPool) -> Transport:
    """Raises `Unavailable` if its library can't be imported here."""
    try:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    except ImportError as error:
        raise Unavailable(f"can't be imported: {error}") from error
    transport: Transport = module.make(name, pool)
    return transport
