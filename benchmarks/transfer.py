"""What each idea of the paper is worth in KV transfers: one request's cache, process to process.

Each strategy over each transport, FlowKV's and others', with a memory copy (the C library's, one thread)
beside every transfer. Caches are evicted before each, and bytes checked on both sides. With `--device cuda`:
copies on one GPU, and CUDA IPC between two processes.

Others that are not installed are left out. `pip install -c constraints.txt nixl-cu12
mooncake-transfer-engine-non-cuda` brings two of them; Mooncake's needs the system's libibverbs1.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from benchmarks.report import Report, make_parser, set_missing, spread
from benchmarks.shapes import SHAPES, Shape, require_gpu
from benchmarks.transfers.pair import Pair, Timing, WorkerFailed, start_pair
from benchmarks.transfers.strategies import STRATEGIES, USED_SHARE, Strategy
from benchmarks.transfers.transports import TRANSPORTS, Unavailable
from flowkv_common.wire.messages import Run
from flowkv_engine.kv.segments import Copy

# Each strategy places the request anew that often, and takes the placements in turn.
NUM_PLACEMENTS = 3
# A pool has at least so many bytes, and so many blocks more than a request takes of the free ones.
MIN_POOL_BYTES = 512 << 20
SPARE_BLOCKS = 128
SPARE_BYTES = 1 << 30
COLUMNS = (
    "shape", "num_tokens", "connector", "strategy", "num_copies", "num_calls", "ms", "gb_per_s",
    "ratio_to_memcpy", "cpu_s",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What one pair of processes is started for."""

    shape_name: str
    num_tokens: int

    @property
    def shape(self) -> Shape:
        return SHAPES[self.shape_name]

    @property
    def num_blocks(self) -> int:
        return self.shape.num_blocks(self.num_tokens)

    @property
    def num_pool_blocks(self) -> int:
        """Blocks of a pool that has room for the request where others use their share of it."""
        by_bytes = MIN_POOL_BYTES // self.shape.layout.block_bytes
        return max(by_bytes, round(self.num_blocks / (1 - USED_SHARE)) + SPARE_BLOCKS)

    def copies(self, strategy: Strategy, seed: int) -> list[Copy]:
        return strategy.copies(self.num_blocks, self.num_pool_blocks, self.shape.pieces_per_block, seed)

    def __str__(self) -> str:
        return f"{self.shape_name}, {self.num_tokens} tokens"


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    if options.device == "cuda":
        device = require_gpu()
        from benchmarks.transfers.gpu import measure_gpu

        return measure_gpu(options, device)
    report = Report(options, used_share_of_pool=USED_SHARE)
    remarks: list[str] = []
    report.more["strategies"] = {name: strategy.title for name, strategy in STRATEGIES.items()}
    report.more["remarks"] = remarks
    for shape, num_tokens in itertools.product(options.shape, options.tokens):
        case = Case(shape, num_tokens)
        for row in measure_case(case, options, remarks):
            report.add_row(**row)
            report.say(f"{case}, {row['connector']}, {STRATEGIES[row['strategy']].title}: {row['ms']} ms")
    print("\n".join(dict.fromkeys(remarks)))
    return report.finish(*COLUMNS)


def measure_case(case: Case, options: argparse.Namespace, remarks: list[str]) -> Iterator[dict[str, Any]]:
    """All rows of one case; `remarks` get what can't be measured, and why."""
    needed = 2 * case.num_pool_blocks * case.shape.layout.block_bytes + SPARE_BYTES
    if needed > psutil.virtual_memory().available:
        remarks.append(f"{case}: skipped, needs {needed / 2**30:.1f} GiB of memory")
        return
    waiting = list(options.connectors)
    while waiting:
        with start_pair(case.shape, case.num_pool_blocks) as pair:
            while waiting:
                connector = waiting.pop(0)
                try:
                    yield from measure_connector(pair, case, connector, options)
                except Unavailable as error:
                    remarks.append(f"{connector}: not measured, {error}")
                except WorkerFailed as error:
                    remarks.append(f"{connector}, {case}: failed, {error}")
                    break  # the others get a new pair


