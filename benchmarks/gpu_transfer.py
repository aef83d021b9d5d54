"""What moving KV blocks costs on one GPU: copies, CUDA IPC between two processes, and NCCL's price per call.

`python -m benchmarks.gpu_transfer --json FILE`. NCCL between two processes on one GPU says nothing of its
speed between two, so it is not timed here: only what a call costs, by sending to oneself in one rank.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.result import write_result
from flowkv_common.wire.messages import PoolLayout
from flowkv_engine.kv.blocks import Blocks
from flowkv_engine.kv.reservations import Reservations
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.base import TransferStats

LLAMA_8B = PoolLayout(num_layers=32, block_size=16, num_kv_heads=8, head_dim=128, dtype="bfloat16")
PROMPT_TOKENS = (500, 1000, 4000, 8000)
NUM_WARMUPS = 2
NUM_NCCL_RUNS = 5  # of half a second each, in tens of thousands of calls
LINK_TOKEN = "benchmark"
ANSWER_TIMEOUT_S = 60.0


class Sizes(NamedTuple):
    """One prompt's cache: blocks, and the pieces that a layer-major pool would send."""

    num_tokens: int
    num_blocks: int
    num_pieces: int
    num_bytes: int


def sizes_of(layout: PoolLayout, num_tokens: int) -> Sizes:
    num_blocks = -(-num_tokens // layout.block_size)
    num_pieces = num_blocks * layout.num_layers * 2
    return Sizes(num_tokens, num_blocks, num_pieces, num_blocks * layout.block_bytes)


def summary(seconds: list[float], num_bytes: int) -> dict[str, float]:
    median = statistics.median(seconds)
    return {
        "median_ms": median * 1e3,
        "min_ms": min(seconds) * 1e3,
        "max_ms": max(seconds) * 1e3,
        "gb_per_s": num_bytes / median / 1e9,
    }


def timed(work: Callable[[], None], num_runs: int) -> list[float]:
    """Wall clock of `work`, which returns when the device has done it."""
    seconds = []
    for _ in range(NUM_WARMUPS + num_runs):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return seconds[NUM_WARMUPS:]


# --- copies within the device --------------------------------------------------------------------


def device_copies(sizes: Sizes, num_runs: int) -> dict[str, dict[str, float]]:
    """One copy of all the bytes, and as many as a layer-major pool needs, on one stream."""
    import cupy
    from cupy.cuda import runtime

    source, target = cupy.zeros(sizes.num_bytes, "uint8"), cupy.zeros(sizes.num_bytes, "uint8")
    stream = cupy.cuda.Stream(non_blocking=True)

    def copy_in(num_pieces: int) -> None:
        step = sizes.num_bytes // num_pieces
        for at in range(0, sizes.num_bytes, step):
            kind = runtime.memcpyDeviceToDevice
            runtime.memcpyAsync(target.data.ptr + at, source.data.ptr + at, step, kind, stream.ptr)
        stream.synchronize()

    return {
        "d2d one copy": summary(timed(lambda: copy_in(1), num_runs), sizes.num_bytes),
        "d2d layer-major": summary(timed(lambda: copy_in(sizes.num_pieces), num_runs), sizes.num_bytes),
    }


# --- CUDA IPC between two processes --------------------------------------------------------------


def send_all(orders: Connection, num_blocks: int) -> None:
    """The other process: sends what it is told to, and answers with what it took."""
    asyncio.run(_send_all(orders, num_blocks))


async def _send_all(orders: Connection, num_blocks: int) -> None:
    from flowkv_engine.kv.cuda_pool import CudaPool
    from flowkv_engine.transport import make_connectors

    reservations = Reservations(Blocks(num_blocks))
    with CudaPool(LLAMA_8B, num_blocks) as pool:
        [connector] = make_connectors(["cuda_ipc"], pool, reservations, lambda _: False)
        async with connector:
            link = await connector.connect(orders.recv(), LINK_TOKEN, num_blocks)
            while (order := await asyncio.to_thread(orders.recv)) is not None:
                began = time.perf_counter()
                sent = await link.send_blocks(*order)
                orders.send((sent, time.perf_counter() - began))


async def ipc_transfers(all_sizes: list[Sizes], num_runs: int) -> list[dict[str, Any]]:
    """Requests of these sizes through the connector, each in one run on both sides."""
    from flowkv_engine.kv.cuda_pool import CudaPool
    from flowkv_engine.transport import make_connectors

    num_blocks = max(sizes.num_blocks for sizes in all_sizes)
    reservations = Reservations(Blocks(num_blocks))
    with CudaPool(LLAMA_8B, num_blocks) as pool, sender(num_blocks) as orders:
        [connector] = make_connectors(["cuda_ipc"], pool, reservations, LINK_TOKEN.__eq__)
        async with connector:
            orders.send(await connector.listen())
            rows = []
            for sizes in all_sizes:
                taken = [await transfer(orders, reservations, sizes) for _ in range(NUM_WARMUPS + num_runs)]
                taken = taken[NUM_WARMUPS:]
                row = summary([seconds for _, seconds in taken], sizes.num_bytes)
                sent = taken[0][0]
                rows.append({"num_copies": sent.num_copies, "num_calls": sent.num_calls, **row})
            orders.send(None)
            return rows


@contextlib.contextmanager
def sender(num_blocks: int) -> Iterator[Connection]:
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


async def transfer(
    orders: Connection, reservations: Reservations, sizes: Sizes
) -> tuple[TransferStats, float]:
    """Returns how long it took too, in seconds."""
    reserved = reservations.reserve("r.1", sizes.num_blocks, [], [], 600.0)
    try:
        copies = [Copy(0, reserved.block_ids[0], sizes.num_blocks)]
        orders.send(("r.1", reserved.token, copies))
        if not await asyncio.to_thread(orders.poll, ANSWER_TIMEOUT_S):
            raise SystemExit(f"the sending process has not answered for {ANSWER_TIMEOUT_S} s")
        sent, seconds = orders.recv()
        return sent, seconds
    finally:
        reservations.cancel("r.1")


# --- NCCL to oneself -----------------------------------------------------------------------------


def nccl_calls(all_sizes: list[Sizes]) -> dict[str, Any]:
    """Grouped sends to oneself: as many as a layer-major pool makes, as many as blocks, and one.

    A send needs its receive in the same group, so a call here is a pair. The bytes are moved within the GPU.
    """
    import cupy
    from cupy.cuda import nccl

    if not nccl.available:
        return {"not run": "CuPy has found no NCCL library"}
    communicator = nccl.NcclCommunicator(1, nccl.get_unique_id(), 0)
    stream = cupy.cuda.Stream(non_blocking=True)
    most = max(sizes.num_bytes for sizes in all_sizes)
    source, target = cupy.zeros(most, "uint8"), cupy.zeros(most, "uint8")

    def send(num_bytes: int, num_pieces: int) -> None:
        step = num_bytes // num_pieces
        nccl.groupStart()
        for at in range(0, num_bytes, step):
            communicator.send(source.data.ptr + at, step, nccl.NCCL_UINT8, 0, stream.ptr)
            communicator.recv(target.data.ptr + at, step, nccl.NCCL_UINT8, 0, stream.ptr)
        nccl.groupEnd()
        stream.synchronize()

    def row(sizes: Sizes, num_pieces: int) -> dict[str, float]:
        seconds = timed(lambda: send(sizes.num_bytes, num_pieces), NUM_NCCL_RUNS)
        return {"num_calls": num_pieces, **summary(seconds, sizes.num_bytes)}

    rows = []
    for sizes in all_sizes:
        kinds = {"layer-major": sizes.num_pieces, "block-major": sizes.num_blocks, "one run": 1}
        measured = {kind: row(sizes, num_pieces) for kind, num_pieces in kinds.items()}
        more_ms = measured["layer-major"]["median_ms"] - measured["one run"]["median_ms"]
        rows.append({**sizes._asdict(), **measured, "us_per_call": more_ms * 1e3 / (sizes.num_pieces - 1)})
    communicator.abort()
    return {"nccl": nccl.get_version(), "rows": rows}


# --- all -----------------------------------------------------------------------------------------


def device_name() -> str:
    """Raises `SystemExit`, with the reason, where nothing can be measured."""
    try:
        import cupy
    except ImportError as error:
        raise SystemExit(f"gpu_transfer needs CuPy, flowkv[gpu]: {error}") from error
    try:
        properties = cupy.cuda.runtime.getDeviceProperties(0)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise SystemExit(f"gpu_transfer needs a CUDA device: {error}") from error
    return str(properties["name"].decode())


def table(found: dict[str, Any]) -> str:
    """Milliseconds at the median."""
    lines = [f"{'tokens':>8}{'MB':>8}{'one copy':>11}{'CUDA IPC':>11}{'as layers':>11}"]
    for row in found["copies"]:
        times = (row[kind]["median_ms"] for kind in ("d2d one copy", "cuda_ipc", "d2d layer-major"))
        lines.append(
            f"{row['num_tokens']:>8}{row['num_bytes'] / 1e6:>8.0f}" + "".join(f"{ms:>11.2f}" for ms in times)
        )
    lines.append(f"{'NCCL':>8}{'calls':>8}{'one call':>11}{'blocks':>11}{'layers':>11}{'us/call':>9}")
    for row in found["nccl to oneself"].get("rows", []):
        times = (row[kind]["median_ms"] for kind in ("one run", "block-major", "layer-major"))
        lines.append(
            f"{row['num_tokens']:>8}{row['num_pieces']:>8}"
            + "".join(f"{ms:>11.2f}" for ms in times)
            + f"{row['us_per_call']:>9.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(PROMPT_TOKENS), help="prompt lengths")
    parser.add_argument("--runs", type=int, default=20, help="timed runs of each row")
    options = parser.parse_args()
    name = device_name()
    all_sizes = [sizes_of(LLAMA_8B, num_tokens) for num_tokens in options.tokens]
    rows = []
    through_ipc = asyncio.run(ipc_transfers(all_sizes, options.runs))
    for sizes, ipc in zip(all_sizes, through_ipc, strict=True):
        copies = device_copies(sizes, options.runs)
        limit_ms = copies["d2d one copy"]["median_ms"]
        ratio = limit_ms / ipc["median_ms"]
        rows.append({**sizes._asdict(), **copies, "cuda_ipc": ipc, "cuda_ipc of d2d": ratio})
    found: dict[str, object] = {"device": name, "copies": rows}
    write_result(options.json, "gpu_transfer", found)  # the rest may be minutes away
    found["nccl to oneself"] = nccl_calls(all_sizes)
    write_result(options.json, "gpu_transfer", found)
    print(table(found))


if __name__ == "__main__":
    main()
