"""The two sides of a hand-off as their allocators see them. Each works on until the next request fits."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import thread_time_ns
from typing import Protocol

from benchmarks.traces import Request
from flowkv_engine.kv.segments import runs_of


class Pool(Protocol):
    """What `Blocks` and `FreeList` have in common."""

    @property
    def num_leased(self) -> int: ...
    def allocate(self, n: int, *, like: Sequence[int] = (), room: int = 0) -> list[int]: ...
    def grow(self, last_block: int | None) -> int: ...
    def match_prefix(self, hashes: Sequence[str]) -> list[int]: ...
    def commit(self, block_id: int, block_hash: str, parent_hash: str | None) -> None: ...
    def release(self, block_ids: list[int]) -> None: ...


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
    """A pool in which at most `limit` blocks are leased when a request is let in."""

    def __init__(self, pool: Pool, block_size: int, limit: int) -> None:
        self.pool = pool
        self.take_ns = array("q")
        self._block_size = block_size
        self._limit = limit
        self._now = 0  # what it counts, each side says
        self._due: list[tuple[int, int, Running]] = []
        self._num_due = 0

    def place(self, request: Request, hashes: list[str], source: Sequence[int], room: int) -> Running:
        """Works until `request` fits, then gives it blocks, in runs like those of `source` if that is known.

        `source` are the block ids at the other side, as many, or none.
        """
        n = request.num_prompt_tokens // self._block_size + 1  # the prompt and the token that comes next
        while self.pool.num_leased + n > self._limit:
            now, _, running = heapq.heappop(self._due)
            self._now = now
            self._go_on(running)
        # The block of the last prompt token is computed and sent in any case.
        cached = self.pool.match_prefix(hashes[: (request.num_prompt_tokens - 1) // self._block_size])
        like = [run.length for run in runs_of(source[len(cached) :])]
        fresh = self._timed(lambda: self.pool.allocate(n - len(cached), like=like, room=room))
        return Running(request, hashes, cached + fresh, len(cached))

    def _go_on(self, running: Running) -> None:
        raise NotImplementedError

    def _timed(self, take: Callable[[], list[int]]) -> list[int]:
        began = thread_time_ns()  # not the clock: what else the machine does is not the allocator's
        block_ids = take()
        self.take_ns.append(thread_time_ns() - began)
        return block_ids

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
