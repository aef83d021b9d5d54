"""NIXL over UCX, with its progress threads off: they spin, and two cores are few."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

import numpy as np
from nixl_cu12._api import nixl_agent, nixl_agent_config

from benchmarks.transfers.transports import Unavailable
from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.segments import Copy

_DONE = b"done"
_TIMEOUT_S = 120.0


class Peer:
    """The sender writes with one descriptor list per batch. `nixl` lets UCX choose, `nixl-tcp` does not."""

    def __init__(self, name: str, pool: KVPool) -> None:
        if name == "nixl-tcp":
            os.environ["UCX_TLS"] = "tcp"
        else:
            os.environ.pop("UCX_TLS", None)
        self._block_bytes = pool.layout.block_bytes
        self._base = pool.tensor.data_ptr()
        self._agent = nixl_agent(
            f"{name}-{os.getpid()}", nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        )
        self._memory = self._agent.register_memory([(self._base, pool.num_bytes, 0, "")], "DRAM")
        if self._memory is None:
            raise Unavailable("the pool can't be registered")

    async def listen(self) -> tuple[bytes, int]:
        return self._agent.get_agent_metadata(), self._base

    async def connect(self, address: tuple[bytes, int]) -> None:
        metadata, self._peer_base = address
        self._peer = self._agent.add_remote_agent(metadata)

    async def send(self, copies: Sequence[Copy], one_by_one: bool) -> int:
        parts = [[copy] for copy in copies] if one_by_one else [copies]
        for number, part in enumerate(parts, start=1):
            self._write(part, _DONE if number == len(parts) else b"")
        return len(parts)

    async def receive(self, copies: Sequence[Copy], one_by_one: bool) -> None:
        for _ in _spin():
            if any(_DONE in notes for notes in self._agent.get_new_notifs().values()):
                return

    async def close(self) -> None:
        self._agent.deregister_memory(self._memory)
        del self._agent

    def _write(self, copies: Sequence[Copy], note: bytes) -> None:
        table = np.array(copies, dtype=np.uint64) * self._block_bytes  # [num_copies, (src, dst, length)]
        device = np.zeros(len(copies), dtype=np.uint64)
        local = np.stack([table[:, 0] + self._base, table[:, 2], device], axis=1)
        remote = np.stack([table[:, 1] + self._peer_base, table[:, 2], device], axis=1)
        handle = self._agent.initialize_xfer(
            "WRITE",
            self._agent.get_xfer_descs(local, "DRAM"),
            self._agent.get_xfer_descs(remote, "DRAM"),
            self._peer,
            note,
        )
        state = self._agent.transfer(handle)
        for _ in _spin():
            if state != "PROC":
                break
            state = self._agent.check_xfer_state(handle)
        self._agent.release_xfer_handle(handle)
        if state != "DONE":
            raise ConnectionError(f"NIXL ended in state {state}")


def _spin() -> Iterator[None]:
    """Without a progress thread nothing moves unless somebody asks. Raises `TimeoutError`."""
    ends_at = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < ends_at:
        yield
    raise TimeoutError("NIXL made no end")
