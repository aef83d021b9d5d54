"""KV blocks over NIXL, NVIDIA's library: the receiver reads the sender's pool, by RDMA where there is a card.

NIXL leaves the way to UCX, and FlowKV only takes those on which the receiver reads by itself: the memory of a
process of this host, and RDMA. Elsewhere UCX would have the sender send, over TCP, and when a receiver dies
meanwhile that ends the sender's process ("Fatal: unexpected error: Endpoint timeout").

A read that has begun can't be taken back. So each is short, and none begins once its reservation is revoked.
One that does not end is ended with its agent, which is its connection's alone. The sender's blocks need no
lease: what was read out of blocks that it has lost is never committed (docs/architecture.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import importlib.metadata
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flowkv_common.errors import CannotStart, first_line
from flowkv_engine.transport.pull import PullConnector
from flowkv_engine.transport.stream import Channel, Frame, FrameError, Reply, finish_thread

_PACKAGES = ("nixl_cu13", "nixl_cu12")
# A sender's thread answers those who connect when UCX wakes it, and looks by itself after so long.
_LOOK_EVERY_US = 10_000
_FIRST_POLL_S = 10e-6
_LONGEST_POLL_S = 1e-3
_PROBE_BYTES = 64
# What UCX may use: to a process of this host it connects by TCP and reads it directly; else RDMA is left.
_TO_THIS_HOST: dict[str, str] = {}
_TO_OTHERS = {"engine_config": "TLS=^tcp"}


class NixlFailed(ConnectionError):
    """A read has failed, or what it takes to begin one. Another connection may work."""


class Library(NamedTuple):
    """The one of NIXL's packages that is installed."""

    bindings: Any
    version: str  # agents of different versions may not understand each other

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """All that it raises: they have no common base."""
        names = [name for name in dir(self.bindings) if name.startswith("nixl") and name.endswith("Error")]
        return tuple(getattr(self.bindings, name) for name in names)


def find_library() -> Library:
    """Raises CannotStart if there is none."""
    for package in _PACKAGES:
        with contextlib.suppress(ModuleNotFoundError):
            bindings = importlib.import_module(f"{package}._bindings")
            return Library(bindings, importlib.metadata.version(package.replace("_", "-")))
    raise CannotStart("NIXL is not installed: pip install 'flowkv[nixl]', or name other FLOWKV_CONNECTORS")


class ShownAgent(Frame, frozen=True, kw_only=True):
    """How to read the sender's pool, which begins at `address`. Whoever has it can: it is a secret.

    `nonce` lies at `nonce_address` of the process `pid`: whoever finds it there can read that process.
    """

    metadata: bytes
    address: int
    device: int
    pid: int
    nonce_address: int
    nonce: bytes
    version: str


@dataclass(eq=False)
class NixlConnector(PullConnector):
    name = "nixl"
    is_local = False
    step_bytes = 8 << 20  # so much may still be written after a reservation has ended, and is waited for

    library: Library = field(default_factory=find_library, kw_only=True)
    _own: ShownPool | None = field(default=None, init=False)
    _opening: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    async def __aexit__(self, *error: object) -> None:
        try:
            await super().__aexit__(*error)
        finally:
            if self._own is not None:
                await asyncio.to_thread(self._own.close)

    async def show_pool(self, channel: Channel) -> None:
        async with self._opening:
            if self._own is None:
                self._own = await asyncio.to_thread(ShownPool, self.library, self.pool.tensor)
        await channel.send_frame(self._own.shown)

    async def open_pool(self, channel: Channel, num_bytes: int) -> ReadPool:
        shown = await channel.receive_frame(ShownAgent)
        if shown.version != self.library.version:
            reason = f"NIXL versions differ: receiver {self.library.version}, sender {shown.version}"
            await channel.send_frame(Reply(error=reason))
            raise FrameError(reason)
        opened = asyncio.get_running_loop().run_in_executor(
            None, ReadPool, self.library, shown, num_bytes, self.pool.tensor, self.io_timeout_s
        )
        try:
            return await finish_thread(opened, lambda: None)
        except NixlFailed as error:
            await channel.send_frame(Reply(error=str(error)))
            raise


