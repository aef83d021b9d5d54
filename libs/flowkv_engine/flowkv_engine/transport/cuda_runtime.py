"""CUDA's share of `cuda_ipc`, by way of CuPy. Imported only where there is a device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import cupy
from cupy.cuda import runtime

_HANDLE_BYTES = 64


class DeviceError(OSError):
    """The CUDA runtime said no."""


class CudaDevice:
    """An `IpcDevice`: the GPU with this index among those that the process sees."""

    def __init__(self, index: int = 0) -> None:
        self._index = index

    def export(self, address: int) -> bytes:
        with self.current():
            return bytes(runtime.ipcGetMemHandle(address))

    def open(self, handle: bytes, num_bytes: int, target: int) -> CudaPeerPool:
        if len(handle) != _HANDLE_BYTES:
            raise DeviceError(f"a handle has {_HANDLE_BYTES} bytes, not {len(handle)}")
        with self.current():
            return CudaPeerPool(self, runtime.ipcOpenMemHandle(handle), num_bytes, target)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Which device is current is a matter of each thread."""
        try:
            with cupy.cuda.Device(self._index):
                yield
        except runtime.CUDARuntimeError as error:
            raise DeviceError(str(error)) from error


class CudaPeerPool:
    """A `PeerPool` behind an IPC handle, with a stream of its own, so that copies run beside compute."""

    def __init__(self, device: CudaDevice, source: int, num_bytes: int, target: int) -> None:
        self._device = device
        self._source = source
        self._num_bytes = num_bytes
        self._target = target
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._done = cupy.cuda.Event(block=True, disable_timing=True)  # waits without spinning on a core

    def copy(self, src: int, dst: int, num_bytes: int) -> None:
        if not 0 <= src <= self._num_bytes - num_bytes:
            raise DeviceError(f"{num_bytes} bytes from {src} on are outside a pool of {self._num_bytes}")
        with self._device.current():
            runtime.memcpyAsync(
                self._target + dst,
                self._source + src,
                num_bytes,
                runtime.memcpyDeviceToDevice,
                self._stream.ptr,
            )

    def settle(self) -> None:
        with self._device.current():
            self._done.record(self._stream)
            self._done.synchronize()

    def close(self) -> None:
        with self._device.current():
            runtime.ipcCloseMemHandle(self._source)
