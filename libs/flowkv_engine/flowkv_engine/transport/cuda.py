"""The parts of CUDA and NCCL that the connectors use, by way of CuPy. Imported only where there is a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import cupy
import torch
from cupy.cuda import nccl, runtime

from flowkv_engine.transport.nccl import SENDER, NcclFailed, Span

_HANDLE_BYTES = 64
_NO_FLAGS = 0
_NUM_RANKS = 2
# Aborts of older ones were seen to hang.
_OLDEST_NCCL = 21900


class DeviceError(OSError):
    """The CUDA runtime said no."""


class CudaDevice:
    """An `IpcDevice` and a `StagingDevice`: the GPU with this index among those that the process sees."""

    def __init__(self, index: int = 0) -> None:
        self._index = index

    def export_pool(self, address: int) -> bytes:
        with self.current():
            return bytes(runtime.ipcGetMemHandle(address))

    def open_pool(self, handle: bytes, num_bytes: int, target: int) -> CudaPeerPool:
        if len(handle) != _HANDLE_BYTES:
            raise DeviceError(f"a handle has {_HANDLE_BYTES} bytes, not {len(handle)}")
        with self.current():
            return CudaPeerPool(self, runtime.ipcOpenMemHandle(handle), num_bytes, target)

    def pin(self, address: int, num_bytes: int) -> None:
        with self.current():
            runtime.hostRegister(address, num_bytes, _NO_FLAGS)

    def unpin(self, address: int) -> None:
        with self.current():
            runtime.hostUnregister(address)

    def new_queue(self) -> CudaQueue:
        return CudaQueue(self)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Each thread has a current device of its own."""
        try:
            with cupy.cuda.Device(self._index):
                yield
        except runtime.CUDARuntimeError as error:
            raise DeviceError(str(error)) from error


class CudaQueue:
    """A `CopyQueue`, with a stream of its own, so that copies run beside compute."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        with device.current():
            self._stream = cupy.cuda.Stream(non_blocking=True)
            # Waits without spinning on a core.
            self._done = cupy.cuda.Event(block=True, disable_timing=True)

    def copy(self, source: int, target: int, num_bytes: int) -> None:
        with self._device.current():
            # Of which kind it is, the runtime sees by the addresses.
            runtime.memcpyAsync(target, source, num_bytes, runtime.memcpyDefault, self._stream.ptr)

    def settle(self) -> None:
        with self._device.current():
            self._done.record(self._stream)
            self._done.synchronize()


class CudaPeerPool:
    """A `PeerPool` behind an IPC handle."""

    def __init__(self, device: CudaDevice, source: int, num_bytes: int, target: int) -> None:
        self._device = device
        self._source = source
        self._num_bytes = num_bytes
        self._target = target
        self._queue = CudaQueue(device)

    def copy(self, src: int, dst: int, num_bytes: int) -> None:
        if not 0 <= src <= self._num_bytes - num_bytes:
            raise DeviceError(f"{num_bytes} bytes from {src} on are outside a pool of {self._num_bytes}")
        self._queue.copy(self._source + src, self._target + dst, num_bytes)

    def settle(self) -> None:
        self._queue.settle()

    def close(self) -> None:
        with self._device.current():
            runtime.ipcCloseMemHandle(self._source)


class CupyNccl:
    """An `NcclBackend` on the GPU with index `device`, with a stream of its own.

    Do not set `NCCL_COMM_BLOCKING=0`: CuPy can't read "in progress" from a communicator. Raises `NcclFailed`
    where NCCL is missing or too old.
    """

    def __init__(self, device: int = 0) -> None:
        if not nccl.available:  # importing CuPy's module works without the library
            # One of another CUDA would put its library in the place of the one that torch loads.
            cuda = (torch.version.cuda or "").partition(".")[0]
            raise NcclFailed(
                f"CuPy has found no NCCL library: install nvidia-nccl-cu{cuda}, that of this torch"
            )
        if nccl.get_version() < _OLDEST_NCCL:
            raise NcclFailed(f"NCCL {nccl.get_version()} is older than {_OLDEST_NCCL}")
        self.version = str(nccl.get_version())
        self.scratch = Span(0, 0)
        self._device = cupy.cuda.Device(device)
        self._communicator: Any = None  # an `nccl.NcclCommunicator` from `init` to `abort`

    def get_unique_id(self) -> bytes:
        with _failures():
            return bytes(nccl.get_unique_id())

    def init(self, unique_id: bytes, rank: int) -> None:
        with _failures(), self._device:
            self._rank = rank
            self._stream = cupy.cuda.Stream(non_blocking=True)
            self._done = cupy.cuda.Event(disable_timing=True)
            self.scratch = Span(runtime.malloc(1), 1)
            self._communicator = nccl.NcclCommunicator(_NUM_RANKS, unique_id, rank)

    def exchange(self, spans: Sequence[Span]) -> None:
        # Behind nothing that the engine has queued. No step that still runs writes blocks that are sent, and
        # none touches blocks that are reserved; each end would wait, on the device, for the other's step.
        with _failures(), self._device:
            move = self._communicator.send if self._rank == SENDER else self._communicator.recv
            nccl.groupStart()
            try:
                for span in spans:
                    move(span.address, span.num_bytes, nccl.NCCL_UINT8, 1 - self._rank, self._stream.ptr)
            finally:
                nccl.groupEnd()  # an abort inside of a group would wait for its end
                self._done.record(self._stream)

    def poll(self) -> bool:
        with _failures():
            self._communicator.check_async_error()
            return bool(self._done.done)

    def abort(self) -> None:
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            with self._device:
                communicator.abort()
        scratch, self.scratch = self.scratch, Span(0, 0)
        with _failures(), self._device:
            runtime.free(scratch.address)  # nothing, when it is 0


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """CuPy's errors as ours. It knows no name for the newest results: those come as `KeyError`."""
    try:
        yield
    except (nccl.NcclError, runtime.CUDARuntimeError, KeyError) as error:
        raise NcclFailed(f"NCCL: {error}") from error