class Agent:
    """One of NIXL's agents, with the memory that it reads into, or that others read. Raises `NixlFailed`.

    By NIXL's bindings: the thread of its Python class would poll without a pause.
    """

    def __init__(self, library: Library, ucx: dict[str, str], *tensors: torch.Tensor, is_read: bool) -> None:
        self._library = library
        self._kind = library.bindings.VRAM_SEG if tensors[0].is_cuda else library.bindings.DRAM_SEG
        self.device = max(0, tensors[0].get_device())  # that of host memory is -1
        config = library.bindings.nixlAgentConfig()
        config.useProgThread = is_read
        config.pthrDelay = _LOOK_EVERY_US
        config.syncMode = library.bindings.NIXL_THREAD_SYNC_STRICT
        spans = [(tensor.data_ptr(), tensor.nbytes, self.device, "") for tensor in tensors]
        with self._failures():
            self._agent = library.bindings.nixlAgent(f"flowkv-{secrets.token_hex(8)}", config)
            self._agent.createBackend("UCX", ucx)
            self._agent.registerMem(library.bindings.nixlRegDList(self._kind, spans))

    def metadata(self) -> bytes:
        """What another agent needs to read the memory of this one."""
        with self._failures():
            return bytes(self._agent.getLocalMD())

    def add_peer(self, metadata: bytes) -> bytes:
        """The name of the peer that they are of."""
        with self._failures():
            return bytes(self._agent.loadRemoteMD(metadata))

    def begin_read(self, peer: bytes, device: int, src: int, dst: int, num_bytes: int) -> int:
        """Reads from the peer's address `src` to ours `dst`. The handle is to be asked `has_ended`."""
        make_list = self._library.bindings.nixlXferDList
        ours = make_list(self._kind, [(dst, num_bytes, self.device)])
        theirs = make_list(self._kind, [(src, num_bytes, device)])
        with self._failures():
            handle = int(self._agent.createXferReq(self._library.bindings.NIXL_READ, ours, theirs, peer))
            self._agent.postXferReq(handle)
            return handle

    def has_ended(self, handle: int) -> bool:
        """Whether all of it was read; then the handle is no more."""
        with self._failures():
            if self._agent.getXferStatus(handle) == self._library.bindings.NIXL_IN_PROG:
                return False
            self._agent.releaseXferReq(handle)
            return True

    def close(self) -> None:
        """What was under way has ended then, or never will. Idempotent."""
        self._agent = None

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except self._library.errors as error:
            raise NixlFailed(f"NIXL: {first_line(error)}") from error


class ShownPool:
    """The pool that peers read; the agent's thread answers them when they connect."""

    def __init__(self, library: Library, pool: torch.Tensor) -> None:
        self._agent = Agent(library, _TO_THIS_HOST, pool, is_read=True)
        nonce = secrets.token_bytes(16)
        self._nonce = ctypes.create_string_buffer(nonce, len(nonce))
        self.shown = ShownAgent(
            metadata=self._agent.metadata(),
            address=pool.data_ptr(),
            device=self._agent.device,
            pid=os.getpid(),
            nonce_address=ctypes.addressof(self._nonce),
            nonce=nonce,
            version=library.version,
        )

    def close(self) -> None:
        self._agent.close()


class ReadPool:
    """A `PeerPool` that is read from; its first bytes have been when it is made, so the way works.

    Raises `NixlFailed`. Then no read is left, and there will be no other.
    """

    def __init__(
        self, library: Library, shown: ShownAgent, num_bytes: int, target: torch.Tensor, io_timeout_s: float
    ) -> None:
        self._shown = shown
        self._num_bytes = num_bytes
        self._target = target.data_ptr()
        self._io_timeout_s = io_timeout_s
        self._reading: list[int] = []  # handles of reads that have begun
        scratch = torch.zeros(_PROBE_BYTES, dtype=torch.uint8, device=target.device)
        is_readable = not target.is_cuda and can_read(shown.pid, shown.nonce_address, shown.nonce)
        if not is_readable and not has_rdma():
            reason = "there is no RDMA, and the sender's memory can't be read: its process is on another host"
            raise NixlFailed(f"{reason}, in another PID namespace, another user's, or its pool is on a GPU")
        ucx = _TO_THIS_HOST if is_readable else _TO_OTHERS
        self._agent: Agent | None = Agent(library, ucx, target, scratch, is_read=False)
        self._peer = self._agent.add_peer(shown.metadata)
        self._read(0, scratch.data_ptr(), min(num_bytes, _PROBE_BYTES))
        self.settle()

    def copy(self, src: int, dst: int, num_bytes: int) -> None:
        if not 0 <= src <= self._num_bytes - num_bytes:
            raise NixlFailed(f"{num_bytes} bytes from {src} on are outside a pool of {self._num_bytes}")
        self._read(src, self._target + dst, num_bytes)

    def settle(self) -> None:
        ends_at = time.monotonic() + self._io_timeout_s
        pause_s = _FIRST_POLL_S
        while self._reading:
            with self._closing_on_failure() as agent:
                if agent.has_ended(self._reading[-1]):
                    self._reading.pop()
                    continue
                if time.monotonic() > ends_at:
                    raise NixlFailed(f"a read has not ended within {self._io_timeout_s} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_POLL_S)

    def close(self) -> None:
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    def _read(self, src: int, address: int, num_bytes: int) -> None:
        with self._closing_on_failure() as agent:
            handle = agent.begin_read(
                self._peer, self._shown.device, self._shown.address + src, address, num_bytes
            )
            self._reading.append(handle)

    @contextlib.contextmanager
    def _closing_on_failure(self) -> Iterator[Agent]:
        if self._agent is None:
            raise NixlFailed("the connection to the peer's pool has failed")
        try:
            yield self._agent
        except NixlFailed:
            self._reading.clear()
            self.close()
            raise


def has_rdma() -> bool:
    """Whether this host has a card for it."""
    return any(Path("/sys/class/infiniband").glob("*"))


class _Span(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("num_bytes", ctypes.c_size_t)]


def can_read(pid: int, address: int, expected: bytes) -> bool:
    """Whether this process can read memory of that one, where these bytes are expected.

    As UCX will: it needs one PID namespace and the right to trace. No other process has the bytes there.
    """
    found = ctypes.create_string_buffer(len(expected))
    ours, theirs = _Span(ctypes.addressof(found), len(expected)), _Span(address, len(expected))
    call = ctypes.CDLL(None, use_errno=True).process_vm_readv
    num_read = call(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
    return num_read == len(expected) and found.raw == expected
