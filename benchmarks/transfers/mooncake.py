"""Mooncake's transfer engine over TCP, without a metadata server."""

from __future__ import annotations

from collections.abc import Sequence

from mooncake.engine import TransferEngine

from benchmarks.transfers.transports import Unavailable
from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.segments import Copy

_HOST = "127.0.0.1"
# Longer batches overrun its queue and fail.
_MAX_BATCH = 512


class Peer:
    """The sender writes batches of up to 512 copies."""

    def __init__(self, _: str, pool: KVPool) -> None:
        self._block_bytes = pool.layout.block_bytes
        self._base = pool.tensor.data_ptr()
        self._engine = TransferEngine()
        if self._engine.initialize(_HOST, "P2PHANDSHAKE", "tcp", ""):
            raise Unavailable("the engine does not start")
        if self._engine.register_memory(self._base, pool.num_bytes):
            raise Unavailable("the pool can't be registered")

    async def listen(self) -> tuple[str, int]:
        return f"{_HOST}:{self._engine.get_rpc_port()}", self._base

    async def connect(self, address: tuple[str, int]) -> None:
        self._session, self._peer_base = address

    async def send(self, copies: Sequence[Copy], one_by_one: bool) -> int:
        step = 1 if one_by_one else _MAX_BATCH
        batches = [copies[begin : begin + step] for begin in range(0, len(copies), step)]
        for batch in batches:
            self._write(batch)
        return len(batches)

    async def receive(self, copies: Sequence[Copy], one_by_one: bool) -> None:
        """Nothing to do: the engine's threads receive."""

    async def close(self) -> None:
        self._engine.unregister_memory(self._base)
        del self._engine

    def _write(self, copies: Sequence[Copy]) -> None:
        size = self._block_bytes
        failed = self._engine.batch_transfer_sync_write(
            self._session,
            [self._base + copy.src * size for copy in copies],
            [self._peer_base + copy.dst * size for copy in copies],
            [copy.length * size for copy in copies],
        )
        if failed:
            raise ConnectionError(f"Mooncake returned {failed}")
