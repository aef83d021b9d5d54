"""Gloo's send and recv between two ranks: what the paper's calls per block cost on a CPU."""

from __future__ import annotations

import asyncio
import datetime
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flowkv_engine.kv.pool import KVPool
from flowkv_engine.kv.segments import Copy

_TIMEOUT = datetime.timedelta(seconds=120)
_MAX_IN_FLIGHT = 256
_RECEIVER, _SENDER = 0, 1


class Peer:
    """A batch keeps up to 256 sends in flight."""

    def __init__(self, _: str, pool: KVPool) -> None:
        self._block_bytes = pool.layout.block_bytes
        self._bytes = pool.tensor.view(torch.uint8).flatten()  # [num_bytes]
        self._joining: asyncio.Task[None] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    async def listen(self) -> str:
        self._folder = tempfile.TemporaryDirectory(prefix="flowkv-bench-")
        path = str(Path(self._folder.name, "store"))
        self._joining = asyncio.create_task(asyncio.to_thread(_join, path, _RECEIVER))
        return path

    async def connect(self, path: str) -> None:
        await asyncio.to_thread(_join, path, _SENDER)

    async def send(self, copies: Sequence[Copy], one_by_one: bool) -> int:
        views = [self._view(copy.src, copy.length) for copy in copies]
        _exchange(dist.isend, views, _RECEIVER, 1 if one_by_one else _MAX_IN_FLIGHT)
        return len(copies)

    async def receive(self, copies: Sequence[Copy], one_by_one: bool) -> None:
        if self._joining is not None:
            await self._joining
        views = [self._view(copy.dst, copy.length) for copy in copies]
        _exchange(dist.irecv, views, _SENDER, 1 if one_by_one else _MAX_IN_FLIGHT)

    async def close(self) -> None:
        if self._joining is not None:
            await self._joining
        dist.destroy_process_group()
        if self._folder is not None:
            self._folder.cleanup()

    def _view(self, start: int, length: int) -> torch.Tensor:
        return self._bytes[start * self._block_bytes : (start + length) * self._block_bytes]


def _join(path: str, rank: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=_TIMEOUT)


def _exchange(start: Callable[..., Any], views: list[torch.Tensor], peer: int, max_in_flight: int) -> None:
    for begin in range(0, len(views), max_in_flight):
        for work in [start(view, peer) for view in views[begin : begin + max_in_flight]]:
            work.wait()
