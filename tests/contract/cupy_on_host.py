"""The part of CuPy that the connectors use, on host memory of one process, with CUDA's order of streams.

A copy of memory is made when something waits for it, so that one that nobody waits for never happens. When
something *counts* as done follows from what stood before it on its stream. The legacy default stream, where
an engine computes, is busy for as long as a test wants.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import ClassVar, Self

import pytest

from flowkv_engine.transport.staging import StagingDevice

_OURS = "flowkv_engine.transport.cuda"  # imports CuPy


class Work:
    """Something on a stream, asked in the order of the stream whether it is done."""

    def __init__(self) -> None:
        self.has_ended = threading.Event()

    @property
    def done(self) -> bool:
        return self.has_ended.is_set()


class MemoryCopy(Work):
    """Made when it is asked for."""

    def __init__(self, target: int, source: int, num_bytes: int) -> None:
        super().__init__()
        self._ends = target, source, num_bytes

    @property
    def done(self) -> bool:
        if not self.has_ended.is_set():
            ctypes.memmove(*self._ends)
            self.has_ended.set()
        return True


class Event:
    """Done when all has ended that stood on its stream when it was recorded."""

    def __init__(self, **_: bool) -> None:
        self._behind: list[Work | Event] = []

    def record(self, stream: Stream) -> None:
        stream.queued = [
            work for work in stream.queued if isinstance(work, Event) or not work.has_ended.is_set()
        ]
        self._behind = list(stream.queued)

    @property
    def done(self) -> bool:
        return all(before.done for before in self._behind)

    def synchronize(self) -> None:
        ends_at = time.monotonic() + 10
        while not self.done:
            if time.monotonic() > ends_at:
                raise CUDARuntimeError("a stream that does not end")
            time.sleep(1e-3)


class Stream:
    null: ClassVar[Stream]
    _by_ptr: ClassVar[dict[int, Stream]] = {}
    _ptrs: ClassVar[Iterator[int]] = itertools.count(1)

    def __init__(self, *, non_blocking: bool = False) -> None:
        self.queued: list[Work | Event] = []
        self.ptr = next(self._ptrs)
        self._by_ptr[self.ptr] = self
        if not non_blocking and hasattr(Stream, "null"):
            raise NotImplementedError("a stream that waits for the legacy one")

    @classmethod
    def at(cls, ptr: int) -> Stream:
        return cls._by_ptr[ptr]

    def wait_event(self, event: Event) -> None:
        self.queued.append(event)

    def record(self) -> Event:
        event = Event()
        event.record(self)
        return event


Stream.null = Stream()


class Device:
    def __init__(self, index: int) -> None:
        self.index = index

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class CUDARuntimeError(Exception):
    pass


class NcclError(Exception):
    pass


def _ipc_handle(address: int) -> bytes:
    return address.to_bytes(64, "little")


def _memcpy_async(target: int, source: int, num_bytes: int, kind: int, stream_ptr: int) -> None:
    assert kind == 4
    Stream.at(stream_ptr).queued.append(MemoryCopy(target, source, num_bytes))


pinned: dict[int, int] = {}  # address -> number of bytes


def _host_register(address: int, num_bytes: int, flags: int) -> None:
    assert flags == 0
    if address in pinned:
        raise CUDARuntimeError("pinned already")
    pinned[address] = num_bytes


def _host_unregister(address: int) -> None:
    if pinned.pop(address, None) is None:
        raise CUDARuntimeError("not pinned")


class _Meeting:
    """Where two ranks of one id meet: the n-th group of one with the n-th of the other."""

    all: ClassVar[dict[bytes, _Meeting]] = {}

    def __init__(self) -> None:
        self.joined = threading.Barrier(2)
        self.lock = threading.Lock()
        self.posted: list[list[tuple[Work, Sequence[tuple[int, int]]]]] = [[], []]

    def post(self, rank: int, spans: Sequence[tuple[int, int]]) -> Work:
        work = Work()
        with self.lock:
            self.posted[rank].append((work, spans))
            while all(self.posted):
                (sent, sources), (received, targets) = (posted.pop(0) for posted in self.posted)
                for (source, num_bytes), (target, expected) in zip(sources, targets, strict=True):
                    assert num_bytes == expected
                    ctypes.memmove(target, source, num_bytes)
                sent.has_ended.set()
                received.has_ended.set()
        return work


class _Group(threading.local):
    """What a thread has said between `groupStart` and `groupEnd`."""

    def __init__(self) -> None:
        self.said: list[tuple[NcclCommunicator, tuple[int, int], int]] = []


_group = _Group()


class NcclCommunicator:
    def __init__(self, num_ranks: int, unique_id: bytes, rank: int) -> None:
        assert num_ranks == 2
        self.rank = rank
        self.meeting = _Meeting.all[unique_id]
        self.meeting.joined.wait(10)

    def send(self, address: int, num_bytes: int, kind: int, peer: int, stream_ptr: int) -> None:
        assert (kind, peer) == (1, 1 - self.rank)
        _group.said.append((self, (address, num_bytes), stream_ptr))

    recv = send

    def check_async_error(self) -> None:
        pass

    def abort(self) -> None:
        pass


def _get_unique_id() -> bytes:
    unique_id = len(_Meeting.all).to_bytes(128, "little")
    _Meeting.all[unique_id] = _Meeting()
    return unique_id


def _group_end() -> None:
    said, _group.said = _group.said, []
    communicator, _, stream_ptr = said[0]
    work = communicator.meeting.post(communicator.rank, [span for _, span, _ in said])
    Stream.at(stream_ptr).queued.append(work)


_kept: list[ctypes.Array[ctypes.c_char]] = []


def _malloc(num_bytes: int) -> int:
    _kept.append(ctypes.create_string_buffer(num_bytes))
    return ctypes.addressof(_kept[-1])


_runtime = {
    "CUDARuntimeError": CUDARuntimeError,
    "ipcGetMemHandle": _ipc_handle,
    "ipcOpenMemHandle": lambda handle: int.from_bytes(handle, "little"),
    "ipcCloseMemHandle": lambda address: None,
    "memcpyAsync": _memcpy_async,
    "memcpyDefault": 4,
    "hostRegister": _host_register,
    "hostUnregister": _host_unregister,
    "malloc": _malloc,
    "free": lambda address: None,
}
_nccl = {
    "available": True,
    "NCCL_UINT8": 1,
    "NcclError": NcclError,
    "NcclCommunicator": NcclCommunicator,
    "get_version": lambda: 22800,
    "get_unique_id": _get_unique_id,
    "groupStart": lambda: None,
    "groupEnd": _group_end,
}


@contextlib.contextmanager
def busy_legacy_stream() -> Iterator[None]:
    """The engine has queued a step that does not end before the block does."""
    step = Work()
    Stream.null.queued.append(step)
    try:
        yield
    finally:
        step.has_ended.set()
        Stream.null.queued.remove(step)


def host_device() -> StagingDevice:
    """A GPU whose memory is this process's."""
    with _installed():
        from flowkv_engine.transport.cuda import CudaDevice

        return CudaDevice()


@pytest.fixture
def cupy_on_host() -> Iterator[None]:
    """`import cupy` finds this one, and our module that imports it is imported anew, also afterwards."""
    with _installed():
        yield


@contextlib.contextmanager
def _installed() -> Iterator[None]:
    cuda = ModuleType("cupy.cuda")
    runtime, nccl = ModuleType("cupy.cuda.runtime"), ModuleType("cupy.cuda.nccl")
    runtime.__dict__.update(_runtime)
    nccl.__dict__.update(_nccl)
    cuda.__dict__.update(Device=Device, Stream=Stream, Event=Event, runtime=runtime, nccl=nccl)
    cupy = ModuleType("cupy")
    cupy.__dict__.update(cuda=cuda)
    with pytest.MonkeyPatch.context() as patch:
        for module in (cupy, cuda, runtime, nccl):
            patch.setitem(sys.modules, module.__name__, module)
        patch.delitem(sys.modules, _OURS, raising=False)
        yield
        sys.modules.pop(_OURS, None)
