"""The memory of the KV cache on a GPU: one allocation that other processes can open. Needs CuPy."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import cupy
import torch
from cupy.cuda import runtime

from flowkv_common.wire.messages import PoolLayout


class CudaPool:
    """`num_blocks` zeroed blocks of `layout` on the GPU `device`. A `Pool`; use no `tensor` after `close`.

    The memory is not from torch's allocator, which cuts tensors out of larger pieces: an IPC handle names a
    whole allocation, so a peer would read other tensors' bytes.
    """

    def __init__(self, layout: PoolLayout, num_blocks: int, device: int = 0) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.num_bytes = num_blocks * layout.block_bytes
        self._device = cupy.cuda.Device(device)
        with self._device:
            self._address = runtime.malloc(self.num_bytes)
        try:
            memory = torch.as_tensor(_Bytes(self._address, self.num_bytes), device=f"cuda:{device}")
            self.tensor = memory.view(getattr(torch, layout.dtype)).view(num_blocks, -1)
            self.tensor.zero_()
            with self._device:
                runtime.deviceSynchronize()  # connectors write on streams of their own
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives the memory back, once no kernel uses it. Idempotent. Links to this pool must be closed."""
        if not self._address:
            return
        self.tensor = torch.empty(0)
        address, self._address = self._address, 0
        with self._device:
            runtime.deviceSynchronize()
            runtime.free(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except runtime.CUDARuntimeError:
            if error is None:  # else the device is lost: it can't free either, which must not hide the cause
                raise


class _Bytes:
    """Device memory as torch takes it over without a copy."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }
