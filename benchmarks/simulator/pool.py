"""The blocks of a simulated node: counted, with a prefix cache that lives in those that are free."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from flowkv.bench.traces import TOKENS_PER_HASH_ID


@dataclass(slots=True)
class Lease:
    """Blocks of one sequence: `num_own` that only it uses, and the cached prefixes that it pins, in order."""

    num_own: int
    pinned: list[int] = field(default_factory=list)


class Pool:
    """Counts blocks. A prefix is cached as one of the trace's ids, 512 tokens each, whole or not at all.

    An id of the trace names all tokens before it, too, so a chain is cached as far as its ids are. Ends of
    chains are evicted first, the least recently used of them.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert TOKENS_PER_HASH_ID % block_size == 0, "an id covers whole blocks"
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._stored: set[int] = set()  # since `take_news`
        self._removed: set[int] = set()
        self._num_grown = 0
        self._block_size = block_size
        self._blocks_per_id = TOKENS_PER_HASH_ID // block_size
        self._pins: dict[int, int] = {}  # of ids that sequences use
        self._idle: OrderedDict[int, None] = OrderedDict()  # the others, the next victim first

    @property
    def num_cached(self) -> int:
        """Blocks that hold prefixes which no sequence uses."""
        return len(self._idle) * self._blocks_per_id

    def num_hits(self, ids: Sequence[int]) -> int:
        """How many of the ids in front are cached."""
        for number, key in enumerate(ids):
            if key not in self._pins and key not in self._idle:
                return number
        return len(ids)

    def has_room(self, num_tokens: int, ids: Sequence[int]) -> bool:
        """Can `lease` succeed? Ids that would be pinned can't be evicted for the rest."""
        num_hits = self.num_hits(ids)
        num_idle_hits = sum(key in self._idle for key in ids[:num_hits])
        num_own = -(-num_tokens // self._block_size) - num_hits * self._blocks_per_id
        return num_own <= self.num_free + self.num_cached - num_idle_hits * self._blocks_per_id

    def lease(self, num_tokens: int, ids: Sequence[int]) -> Lease:
        """Blocks for so many tokens, of which those of cached ids are shared. Only after `has_room`."""
        pinned = list(ids[: self.num_hits(ids)])
        for key in pinned:
            self._idle.pop(key, None)
            self._pins[key] = self._pins.get(key, 0) + 1
        num_own = -(-num_tokens // self._block_size) - len(pinned) * self._blocks_per_id
        self._take(num_own)
        return Lease(num_own, pinned)

    def _take(self, num_blocks: int) -> None:
        while self.num_free < num_blocks:
            victim, _ = self._idle.popitem(last=False)
            self.num_free += self._blocks_per_id
            _note(victim, self._removed, self._stored)
        self.num_free -= num_blocks

    def grow_to(self, num_tokens: int) -> bool:
        """Blocks for all that sequences have produced, beside their leases. False: there are not so many."""
        num_more = num_tokens // self._block_size - self._num_grown
        if num_more > self.num_free + self.num_cached:
            return False
        self._take(num_more)
        self._num_grown += num_more
        return True

    def commit(self, lease: Lease, ids: Sequence[int]) -> None:
        """The KV of `ids` has been computed or has landed: the cache has it, if not from others already."""
        for key in ids[len(lease.pinned) :]:
            if key in self._pins or key in self._idle:
                return  # the lease keeps its own copy, which no lookup finds
            self._pins[key] = 1
            lease.pinned.append(key)
            lease.num_own -= self._blocks_per_id
            _note(key, self._stored, self._removed)

    def release(self, lease: Lease) -> None:
        """The sequence's own blocks are free; what it pinned stays cached, its end being the next victim."""
        self.num_free += lease.num_own
        for key in reversed(lease.pinned):
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]
                self._idle[key] = None

    def take_news(self) -> tuple[list[int], list[int]]:
        """Ids stored and removed since the last call, in order; what came and went is in neither."""
        news = sorted(self._stored), sorted(self._removed)
        self._stored, self._removed = set(), set()
        return news


def _note(key: int, now_in: set[int], was_in: set[int]) -> None:
    if key in was_in:
        was_in.discard(key)
    else:
        now_in.add(key)
