"""How many copies a request's cache takes in pools long in use: a trace through the allocators.

Each request goes through a prefill pool with segments, and beside it decode pools that are told its runs,
that are not, and that have a free list. At three levels of use, with the prefix cache off and on.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import thread_time_ns
from typing import Any, Protocol

from benchmarks import BenchmarkFailed
from benchmarks.report import Report, make_parser
from benchmarks.traces import Request, read_trace
from benchmarks.traffic import synthetic
from flowkv_common.wire.messages import Run
from flowkv_engine.kv.blocks import Blocks, OutOfBlocks, PrefixCache
from flowkv_engine.kv.segments import align, runs_of

LEVELS = (0.6, 0.75, 0.9)
CACHES = {"off": (False,), "on": (True,), "both": (False, True)}
NUM_SYNTHETIC = 20_000
COLUMNS = ("prefill alone", "decode alone", "one-sided", "aligned", "larger side", "free list")


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    requests = read_trace(options.trace) if options.trace else synthetic(NUM_SYNTHETIC)
    trace = options.trace.name if options.trace else "synthetic"
    report = Report(options)
    caches = CACHES[options.cache] if any(request.hash_ids for request in requests) else (False,)
    for has_cache, level in itertools.product(caches, LEVELS):
        report.say(f"{trace}, {level:.0%} leased, cache {'on' if has_cache else 'off'}")
        replay = Replay(Conditions(options.blocks, options.block_size, level, has_cache, options.room))
        try:
            replay.run(itertools.islice(itertools.cycle(requests), options.requests))
        except OutOfBlocks:
            raise BenchmarkFailed(f"running sequences outgrow a pool of {options.blocks} blocks") from None
        report.add_row(**figures(replay))
    return report.finish(shown=[line_of(row) for row in report.rows])


# --- pools ------------------------------------------------------------------------------------------


class Pool(Protocol):
    """What `Blocks` and `FreeList` have in common."""

    @property
    def num_leased(self) -> int: ...
    def allocate(self, n: int, *, like: Sequence[int] = (), room: int = 0) -> list[int]: ...
    def grow(self, last_block: int | None) -> int: ...
    def match_prefix(self, hashes: Sequence[str]) -> list[int]: ...
    def commit(self, block_id: int, block_hash: str, parent_hash: str | None) -> None: ...
    def release(self, block_ids: list[int]) -> None: ...


class FreeList:
    """The baseline: blocks from a stack of free ones, last freed first, wherever they lie.

    It has the prefix cache of `Blocks`, and a free list in place of segments.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_leased = 0
        self._free = list(range(num_blocks))[::-1]
        self._refs = [0] * num_blocks
        self._cache = PrefixCache(num_blocks)

    def allocate(self, n: int, *, like: Sequence[int] = (), room: int = 0) -> list[int]:
        for block_id in self._cache.evict(n - len(self._free)):
            self._cache.overwrite(Run(block_id, 1))
            self._free.append(block_id)
        if len(self._free) < n:
            raise OutOfBlocks(f"{n} blocks wanted, {len(self._free)} are free")
        taken = self._free[len(self._free) - n :][::-1]
        del self._free[len(self._free) - n :]
        for block_id in taken:
            self._refs[block_id] = 1
        self.num_leased += n
        return taken

    def grow(self, last_block: int | None) -> int:
        return self.allocate(1)[0]

    def match_prefix(self, hashes: Sequence[str]) -> list[int]:
        matched = self._cache.match(hashes)
        self._cache.lease(matched)
        for block_id in matched:
            self.num_leased += not self._refs[block_id]
            self._refs[block_id] += 1
        return matched

    def commit(self, block_id: int, block_hash: str, parent_hash: str | None) -> None:
        if self._cache.find(block_hash) is None:
            self._cache.insert(block_id, block_hash, parent_hash)

    def release(self, block_ids: Iterable[int]) -> None:
        unheld = []
        for block_id in block_ids:
            self._refs[block_id] -= 1
            if not self._refs[block_id]:
                unheld.append(block_id)
        self.num_leased -= len(unheld)
        self._free += self._cache.queue(unheld)


# --- the two sides of a handoff ---------------------------------------------------------------------


@dataclass(eq=False)
class Running:
    """A request with its blocks; the first `num_cached` of them were found in the prefix cache."""

    request: Request
    hashes: list[str]
    block_ids: list[int]
    num_cached: int
    ends_at: int = 0  # the step of its last token, on the decode side

    @property
    def fresh(self) -> list[int]:
        return self.block_ids[self.num_cached :]