def measure_connector(
    pair: Pair, case: Case, connector: str, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Layer-major strategies first, each kind of pool over its own connection."""
    for is_layer_major in (True, False):
        names = [name for name in options.strategies if STRATEGIES[name].is_layer_major == is_layer_major]
        if names:
            pair.connect(connector, is_layer_major)
            for name in names:
                yield {
                    "shape": case.shape_name,
                    "num_tokens": case.num_tokens,
                    "connector": connector,
                    "strategy": name,
                    **measure_strategy(pair, case, STRATEGIES[name], options),
                }
            pair.ask_both("disconnect")


def measure_strategy(
    pair: Pair, case: Case, strategy: Strategy, options: argparse.Namespace
) -> dict[str, Any]:
    """Up to `repeat` transfers, but none begins after `budget_s` seconds."""
    placements = [case.copies(strategy, seed) for seed in range(NUM_PLACEMENTS)]
    pair.erase(placements[0])
    pair.transfer(placements[0], strategy.is_one_by_one)  # to warm up, and to see that the bytes are right
    pair.verify(placements[0])
    timings: list[Timing] = []
    memcpys_ms: list[float] = []
    half = case.num_pool_blocks // 2
    ends_at = time.monotonic() + options.budget_s
    while not timings or (len(timings) < options.repeat and time.monotonic() < ends_at):
        # As many bytes from one half of the receiver's pool to the other, each time from elsewhere.
        start = (len(timings) * case.num_blocks) % (half - case.num_blocks + 1)
        src, dst = Run(start, case.num_blocks), Run(half + start, case.num_blocks)
        memcpys_ms.append(1e3 * pair.memcpy_s(src, dst))
        copies = placements[len(timings) % NUM_PLACEMENTS]
        timings.append(pair.transfer(copies, strategy.is_one_by_one))
    pair.verify(copies)
    num_bytes = case.num_blocks * case.shape.layout.block_bytes
    times_ms = [1e3 * timing.duration_s for timing in timings]
    return {
        "num_bytes": num_bytes,
        "num_copies": statistics.median_low(len(copies) for copies in placements),
        "num_calls": statistics.median_low(timing.num_calls for timing in timings),
        "num_runs": len(timings),
        "ms": spread(times_ms),
        "gb_per_s": num_bytes / statistics.median(times_ms) / 1e6,
        "memcpy_ms": spread(memcpys_ms),  # measured between the transfers
        "ratio_to_memcpy": statistics.median(times_ms) / statistics.median(memcpys_ms),
        "ratio_of_minima": min(times_ms) / min(memcpys_ms),
        "cpu_s": statistics.median(timing.cpu_s for timing in timings),
    }


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("transfer", __doc__, devices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, nargs="+", help="prompt lengths")
    parser.add_argument("--repeat", type=int, help="timed runs per row, fewer where they take long")
    cpu = parser.add_argument_group("with --device cpu")
    cpu.add_argument("--shape", choices=SHAPES, nargs="+")
    cpu.add_argument("--connectors", choices=TRANSPORTS, nargs="+", default=list(TRANSPORTS))
    cpu.add_argument("--strategies", choices=STRATEGIES, nargs="+", default=list(STRATEGIES))
    cpu.add_argument("--quick", action="store_true", help="one shape and length, few runs: under a minute")
    options = parser.parse_args(argv)
    if options.device == "cuda":
        set_missing(options, tokens=[500, 1000, 4000, 8000], repeat=20)
    elif options.quick:
        set_missing(options, tokens=[500], shape=["llama"], repeat=3, budget_s=1.0)
    else:
        set_missing(
            options, tokens=[500, 1000, 4000, 8000, 13000], shape=list(SHAPES), repeat=9, budget_s=20.0
        )
    return options
