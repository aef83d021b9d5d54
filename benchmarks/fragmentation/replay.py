"""One replay: the same requests through a prefill pool and three decode pools, and the copies of each."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.fragmentation.free_list import FreeList
from benchmarks.fragmentation.sides import DecodeSide, PrefillSide, Running
from benchmarks.traces import Request
from flowkv_engine.kv.blocks import Blocks
from flowkv_engine.kv.segments import align

NUM_SAMPLES = 100


@dataclass(frozen=True)
class Conditions:
    """What one replay holds fixed: `level` is the part of all blocks that may be leased, `room` in blocks."""

    num_blocks: int
    block_size: int
    level: float
    has_cache: bool
    room: int


class Replay:
    """A prefill pool with segments, and beside it decode pools that are told its runs, that are not, and with
    a free list. Each request goes through all four."""

    def __init__(self, conditions: Conditions) -> None:
        size, block_size = conditions.num_blocks, conditions.block_size
        limit = int(size * conditions.level)
        self.conditions = conditions
        self.copies: dict[str, Counter[int]] = defaultdict(Counter)
        self.longest_free_run: dict[str, list[int]] = defaultdict(list)
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

    def run(self, requests: Iterable[Request], num_requests: int) -> None:
        """`num_requests` are how many there are in `requests`: to look at the pools at equal intervals."""
        conditions = self.conditions
        interval = max(1, num_requests // NUM_SAMPLES)
        for number, request in enumerate(requests, 1):
            num_blocks = request.num_prompt_tokens // conditions.block_size + 1
            if num_blocks > conditions.num_blocks * conditions.level:
                self.num_left_out += 1
                continue
            self.num_prompt_blocks += num_blocks
            self._place(request, request.block_hashes(conditions.block_size) if conditions.has_cache else [])
            if number % interval == 0:
                self._sample()

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

    def _sample(self) -> None:
        self.longest_free_run["prefill"].append(self.prefill_pool.counts().longest_free_run)
        self.longest_free_run["decode"].append(self.alone_pool.counts().longest_free_run)
        self.longest_free_run["free list"].append(self.list_pool.longest_free_run())


def num_runs(block_ids: Sequence[int]) -> int:
    return sum(following != block + 1 for block, following in pairwise(block_ids)) + bool(block_ids)


def num_copies(source: Running, target: Running) -> int:
    """Copies that bring `target` what it lacks."""
    return len(align(source.block_ids[target.num_cached :], target.fresh))
