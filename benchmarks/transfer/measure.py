"""The rows of the benchmark: each strategy over each transport, with a memory copy beside every transfer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from benchmarks.host import available_bytes
from benchmarks.transfer.pair import Pair, Timing, WorkerFailed
from benchmarks.transfer.shapes import SHAPES, Shape
from benchmarks.transfer.strategies import STRATEGIES, USED_SHARE, Strategy
from benchmarks.transfer.transports import Unavailable
from flowkv_common.wire.messages import Run
from flowkv_engine.kv.segments import Copy

# Each strategy places the request anew that often, and takes the placements in turn.
_NUM_PLACEMENTS = 3
# A pool has at least so many bytes, and so many blocks more than a request takes of the free ones.
_MIN_POOL_BYTES = 512 << 20
_SPARE_BLOCKS = 128
_SPARE_BYTES = 1 << 30

Say = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How often a row is repeated: up to `num_repeats` times, but no new time after `budget_s` seconds."""

    num_repeats: int
    budget_s: float


@dataclass(frozen=True)
class Row:
    """One strategy over one transport. Times in ms; `memcpy_*` were measured between the transfers."""

    shape: str
    num_tokens: int
    connector: str
    strategy: str
    num_bytes: int
    num_copies: int
    num_calls: int
    num_runs: int
    median_ms: float
    min_ms: float
    max_ms: float
    gb_per_s: float
    memcpy_median_ms: float
    memcpy_min_ms: float
    ratio_to_memcpy: float
    ratio_of_minima: float
    cpu_s: float

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


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
        by_bytes = _MIN_POOL_BYTES // self.shape.layout.block_bytes
        return max(by_bytes, round(self.num_blocks / (1 - USED_SHARE)) + _SPARE_BLOCKS)

    @property
    def pool_bytes(self) -> int:
        return self.num_pool_blocks * self.shape.layout.block_bytes

    def copies(self, strategy: Strategy, seed: int) -> list[Copy]:
        return strategy.copies(self.num_blocks, self.num_pool_blocks, self.shape.pieces_per_block, seed)

    def __str__(self) -> str:
        return f"{self.shape_name}, {self.num_tokens} tokens"


def measure_case(
    case: Case, connectors: Sequence[str], strategies: Sequence[str], effort: Effort, say: Say
) -> Iterator[Row]:
    """All rows of one case; `say` is told what can't be measured, and why."""
    needed = 2 * case.pool_bytes + _SPARE_BYTES
    if needed > available_bytes():
        say(f"{case}: skipped, needs {needed / 2**30:.1f} GiB of memory")
        return
    waiting = list(connectors)
    while waiting:
        with Pair(case.shape, case.num_pool_blocks) as pair:
            while waiting:
                connector = waiting.pop(0)
                try:
                    yield from _measure_connector(pair, case, connector, strategies, effort)
                except Unavailable as error:
                    say(f"{connector}: not measured, {error}")
                except WorkerFailed as error:
                    say(f"{connector}, {case}: failed, {error}")
                    break  # the others get a new pair


def _measure_connector(
    pair: Pair, case: Case, connector: str, strategies: Sequence[str], effort: Effort
) -> Iterator[Row]:
    """Layer-major strategies first, each kind of pool with a connection of its own."""
    for is_layer_major in (True, False):
        names = [name for name in strategies if STRATEGIES[name].is_layer_major == is_layer_major]
        if names:
            pair.connect(connector, is_layer_major)
            for name in names:
                yield _measure(pair, case, connector, name, effort)
            pair.disconnect()


def _measure(pair: Pair, case: Case, connector: str, name: str, effort: Effort) -> Row:
    strategy = STRATEGIES[name]
    placements = [case.copies(strategy, seed) for seed in range(_NUM_PLACEMENTS)]
    pair.erase(placements[0])
    pair.transfer(placements[0], strategy.is_one_by_one)  # to warm up, and to see that the bytes are right
    pair.verify(placements[0])
    timings: list[Timing] = []
    memcpys: list[Timing] = []
    ends_at = time.monotonic() + effort.budget_s
    while not timings or (len(timings) < effort.num_repeats and time.monotonic() < ends_at):
        memcpys.append(_memcpy(pair, case, len(timings)))
        copies = placements[len(timings) % _NUM_PLACEMENTS]
        timings.append(pair.transfer(copies, strategy.is_one_by_one))
    pair.verify(copies)
    num_copies = statistics.median_low(len(copies) for copies in placements)
    return _row(case, connector, name, num_copies, timings, memcpys)


def _memcpy(pair: Pair, case: Case, number: int) -> Timing:
    """Copies as many bytes from one half of the receiver's pool to the other, each time from elsewhere."""
    half = case.num_pool_blocks // 2
    start = (number * case.num_blocks) % (half - case.num_blocks + 1)
    return pair.memcpy(Run(start, case.num_blocks), Run(half + start, case.num_blocks))


def _row(
    case: Case,
    connector: str,
    name: str,
    num_copies: int,
    timings: list[Timing],
    memcpys: list[Timing],
) -> Row:
    num_bytes = case.num_blocks * case.shape.layout.block_bytes
    times = [timing.duration_s * 1e3 for timing in timings]
    limits = [timing.duration_s * 1e3 for timing in memcpys]
    median, limit = statistics.median(times), statistics.median(limits)
    return Row(
        shape=case.shape_name,
        num_tokens=case.num_tokens,
        connector=connector,
        strategy=name,
        num_bytes=num_bytes,
        num_copies=num_copies,
        num_calls=statistics.median_low(timing.num_calls for timing in timings),
        num_runs=len(timings),
        median_ms=median,
        min_ms=min(times),
        max_ms=max(times),
        gb_per_s=num_bytes / median / 1e6,
        memcpy_median_ms=limit,
        memcpy_min_ms=min(limits),
        ratio_to_memcpy=median / limit,
        ratio_of_minima=min(times) / min(limits),
        cpu_s=statistics.median(timing.cpu_s for timing in timings),
    )
