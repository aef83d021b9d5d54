"""`python -m benchmarks.pool_memory`: what memory the CPU pool should be made of, measured on this machine.

A memfd can be mapped by a peer, but may get no huge pages; anonymous memory gets them, and a peer must ask
the kernel for each copy out of it (`process_vm_readv`). Compares copies and decode attention over both.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.host import describe_host
from benchmarks.transfer.shapes import SHAPES
from flowkv_engine.engine.batch import PackedBatch
from flowkv_engine.engine.cpu.attention import CpuAttention

POOL_BYTES = 1 << 30
COPY_BYTES = (47 << 20, 128 << 20, 512 << 20)
PIECE_BYTES = (None, 2 << 20, 32 << 10)  # None: one piece
ATTENTION = ((1, 4096), (16, 512), (16, 1024))  # sequences, tokens of context
NUM_RUNS = 9
_MAX_VECTORS = 1024

Bytes = NDArray[np.uint8]


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def memfd(num_bytes: int) -> Bytes:
    fd = os.memfd_create("bench")
    try:
        os.ftruncate(fd, num_bytes)
        return _touched(mmap.mmap(fd, num_bytes))
    finally:
        os.close(fd)


def anonymous(num_bytes: int) -> Bytes:
    mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    return _touched(mapping)


def _touched(mapping: mmap.mmap) -> Bytes:
    array = np.frombuffer(mapping, dtype=np.uint8)
    array[:] = 1
    return array


MEMORIES = {"memfd": memfd, "anonymous, huge pages": anonymous}


# --- copies ----------------------------------------------------------------------------------------


def spans(num_bytes: int, piece_bytes: int | None, seed: int) -> list[tuple[int, int, int]]:
    """Source, target and length of each piece; pieces lie anywhere, one piece lies where `seed` says."""
    rng = random.Random(seed)
    if piece_bytes is None:
        return [(rng.randrange(POOL_BYTES - num_bytes + 1) & ~4095, 0, num_bytes)]
    places = range(POOL_BYTES // piece_bytes)
    src, dst = (rng.sample(places, num_bytes // piece_bytes) for _ in range(2))
    return [(a * piece_bytes, b * piece_bytes, piece_bytes) for a, b in zip(src, dst, strict=True)]


def copy_mapped(source: Bytes, target: Bytes, pieces: Sequence[tuple[int, int, int]]) -> None:
    for src, dst, length in pieces:
        np.copyto(target[dst : dst + length], source[src : src + length])


def copy_by_kernel(source: Bytes, target: Bytes, pieces: Sequence[tuple[int, int, int]]) -> None:
    """`process_vm_readv`, here from our own process: the same work, and no permission needed."""
    libc = ctypes.CDLL(None, use_errno=True)
    for begin in range(0, len(pieces), _MAX_VECTORS):
        part = pieces[begin : begin + _MAX_VECTORS]
        local = (_Vector * len(part))(*((target.ctypes.data + dst, length) for _, dst, length in part))
        remote = (_Vector * len(part))(*((source.ctypes.data + src, length) for src, _, length in part))
        wanted = sum(length for _, _, length in part)
        copied = libc.process_vm_readv(os.getpid(), local, len(part), remote, len(part), 0)
        if copied != wanted:
            raise OSError(ctypes.get_errno(), f"process_vm_readv copied {copied} of {wanted} bytes")


WAYS = {
    "memfd, mapped": (memfd, copy_mapped),
    "anonymous, mapped": (anonymous, copy_mapped),  # what no peer can have: the limit
    "anonymous, process_vm_readv": (anonymous, copy_by_kernel),
    "memfd, process_vm_readv": (memfd, copy_by_kernel),
}


def measure_copies() -> Iterator[str]:
    for way, (make, copy) in WAYS.items():
        source, target = make(POOL_BYTES), make(POOL_BYTES)
        for num_bytes in COPY_BYTES:
            for piece_bytes in PIECE_BYTES:
                times = []
                for seed in range(NUM_RUNS):
                    pieces = spans(num_bytes, piece_bytes, seed)
                    times.append(_timed(lambda: copy(source, target, pieces)))  # noqa: B023 (called at once)
                piece = "one piece" if piece_bytes is None else f"{piece_bytes >> 10} KiB pieces"
                yield f"{way:28} {num_bytes / 1e6:5.0f} MB, {piece:14} {_summary(times)}"


# --- attention -------------------------------------------------------------------------------------


def measure_attention() -> Iterator[str]:
    """Decode attention of all layers of SmolLM2-135M over a pool of each kind of memory."""
    layout = SHAPES["smollm2"].layout
    num_blocks = POOL_BYTES // layout.block_bytes
    for memory, make in MEMORIES.items():
        made = make(num_blocks * layout.block_bytes)
        shape = (num_blocks, layout.num_layers, 2, layout.block_size, layout.num_kv_heads, layout.head_dim)
        pool = torch.from_numpy(made).view(torch.float32).view(shape)
        pool.uniform_(
            -1, 1
        )  # bytes of 1 make products too small for normal numbers, which some CPUs are slow at
        attention = CpuAttention(pool)
        for num_sequences, context_len in ATTENTION:
            attention.bind(_decode_batch(num_sequences, context_len, layout.block_size, num_blocks))
            query = torch.randn(num_sequences, 3 * layout.num_kv_heads, layout.head_dim)

            def attend(attention: CpuAttention = attention, query: torch.Tensor = query) -> None:
                for layer in range(layout.num_layers):
                    attention.attend(layer, query, 0.125)

            attend()  # compiles
            times = [_timed(attend) for _ in range(NUM_RUNS)]
            yield f"{memory:28} {num_sequences:2} x {context_len:4} tokens {_summary(times)}"


def _decode_batch(num_sequences: int, context_len: int, block_size: int, num_blocks: int) -> PackedBatch:
    per_sequence = context_len // block_size
    chosen = random.Random(1).sample(range(num_blocks), num_sequences * per_sequence)
    tables = np.array(chosen, np.int32).reshape(num_sequences, per_sequence)
    last = np.full(num_sequences, context_len - 1, np.int64)
    return PackedBatch(
        token_ids=np.zeros(num_sequences, np.int64),
        position_ids=last,
        slots=tables[:, -1].astype(np.int64) * block_size + block_size - 1,
        query_lens=np.ones(num_sequences, np.int32),
        context_lens=np.full(num_sequences, context_len, np.int32),
        block_tables=tables,
        logits_indices=np.arange(num_sequences),
        samples=[None] * num_sequences,
    )


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


def _summary(times: list[float]) -> str:
    return f"median {statistics.median(times):7.1f} ms, min {min(times):7.1f} ms"


def main() -> None:
    torch.set_num_threads(1)
    print(describe_host(), f"load {os.getloadavg()}", sep="\n")
    for title, lines in (("copies", measure_copies()), ("decode attention", measure_attention())):
        print(f"\n{title}")
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    main()
