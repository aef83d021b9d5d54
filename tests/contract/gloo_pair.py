"""A communicator of two ranks on CPUs, in the part of NCCL: ids, order, blocking joins, aborts."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch
import torch.distributed

from flowkv_engine.transport.nccl import RECEIVER, SENDER, NcclFailed, Span

# Its type stubs lack most of what is used here.
_distributed: Any = torch.distributed

_TIMEOUT = datetime.timedelta(seconds=10)


class UniqueId(msgspec.Struct):
    """Where the ranks meet, and the loopback address that is theirs alone."""

    port: int
    host: str


class GlooPair:
    """An `NcclBackend` over host memory."""

    version = "gloo"

    def __init__(self) -> None:
        self._byte = ctypes.create_string_buffer(1)
        self.scratch = Span(ctypes.addressof(self._byte), 1)
        self._group: Any = None  # of `ProcessGroupGloo`, while joined
        self._waiters: list[Waiter] = []

    def get_unique_id(self) -> bytes:
        self._store = _distributed.TCPStore(
            "127.0.0.1", 0, 2, is_master=True, timeout=_TIMEOUT, wait_for_workers=False
        )
        host = ".".join(["127", *(str(1 + secrets.randbelow(254)) for _ in range(3))])
        return msgspec.json.encode(UniqueId(port=self._store.port, host=host))

    def init(self, unique_id: bytes, rank: int) -> None:
        joined = msgspec.json.decode(unique_id, type=UniqueId)
        self._host, self._rank = joined.host, rank
        options = _distributed.ProcessGroupGloo._Options()
        options._devices = [_distributed.ProcessGroupGloo.create_device(hostname=joined.host)]
        options._timeout = _TIMEOUT
        with _failures():
            if rank == RECEIVER:
                self._store = _distributed.TCPStore(
                    "127.0.0.1", joined.port, 2, timeout=_TIMEOUT, wait_for_workers=False
                )
            self._group = _distributed.ProcessGroupGloo(self._store, rank, 2, options)

    def exchange(self, spans: Sequence[Span]) -> None:
        if self._group is None:
            raise NcclFailed("aborted")
        move = self._group.send if self._rank == SENDER else self._group.recv
        with _failures():
            works = [move([_tensor(address, num_bytes)], 1 - self._rank, 0) for address, num_bytes in spans]
        self._waiters = [Waiter(works)]

    def poll(self) -> bool:
        return all(waiter.has_ended() for waiter in self._waiters)

    def abort(self) -> None:
        """Cuts the connection: gloo has no abort of its own, and writes nothing without one."""
        if self._group is None:
            return
        self._group = None
        ends_at = time.monotonic() + 5
        while _cut_all(self._host):
            if time.monotonic() > ends_at:
                raise NcclFailed("a connection could not be cut")
            time.sleep(1e-3)


class Waiter:
    """Waits for gloo's works in a thread of its own: they tell nobody who does not wait that they ended."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works
        self._error: RuntimeError | None = None
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def has_ended(self) -> bool:
        """Raises `NcclFailed` if it ended badly."""
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise NcclFailed(str(self._error)) from self._error
        return True

    def _wait(self) -> None:
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            self._error = error


def _tensor(address: int, num_bytes: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)


def _cut_all(host: str) -> int:
    """Shuts this process's connections to or from `host` down; returns how many there were."""
    num_cut = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # others close theirs meanwhile, and listeners have no peer
            if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(fd))) as sock:
                if sock.family == socket.AF_INET and host in (sock.getsockname()[0], sock.getpeername()[0]):
                    num_cut += 1
                    sock.shutdown(socket.SHUT_RDWR)
    return num_cut


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise NcclFailed(str(error)) from error
