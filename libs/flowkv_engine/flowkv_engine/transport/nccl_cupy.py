"""NCCL by way of CuPy. Imported only where there is a device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import cupy
import torch
from cupy.cuda import nccl, runtime

from flowkv_engine.transport.nccl import NcclFailed, Span

_NUM_RANKS = 2
# Aborts of older ones were seen to hang.
_OLDEST_VERSION = 21900


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
        if nccl.get_version() < _OLDEST_VERSION:
            raise NcclFailed(f"NCCL {nccl.get_version()} is older than {_OLDEST_VERSION}")
        self.version = str(nccl.get_version())
        self.scratch = Span(0, 0)
        self._device = cupy.cuda.Device(device)
        self._communicator: nccl.NcclCommunicator | None = None

    def get_unique_id(self) -> bytes:
        with _failures():
            return bytes(nccl.get_unique_id())

    def init(self, unique_id: bytes, rank: int) -> None:
        with _failures(), self._device:
            self._peer = 1 - rank
            self._stream = cupy.cuda.Stream(non_blocking=True)
            self._done = cupy.cuda.Event(disable_timing=True)
            self.scratch = Span(runtime.malloc(1), 1)
            self._communicator = nccl.NcclCommunicator(_NUM_RANKS, unique_id, rank)

    def group_start(self) -> None:
        # Behind nothing that the engine has queued. No step that still runs writes blocks that are sent, and
        # none touches blocks that are reserved; each end would wait, on the device, for the other's step.
        with _failures(), self._device:
            nccl.groupStart()

    def group_end(self) -> None:
        with _failures(), self._device:
            nccl.groupEnd()
            self._done.record(self._stream)

    def send(self, address: int, num_bytes: int) -> None:
        with _failures():
            self._joined.send(address, num_bytes, nccl.NCCL_UINT8, self._peer, self._stream.ptr)

    def recv(self, address: int, num_bytes: int) -> None:
        with _failures():
            self._joined.recv(address, num_bytes, nccl.NCCL_UINT8, self._peer, self._stream.ptr)

    def poll(self) -> bool:
        with _failures():
            self._joined.check_async_error()
            return bool(self._done.done)

    def abort(self) -> None:
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            with self._device:
                communicator.abort()
        scratch, self.scratch = self.scratch, Span(0, 0)
        with _failures(), self._device:
            runtime.free(scratch.address)  # nothing, when it is 0

    @property
    def _joined(self) -> nccl.NcclCommunicator:
        if self._communicator is None:
            raise NcclFailed("the communicator has been aborted")
        return self._communicator


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """CuPy's errors as ours. It knows no name for the newest results: those come as `KeyError`."""
    try:
        yield
    except (nccl.NcclError, runtime.CUDARuntimeError, KeyError) as error:
        raise NcclFailed(f"NCCL: {error}") from error
