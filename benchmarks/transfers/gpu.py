"""Moving KV blocks on one GPU: copies, and CUDA IPC between two processes.

`python -m benchmarks transfer --device cuda`. NCCL between two processes on one GPU says nothing of its speed
between two, so it is not timed here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import cupy
from cupy.cuda import runtime

from benchmarks.report import Report, spread, times_s
from benchmarks.shapes import SHAPES
from flowkv_engine.kv.blocks import Blocks
from flowkv_engine.kv.cuda_pool import CudaPool
from flowkv_engine.kv.reservations import Reservations
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport import make_connectors
from flowkv_engine.transport.base import TransferStats

LLAMA = SHAPES["llama"]
NUM_WARMUPS = 2
LINK_TOKEN = "benchmark"
ANSWER_TIMEOUT_S = 60.0


class Sizes(NamedTuple):
    """One prompt's cache: blocks, and the pieces that a layer-major pool would send."""

    num_tokens: int
    num_blocks: int
    num_pieces: int
    num_bytes: int

    @classmethod
    def of(cls, num_tokens: int) -> Sizes:
        num_blocks = LLAMA.num_blocks(num_tokens)
        num_pieces = num_blocks * LLAMA.pieces_per_block
        return cls(num_tokens, num_blocks, num_pieces, num_blocks * LLAMA.layout.block_bytes)


def measure_gpu(options: argparse.Namespace, device: str) -> int:
    num_runs = options.repeat
    report = Report(options, gpu=device)
    all_sizes = [Sizes.of(num_tokens) for num_tokens in options.tokens]
    through_ipc = asyncio.run(ipc_transfers(all_sizes, num_runs))
    for sizes, ipc in zip(all_sizes, through_ipc, strict=True):
        copies = device_copies(sizes, num_runs)
        report.add_row(**sizes._asdict(), **copies, cuda_ipc=ipc)
    shown = [
        {
            "tokens": row["num_tokens"],
            "bytes": row["num_bytes"],
            **{f"{kind}, ms": row[kind]["ms"] for kind in ("one copy", "cuda_ipc", "layer-major")},
        }
        for row in report.rows
    ]
    return report.finish(shown=shown)


def figures(seconds: list[float], num_bytes: int) -> dict[str, Any]:
    ms = spread(1e3 * each for each in seconds)
    return {"ms": ms, "gb_per_s": num_bytes / ms.median / 1e6}


def device_copies(sizes: Sizes, num_runs: int) -> dict[str, dict[str, Any]]:
    """One copy of all the bytes, and as many as a layer-major pool needs, on one stream."""
    source, target = cupy.zeros(sizes.num_bytes, "uint8"), cupy.zeros(sizes.num_bytes, "uint8")
    stream = cupy.cuda.Stream(non_blocking=True)

    def copy_in(num_pieces: int) -> None:
        step = sizes.num_bytes // num_pieces
        for at in range(0, sizes.num_bytes, step):
            kind = runtime.memcpyDeviceToDevice
            runtime.memcpyAsync(target.data.ptr + at, source.data.ptr + at, step, kind, stream.ptr)
        stream.synchronize()

    return {
        "one copy": figures(times_s(lambda: copy_in(1), num_runs), sizes.num_bytes),
        "layer-major": figures(times_s(lambda: copy_in(sizes.num_pieces), num_runs), sizes.num_bytes),
    }


# --- CUDA IPC between two processes --------------------------------------------------------------


async def ipc_transfers(all_sizes: list[Sizes], num_runs: int) -> list[dict[str, Any]]:
    """Requests of these sizes through the connector, each in one run on both sides."""
    num_blocks = max(sizes.num_blocks for sizes in all_sizes)
    reservations = Reservations(Blocks(num_blocks))
    with CudaPool(LLAMA.layout, num_blocks) as pool, start_sender(num_blocks) as orders:
        [connector] = make_connectors(["cuda_ipc"], pool, reservations, LINK_TOKEN.__eq__)
        async with connector:
            orders.send(await connector.listen())
            rows = []
            for sizes in all_sizes:
                taken = [await transfer(orders, reservations, sizes) for _ in range(NUM_WARMUPS + num_runs)]
                seconds = [took_s for _, took_s in taken[NUM_WARMUPS:]]
                sent, _ = taken[-1]
                counts = {"num_copies": sent.num_copies, "num_calls": sent.num_calls}
                rows.append({**counts, **figures(seconds, sizes.num_bytes)})
            orders.send(None)
            return rows


async def transfer(
    orders: Connection, reservations: Reservations, sizes: Sizes
) -> tuple[TransferStats, float]:
    """What was sent, and the seconds that it took."""
    reserved = reservations.reserve("r.1", sizes.num_blocks, [], [], 600.0)
    try:
        orders.send(("r.1", reserved.token, [Copy(0, reserved.block_ids[0], sizes.num_blocks)]))
        if not await asyncio.to_thread(orders.poll, ANSWER_TIMEOUT_S):
            raise SystemExit(f"the sending process has not answered for {ANSWER_TIMEOUT_S} s")
        sent, seconds = orders.recv()
        return sent, seconds
    finally:
        reservations.cancel("r.1")


@contextlib.contextmanager
def start_sender(num_blocks: int) -> Iterator[Connection]:
    """A connection to a sending process, which is gone when the block ends."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=send_all, args=(theirs, num_blocks), daemon=True)
    process.start()
    theirs.close()  # or else its death would go unnoticed
    try:
        yield ours
    finally:
        process.join(10)
        process.kill()


def send_all(orders: Connection, num_blocks: int) -> None:
    """The other process: sends what it is told to, and answers with what it took."""

    async def serve() -> None:
        reservations = Reservations(Blocks(num_blocks))
        with CudaPool(LLAMA.layout, num_blocks) as pool:
            [connector] = make_connectors(["cuda_ipc"], pool, reservations, lambda _: False)
            async with connector:
                link = await connector.connect(orders.recv(), LINK_TOKEN, num_blocks)
                while (order := await asyncio.to_thread(orders.recv)) is not None:
                    began = time.perf_counter()
                    sent = await link.send_blocks(*order)
                    orders.send((sent, time.perf_counter() - began))

    asyncio.run(serve())
