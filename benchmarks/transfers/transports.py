"""What moves the bytes: FlowKV's connectors and the libraries beside them, behind one interface."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.transfers.staged import make_staged
from flowkv_common.errors import CannotStart
from flowkv_engine.kv.blocks import Blocks
from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.reservations import Reservation, Reservations
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport import make_connectors
from flowkv_engine.transport.base import KVConnector, KVLink
from flowkv_engine.transport.sockets import LOOPBACK, Place
from flowkv_engine.transport.tls import Tls

TIMEOUT_S = 120.0


class Unavailable(Exception):
    """This transport can't be had here; the message says why."""


class Transport(Protocol):
    """One side of one transport over one pool. A receiver listens, a sender connects."""

    def __init__(self, name: str, pool: KVPool) -> None: ...

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


class Connector:
    """FlowKV's own: a `send` is one `KVLink.send_blocks`, or one per copy.

    `tls` is `tcp` with TLS; `tcp-staged` and `nixl-staged` go by way of host memory, as for pools on GPUs.
    """

    _link: KVLink

    def __init__(self, name: str, pool: KVPool) -> None:
        self._name = name
        self._pool = pool
        self._lifetime = contextlib.AsyncExitStack()

    async def listen(self) -> tuple[str, str]:
        folder = Path(self._lifetime.enter_context(tempfile.TemporaryDirectory(prefix="flowkv-bench-")))
        if self._name == "tls":
            from flowkv.authority import make_certificates

            make_certificates(folder)
        return await (await self._open(folder)).listen(), str(folder)

    async def connect(self, address: tuple[str, str]) -> None:
        listener, folder = address
        connector = await self._open(Path(folder))
        self._link = await connector.connect(listener, "", self._pool.num_blocks)

    async def _open(self, certificates: Path) -> KVConnector:
        name, place = self._name, LOOPBACK
        if name == "tls":
            files = [str(certificates / file) for file in ("node.pem", "node.key", "ca.pem")]
            name, place = "tcp", Place(tls=Tls(*files))
        try:
            reservations = Unguarded(Blocks(0))
            if name.endswith("-staged"):
                connector = make_staged(name.removesuffix("-staged"), self._pool, reservations)
            else:
                [connector] = make_connectors([name], self._pool, reservations, lambda _: True, place=place)
        except CannotStart as error:
            raise Unavailable(str(error)) from error
        return await self._lifetime.enter_async_context(connector)

    async def send(self, copies: Sequence[Copy], one_by_one: bool) -> int:
        parts = [[copy] for copy in copies] if one_by_one else [copies]
        return sum([(await self._link.send_blocks("bench.1", "", part)).num_calls for part in parts])

    async def receive(self, copies: Sequence[Copy], one_by_one: bool) -> None:
        """Nothing to do: the connector serves."""

    async def close(self) -> None:
        await self._lifetime.aclose()


class Gloo:
    """Its send and recv between two ranks, up to 256 in flight: the paper's calls per block on a CPU."""

    RECEIVER, SENDER = 0, 1
    MAX_IN_FLIGHT = 256

    def __init__(self, _: str, pool: KVPool) -> None:
        self._block_bytes = pool.layout.block_bytes
        self._bytes = pool.tensor.view(torch.uint8).flatten()  # [num_bytes]
        self._joining: asyncio.Task[None] | None = None
        self._lifetime = contextlib.ExitStack()

    async def listen(self) -> str:
        folder = self._lifetime.enter_context(tempfile.TemporaryDirectory(prefix="flowkv-bench-"))
        path = str(Path(folder, "store"))
        self._joining = asyncio.create_task(asyncio.to_thread(self._join, path, self.RECEIVER))
        return path

    async def connect(self, path: str) -> None:
        await asyncio.to_thread(self._join, path, self.SENDER)

    async def send(self, copies: Sequence[Copy], one_by_one: bool) -> int:
        runs = [(copy.src, copy.length) for copy in copies]
        self._exchange(dist.isend, runs, self.RECEIVER, one_by_one)
        return len(copies)

    async def receive(self, copies: Sequence[Copy], one_by_one: bool) -> None:
        if self._joining is not None:
            await self._joining
        runs = [(copy.dst, copy.length) for copy in copies]
        self._exchange(dist.irecv, runs, self.SENDER, one_by_one)

    async def close(self) -> None:
        if self._joining is not None:
            await self._joining
        dist.destroy_process_group()
        self._lifetime.close()

    def _join(self, path: str, rank: int) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        timeout = datetime.timedelta(seconds=TIMEOUT_S)
        dist.init_process_group(
            "gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=timeout
        )

    def _exchange(
        self, start: Callable[..., Any], runs: Sequence[tuple[int, int]], peer: int, one_by_one: bool
    ) -> None:
        size, step = self._block_bytes, 1 if one_by_one else self.MAX_IN_FLIGHT
        views = [self._bytes[block * size : (block + length) * size] for block, length in runs]
        for begin in range(0, len(views), step):
            for work in [start(view, peer) for view in views[begin : begin + step]]:
                work.wait()