class Side:
    """A pool in which at most `limit` blocks are leased when a request is let in.

    It works on until the next request fits. What its clock counts, each side says.
    """

    def __init__(self, pool: Pool, block_size: int, limit: int) -> None:
        self.pool = pool
        self.take_ns = array("q")  # CPU time of each allocation
        self._block_size = block_size
        self._limit = limit
        self._now = 0
        self._due: list[tuple[int, int, Running]] = []
        self._num_due = 0

    def place(self, request: Request, hashes: list[str], source: Sequence[int], room: int) -> Running:
        """Gives the request blocks, in runs like those of `source`: as many block ids at the other side."""
        n = request.num_prompt_tokens // self._block_size + 1  # the prompt and the token that comes next
        while self.pool.num_leased + n > self._limit:
            self._now, _, running = heapq.heappop(self._due)
            self._go_on(running)
        # The block of the last prompt token is computed and sent in any case.
        cached = self.pool.match_prefix(hashes[: (request.num_prompt_tokens - 1) // self._block_size])
        like = [run.length for run in runs_of(source[len(cached) :])]
        began = thread_time_ns()
        fresh = self.pool.allocate(n - len(cached), like=like, room=room)
        self.take_ns.append(thread_time_ns() - began)
        return Running(request, hashes, cached + fresh, len(cached))

    def _go_on(self, running: Running) -> None:
        raise NotImplementedError

    def _wait(self, running: Running, until: int) -> None:
        self._num_due += 1  # equal times are served in the order of arrival
        heapq.heappush(self._due, (until, self._num_due, running))

    def _commit(self, running: Running) -> None:
        for i in range(running.num_cached, len(running.hashes)):
            self.pool.commit(running.block_ids[i], running.hashes[i], running.hashes[i - 1] if i else None)


class PrefillSide(Side):
    """Prompts that are computed together, at an equal pace: the clock counts tokens of each."""

    def admit(self, request: Request, hashes: list[str]) -> Running:
        running = self.place(request, hashes, source=(), room=0)
        num_computed = request.num_prompt_tokens - running.num_cached * self._block_size
        self._wait(running, self._now + num_computed)
        return running

    def _go_on(self, running: Running) -> None:
        self._commit(running)
        self.pool.release(running.block_ids)


class DecodeSide(Side):
    """Continuous batching: with each step of the clock, each sequence has one token more."""

    def __init__(self, pool: Pool, block_size: int, limit: int) -> None:
        super().__init__(pool, block_size, limit)
        self.num_grown = 0
        self.num_moved = 0  # of those, how many did not lie behind the block before

    def admit(self, request: Request, hashes: list[str], source: Sequence[int], room: int) -> Running:
        running = self.place(request, hashes, source, room)
        running.ends_at = self._now + request.num_output_tokens - 1  # the first token comes from prefill
        self._commit(running)
        self._wait_until_full(running)
        return running

    def _go_on(self, running: Running) -> None:
        if self._now == running.ends_at:
            self.pool.release(running.block_ids)
            return
        self.num_grown += 1
        block_id = self.pool.grow(running.block_ids[-1])
        self.num_moved += block_id != running.block_ids[-1] + 1
        running.block_ids.append(block_id)
        self._wait_until_full(running)

    def _wait_until_full(self, running: Running) -> None:
        """The next time it needs a block, or its end."""
        request = running.request
        began_at = running.ends_at - request.num_output_tokens + 1
        full_at = began_at + len(running.block_ids) * self._block_size - request.num_prompt_tokens
        self._wait(running, min(full_at, running.ends_at))


# --- the replay -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conditions:
    """What one replay holds fixed: `level` is the part of all blocks that may be leased, `room` in blocks."""

    num_blocks: int
    block_size: int
    level: float
    has_cache: bool
    room: int


class Replay:
    """The same requests through all four pools, and the copies that each takes."""

    def __init__(self, conditions: Conditions) -> None:
        size, block_size = conditions.num_blocks, conditions.block_size
        limit = int(size * conditions.level)
        self.conditions = conditions
        self.copies: dict[str, Counter[int]] = defaultdict(Counter)
        self.num_left_out = 0  # of requests that alone are over the level
        self.num_prompt_blocks = 0
        self.num_hit_blocks: Counter[str] = Counter()
        self.prefill_pool = Blocks(size)
        self.told_pool = Blocks(size)
        self.alone_pool = Blocks(size)
        self.list_pool = FreeList(size)
        self.prefill = PrefillSide(self.prefill_pool, block_size, limit)
        self.told = DecodeSide(self.told_pool, block_size, limit)
        self.alone = DecodeSide(self.alone_pool, block_size, limit)
        self.list = DecodeSide(self.list_pool, block_size, limit)

    def run(self, requests: Iterable[Request]) -> None:
        conditions = self.conditions
        for request in requests:
            num_blocks = request.num_prompt_tokens // conditions.block_size + 1
            if num_blocks > conditions.num_blocks * conditions.level:
                self.num_left_out += 1
                continue
            self.num_prompt_blocks += num_blocks
            self._place(request, request.block_hashes(conditions.block_size) if conditions.has_cache else [])

    def _place(self, request: Request, hashes: list[str]) -> None:
        room = self.conditions.room
        source = self.prefill.admit(request, hashes)
        told = self.told.admit(request, hashes, source.block_ids, room)
        alone = self.alone.admit(request, hashes, (), room)
        listed = self.list.admit(request, hashes, (), 0)
        self.copies["prefill alone"][num_runs(source.fresh)] += 1
        self.copies["decode alone"][num_runs(alone.fresh)] += 1
        self.copies["free list"][num_runs(listed.fresh)] += 1
        self.copies["one-sided"][num_copies(source, alone)] += 1
        self.copies["aligned"][num_copies(source, told)] += 1
        sent = source.block_ids[told.num_cached :]
        self.copies["larger side"][max(num_runs(sent), num_runs(told.fresh))] += 1
        self.num_hit_blocks.update({"segments": alone.num_cached, "free list": listed.num_cached})


def num_runs(block_ids: Sequence[int]) -> int:
    return sum(following != block + 1 for block, following in itertools.pairwise(block_ids)) + bool(block_ids)


def num_copies(source: Running, target: Running) -> int:
    """Copies that bring `target` what it lacks."""
    return len(align(source.block_ids[target.num_cached :], target.fresh))


# --- the report -------------------------------------------------------------------------------------


def figures(replay: Replay) -> dict[str, Any]:
    """Times in microseconds, runs in blocks."""
    alone = replay.alone
    num_blocks = max(1, replay.num_prompt_blocks)
    return {
        "conditions": asdict(replay.conditions),
        "num_requests": replay.copies["aligned"].total(),
        "num_left_out": replay.num_left_out,
        "copies_per_request": {name: of_counts(replay.copies[name]) for name in COLUMNS},
        "take_cpu_us": of_times(replay.alone.take_ns),
        "take_aligned_cpu_us": of_times(replay.told.take_ns),
        "grow_moved_ratio": alone.num_moved / alone.num_grown if alone.num_grown else 0.0,
        "hit_ratio": {name: hits / num_blocks for name, hits in replay.num_hit_blocks.items()},
    }


def of_counts(counts: Counter[int]) -> dict[str, float]:
    """Mean, p50, p99 and the greatest of a histogram."""
    values = list(itertools.chain.from_iterable([value] * counts[value] for value in sorted(counts))) or [0]
    return {
        "mean": round(sum(values) / len(values), 4),
        "p50": values[int(0.5 * len(values))],
        "p99": values[int(0.99 * len(values))],
        "max": values[-1],
    }


def of_times(times_ns: array[int]) -> dict[str, float]:
    ordered = sorted(times_ns) or [0]
    return {"p50": ordered[len(ordered) // 2] / 1e3, "p99": ordered[int(0.99 * len(ordered))] / 1e3}


def line_of(row: dict[str, Any]) -> dict[str, Any]:
    """Mean / p99 of the copies per request."""
    conditions, copies = row["conditions"], row["copies_per_request"]
    return {
        "leased": f"{conditions['level']:.0%}",
        "cache": conditions["has_cache"],
        **{name: f"{copies[name]['mean']:.2f} / {copies[name]['p99']}" for name in COLUMNS},
        "take p50 / p99, CPU us": f"{row['take_cpu_us']['p50']:.0f} / {row['take_cpu_us']['p99']:.0f}",
        "moved": f"{row['grow_moved_ratio']:.1%}",
        "hits": f"{row['hit_ratio'].get('segments', 0):.1%}",
    }


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("fragmentation", __doc__)
    parser.add_argument("--trace", type=Path, help="Mooncake .jsonl or Azure .csv; a synthetic one without")
    parser.add_argument("--requests", type=int, default=100_000, help="the trace is repeated up to as many")
    parser.add_argument("--blocks", type=int, default=100_000, help="in each pool")
    parser.add_argument("--block-size", type=int, default=16, choices=(8, 16, 32, 64), help="tokens")
    parser.add_argument("--room", type=int, default=8, help="blocks left free behind a growing sequence")
    parser.add_argument("--cache", choices=CACHES, default="both", help="prefix cache")
    return parser.parse_args(argv)
