"""How many copies a request's cache takes in pools long in use, and what prefix caches find: a trace through
the allocators.

Each request goes through a prefill pool with segments, and beside it decode pools that are told its runs,
that are not, and that have a free list. At some levels of use, with the prefix cache off and on. What a
prefill pool finds is held against one with a free list, which forgets only the least recently used.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from time import thread_time_ns
from typing import Any

from benchmarks import BenchmarkFailed
from benchmarks.report import Report, make_parser, quantiles
from benchmarks.traffic import MADE_UP, TRACE_HELP
from flowkv.bench.traces import Request, read_trace
from flowkv_common.wire.messages import Run
from flowkv_engine.kv.blocks import Blocks, OutOfBlocks
from flowkv_engine.kv.segments import align, runs_of

LEVELS = (0.6, 0.75, 0.9)
CACHES = {"off": (False,), "on": (True,), "both": (False, True)}
NUM_MADE_UP = 20_000
COLUMNS = ("prefill alone", "decode alone", "one-sided", "aligned", "larger side", "free list")


def main(argv: Sequence[str]) -> int:
    parser = make_parser("fragmentation", __doc__)
    parser.add_argument("--trace", default="synthetic", help=TRACE_HELP)
    parser.add_argument("--requests", type=int, default=100_000, help="the trace is repeated up to as many")
    parser.add_argument("--blocks", type=int, default=100_000, help="in each pool")
    parser.add_argument("--block-size", type=int, default=16, choices=(8, 16, 32, 64), help="tokens")
    parser.add_argument("--room", type=int, default=8, help="blocks left free behind a growing sequence")
    parser.add_argument("--cache", choices=CACHES, default="both", help="prefix cache")
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS, help="of all blocks, leased ones")
    options = parser.parse_args(argv)
    if options.trace in MADE_UP:
        requests = MADE_UP[options.trace](NUM_MADE_UP, 0)
    else:
        requests = read_trace(Path(options.trace))
    trace = Path(options.trace).name
    report = Report(options)
    caches = CACHES[options.cache] if any(request.hash_ids for request in requests) else (False,)
    for has_cache, level in itertools.product(caches, options.levels):
        report.say(f"{trace}, {level:.0%} leased, cache {'on' if has_cache else 'off'}")
        replay = Replay(options.blocks, options.block_size, level, has_cache, options.room)
        try:
            replay.run(itertools.islice(itertools.cycle(requests), options.requests))
        except OutOfBlocks:
            raise BenchmarkFailed(f"running sequences outgrow a pool of {options.blocks} blocks") from None
        report.add_row(level=level, has_cache=has_cache, **replay.figures())
    return report.finish(shown=[line_of(row) for row in report.rows])


class FreeList(Blocks):
    """The baseline: blocks from a stack of free ones, last freed first, wherever they lie.

    It has the prefix cache of `Blocks`, and a free list in place of segments.
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self._stack = list(range(num_blocks))[::-1]

    def allocate(self, n: int, *, like: Sequence[int] = (), room: int = 0) -> list[int]:
        for block_id in self.prefix_cache.evict(n - len(self._stack)):
            self.prefix_cache.overwrite(Run(block_id, 1))
            self._stack.append(block_id)
        if len(self._stack) < n:
            raise OutOfBlocks(f"{n} blocks wanted, {len(self._stack)} are free")
        taken = self._stack[len(self._stack) - n :][::-1]
        del self._stack[len(self._stack) - n :]
        for block_id in taken:
            self._refs[block_id] = 1
        self.num_leased += n
        return taken

    def grow(self, last_block: int | None) -> int:
        return self.allocate(1)[0]

    def _free(self, block_ids: Iterable[int]) -> None:
        self._stack += block_ids

    def _evict_ahead(self, at_most: int) -> None:
        """There are no runs to make."""


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

    def __init__(self, pool: Blocks, block_size: int, limit: int) -> None:
        self.pool = pool
        self.allocate_us: list[float] = []  # CPU time of each allocation
        self._block_size = block_size
        self._limit = limit
        self._now = 0
        self._due: list[tuple[int, int, Running]] = []
        self._num_due = 0

    def admit(
        self, request: Request, hashes: list[str], source: Sequence[int] = (), room: int = 0
    ) -> Running:
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
        self.allocate_us.append((thread_time_ns() - began) / 1e3)
        running = Running(request, hashes, cached + fresh, len(cached))
        self._begin(running)
        return running

    def _begin(self, running: Running) -> None:
        raise NotImplementedError

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

    def _begin(self, running: Running) -> None:
        num_computed = running.request.num_prompt_tokens - running.num_cached * self._block_size
        self._wait(running, self._now + num_computed)

    def _go_on(self, running: Running) -> None:
        self._commit(running)
        self.pool.release(running.block_ids)