def set_ucx_transports(name: str) -> None:
    """For what begins to use UCX from now on."""
    if name.endswith("-tcp"):
        os.environ["UCX_TLS"] = "tcp"
    else:
        os.environ.pop("UCX_TLS", None)


class Nixl:
    """NIXL without FlowKV's connector: writes with one descriptor list per batch.

    `nixl-alone` lets UCX choose its way, `nixl-alone-tcp` does not. No progress threads: two cores are few.
    """

    DONE = b"done"

    def __init__(self, name: str, pool: KVPool) -> None:
        set_ucx_transports(name)
        from nixl_cu12._api import nixl_agent, nixl_agent_config

        self._block_bytes = pool.layout.block_bytes
        self._base = pool.tensor.data_ptr()
        config = nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self._agent = nixl_agent(f"{name}-{os.getpid()}", config)
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
            self._write(part, self.DONE if number == len(parts) else b"")
        return len(parts)

    async def receive(self, copies: Sequence[Copy], one_by_one: bool) -> None:
        for _ in self._spin():
            if any(self.DONE in notes for notes in self._agent.get_new_notifs().values()):
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
        for _ in self._spin():
            if state != "PROC":
                break
            state = self._agent.check_xfer_state(handle)
        self._agent.release_xfer_handle(handle)
        if state != "DONE":
            raise ConnectionError(f"NIXL ended in state {state}")

    def _spin(self) -> Iterator[None]:
        """Without a progress thread nothing moves unless somebody asks. Raises TimeoutError."""
        ends_at = time.monotonic() + TIMEOUT_S
        while time.monotonic() < ends_at:
            yield
        raise TimeoutError("NIXL made no end")


class Mooncake:
    """Its transfer engine over TCP, without a metadata server: writes batches of up to 512 copies."""

    HOST = "127.0.0.1"
    MAX_BATCH = 512  # longer ones overrun its queue and fail

    def __init__(self, _: str, pool: KVPool) -> None:
        from mooncake.engine import TransferEngine

        self._block_bytes = pool.layout.block_bytes
        self._base = pool.tensor.data_ptr()
        self._engine = TransferEngine()
        if self._engine.initialize(self.HOST, "P2PHANDSHAKE", "tcp", ""):
            raise Unavailable("the engine does not start")
        if self._engine.register_memory(self._base, pool.num_bytes):
            raise Unavailable("the pool can't be registered")

    async def listen(self) -> tuple[str, int]:
        return f"{self.HOST}:{self._engine.get_rpc_port()}", self._base

    async def connect(self, address: tuple[str, int]) -> None:
        self._session, self._peer_base = address

    async def send(self, copies: Sequence[Copy], one_by_one: bool) -> int:
        size, step = self._block_bytes, 1 if one_by_one else self.MAX_BATCH
        batches = [copies[begin : begin + step] for begin in range(0, len(copies), step)]
        for batch in batches:
            failed = self._engine.batch_transfer_sync_write(
                self._session,
                [self._base + copy.src * size for copy in batch],
                [self._peer_base + copy.dst * size for copy in batch],
                [copy.length * size for copy in batch],
            )
            if failed:
                raise ConnectionError(f"Mooncake returned {failed}")
        return len(batches)

    async def receive(self, copies: Sequence[Copy], one_by_one: bool) -> None:
        """Nothing to do: the engine's threads receive."""

    async def close(self) -> None:
        self._engine.unregister_memory(self._base)
        del self._engine


TRANSPORTS: dict[str, type[Transport]] = {
    "shm": Connector,
    "tcp": Connector,
    "tls": Connector,
    "tcp-staged": Connector,
    "nixl": Connector,
    "nixl-staged": Connector,
    "gloo": Gloo,
    "nixl-alone": Nixl,
    "nixl-alone-tcp": Nixl,
    "mooncake": Mooncake,
}
