"""Memory of other processes by NIXL, NVIDIA's library: read by RDMA where there is a card.

NIXL leaves the way to UCX, and FlowKV only takes those on which the reader reads by itself: the memory of a
process of this host, and RDMA. Elsewhere UCX would have the other side send, over TCP, and when a reader dies
meanwhile that ends the other side's process ("Fatal: unexpected error: Endpoint timeout").
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flowkv_common.errors import CannotStart, first_line
from flowkv_engine.transport.stream import Frame

_PACKAGES = ("nixl_cu13", "nixl_cu12")
# The thread of memory that is read answers peers that connect when UCX wakes it, and looks after so long.
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

    def kind_of_memory(self, is_on_gpu: bool) -> Any:
        """NIXL's name for it."""
        return self.bindings.VRAM_SEG if is_on_gpu else self.bindings.DRAM_SEG

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
    """How to read the sender's memory, which begins at `address`. Whoever has it can: it is a secret.

    `nonce` lies at `nonce_address` of the process `pid`: whoever finds it there can read that process.
    Without `metadata` nothing can be read. A sender that `can_stage` shows buffers when its pool is refused.
    """

    metadata: bytes
    address: int
    device: int
    pid: int
    nonce_address: int
    nonce: bytes
    version: str
    can_stage: bool = False


def show_nothing(version: str) -> ShownAgent:
    """What a sender that stages shows, if its pool can't be registered."""
    return ShownAgent(
        metadata=b"",
        address=0,
        device=0,
        pid=0,
        nonce_address=0,
        nonce=b"",
        version=version,
        can_stage=True,
    )


class Source(NamedTuple):
    """What a peer shows, with what is known of it besides."""

    shown: ShownAgent
    num_bytes: int
    is_on_gpu: bool


class Agent:
    """One of NIXL's agents, with the memory that it reads into, or that others read. Raises `NixlFailed`.

    By NIXL's bindings: the thread of its Python class would poll without a pause.
    """

    def __init__(self, library: Library, ucx: dict[str, str], *tensors: torch.Tensor, is_read: bool) -> None:
        self._library = library
        self._kind = library.kind_of_memory(tensors[0].is_cuda)
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

    def begin_read(self, peer: bytes, source: Source, src: int, dst: int, num_bytes: int) -> int:
        """Reads from byte `src` of the peer's memory on to our address `dst`; its handle for `has_ended`."""
        make_list = self._library.bindings.nixlXferDList
        ours = make_list(self._kind, [(dst, num_bytes, self.device)])
        theirs_kind = self._library.kind_of_memory(source.is_on_gpu)
        theirs = make_list(theirs_kind, [(source.shown.address + src, num_bytes, source.shown.device)])
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


class ShownMemory:
    """Memory that peers read; the agent's thread answers them when they connect. Raises `NixlFailed`."""

    def __init__(self, library: Library, memory: torch.Tensor) -> None:
        self._agent = Agent(library, _TO_THIS_HOST, memory, is_read=True)
        nonce = secrets.token_bytes(16)
        self._nonce = ctypes.create_string_buffer(nonce, len(nonce))
        self.shown = ShownAgent(
            metadata=self._agent.metadata(),
            address=memory.data_ptr(),
            device=self._agent.device,
            pid=os.getpid(),
            nonce_address=ctypes.addressof(self._nonce),
            nonce=nonce,
            version=library.version,
        )

    def close(self) -> None:
        self._agent.close()


class PeerMemory:
    """A `PeerPool` that is read from, into `target`; its first bytes have been when it is made.

    So the way works. Raises `NixlFailed`. Then no read is left, and there will be no other.
    """

    def __init__(
        self,
        library: Library,
        source: Source,
        target: torch.Tensor,
        io_timeout_s: float,
        probe_timeout_s: float,
    ) -> None:
        shown = source.shown
        self._source = source
        self._target = target.data_ptr()
        self._io_timeout_s = io_timeout_s
        self._reading: list[int] = []  # handles of reads that have begun
        scratch = torch.zeros(_PROBE_BYTES, dtype=torch.uint8, device=target.device)
        is_in_host_memory = not (source.is_on_gpu or target.is_cuda)
        is_readable = is_in_host_memory and can_read(shown.pid, shown.nonce_address, shown.nonce)
        if not is_readable and not has_rdma():
            reason = "there is no RDMA, and the sender's memory can't be read: its process is on another host"
            raise NixlFailed(f"{reason}, in another PID namespace, another user's, or a pool is on a GPU")
        ucx = _TO_THIS_HOST if is_readable else _TO_OTHERS
        self._agent: Agent | None = Agent(library, ucx, target, scratch, is_read=False)
        self._peer = self._agent.add_peer(shown.metadata)
        self._read(0, scratch.data_ptr(), min(source.num_bytes, _PROBE_BYTES))
        self._settle(probe_timeout_s)

    def copy(self, src: int, dst: int, num_bytes: int) -> None:
        if not 0 <= src <= self._source.num_bytes - num_bytes:
            raise NixlFailed(f"{num_bytes} bytes from {src} on are outside {self._source.num_bytes} bytes")
        self._read(src, self._target + dst, num_bytes)

    def settle(self) -> None:
        self._settle(self._io_timeout_s)

    def _settle(self, timeout_s: float) -> None:
        ends_at = time.monotonic() + timeout_s
        pause_s = _FIRST_POLL_S
        while self._reading:
            with self._closing_on_failure() as agent:
                if agent.has_ended(self._reading[-1]):
                    self._reading.pop()
                    continue
                if time.monotonic() > ends_at:
                    raise NixlFailed(f"a read has not ended within {timeout_s:.2g} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_POLL_S)

    def close(self) -> None:
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    def _read(self, src: int, address: int, num_bytes: int) -> None:
        with self._closing_on_failure() as agent:
            self._reading.append(agent.begin_read(self._peer, self._source, src, address, num_bytes))

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