class DecodeSide(Side):
    """Continuous batching: with each step of the clock, each sequence has one token more."""

    num_grown = 0
    num_moved = 0  # of those, how many did not lie behind the block before

    def _begin(self, running: Running) -> None:
        running.ends_at = self._now + running.request.num_output_tokens - 1  # prefill gives the first token
        self._commit(running)
        self._wait_until_full(running)

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


class Replay:
    """The same requests through all pools, and the copies that each takes.

    `level` is the part of all blocks that may be leased, `room` is in blocks.
    """

    def __init__(self, num_blocks: int, block_size: int, level: float, has_cache: bool, room: int) -> None:
        limit = int(num_blocks * level)
        self.copies: dict[str, Counter[int]] = defaultdict(Counter)
        self.num_left_out = 0  # of requests that alone are over the level
        self.num_prompt_blocks = 0
        self.num_hit_blocks: Counter[str] = Counter()
        self.prefill = PrefillSide(Blocks(num_blocks), block_size, limit)
        self.told, self.alone = (DecodeSide(Blocks(num_blocks), block_size, limit) for _ in range(2))
        self.list = DecodeSide(FreeList(num_blocks), block_size, limit)
        self.prefill_list = PrefillSide(FreeList(num_blocks), block_size, limit)
        self._most_blocks = num_blocks * level
        self._block_size = block_size
        self._has_cache = has_cache
        self._room = room

    def run(self, requests: Iterable[Request]) -> None:
        for request in requests:
            num_blocks = request.num_prompt_tokens // self._block_size + 1
            if num_blocks > self._most_blocks:
                self.num_left_out += 1
                continue
            self.num_prompt_blocks += num_blocks
            self._place(request, request.block_hashes(self._block_size) if self._has_cache else [])

    def _place(self, request: Request, hashes: list[str]) -> None:
        source = self.prefill.admit(request, hashes)
        told = self.told.admit(request, hashes, source.block_ids, self._room)
        alone = self.alone.admit(request, hashes, room=self._room)
        listed = self.list.admit(request, hashes)
        prefill_listed = self.prefill_list.admit(request, hashes)
        sent = source.block_ids[told.num_cached :]
        for name, num_copies in {
            "prefill alone": len(runs_of(source.fresh)),
            "decode alone": len(runs_of(alone.fresh)),
            "one-sided": len(align(source.block_ids[alone.num_cached :], alone.fresh)),
            "aligned": len(align(sent, told.fresh)),
            "larger side": max(len(runs_of(sent)), len(runs_of(told.fresh))),
            "free list": len(runs_of(listed.fresh)),
        }.items():
            self.copies[name][num_copies] += 1
        self.num_hit_blocks.update(
            {
                "prefill": source.num_cached,
                "prefill, free list": prefill_listed.num_cached,
                "decode": alone.num_cached,
                "decode, free list": listed.num_cached,
            }
        )

    def figures(self) -> dict[str, Any]:
        """Times in microseconds, runs in blocks."""
        return {
            "num_requests": self.copies["aligned"].total(),
            "num_left_out": self.num_left_out,
            "mean_copies": {name: round(fmean(self.copies[name].elements()), 4) for name in COLUMNS},
            "copies": {name: quantiles(self.copies[name].elements()) for name in COLUMNS},
            "allocate_cpu_us": quantiles(self.alone.allocate_us),
            "allocate_aligned_cpu_us": quantiles(self.told.allocate_us),
            "grow_moved_ratio": self.alone.num_moved / max(1, self.alone.num_grown),
            "hit_ratio": {
                name: hits / max(1, self.num_prompt_blocks) for name, hits in self.num_hit_blocks.items()
            },
        }


def line_of(row: dict[str, Any]) -> dict[str, Any]:
    """Mean / p99 of the copies per request."""
    allocate = row["allocate_cpu_us"]
    return {
        "leased": f"{row['level']:.0%}",
        "cache": row["has_cache"],
        **{name: f"{row['mean_copies'][name]:.2f} / {row['copies'][name].p99}" for name in COLUMNS},
        "allocate p50 / p99, CPU us": f"{allocate.p50:.0f} / {allocate.p99:.0f}",
        "moved": f"{row['grow_moved_ratio']:.1%}",
        "found / by a free list": (
            f"{row['hit_ratio'].get('prefill', 0):.1%} / {row['hit_ratio'].get('prefill, free list', 0):.1%}"
        ),
    }
