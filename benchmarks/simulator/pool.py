"""The blocks of a simulated node: counted, with a prefix cache that lives in those that are free."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from flowkv.bench.traces import TOKENS_PER_HASH_ID, Piece


@dataclass(slots=True)
class Lease:
    """Blocks of one sequence: `num_own` that only it uses, and the cached ids that it pins, in order.

    `num_cached` of its blocks were there before it.
    """

    num_own: int
    pinned: list[int] = field(default_factory=list)
    num_cached: int = 0


class Pool:
    """Counts blocks. A prefix is cached by pieces, each whole or not at all.

    An id of the trace names all tokens before it, too, so a chain is cached as far as its ids are. Ends of
    chains are evicted first, the least recently used of them.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert TOKENS_PER_HASH_ID % block_size == 0, "an id covers whole blocks"
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self.num_cached = 0  # blocks that hold prefixes which no sequence uses
        self._stored: set[Piece] = set()  # since `take_news`
        self._removed: set[Piece] = set()
        self._num_grown = 0
        self._block_size = block_size
        self._sizes: dict[int, int] = {}  # blocks of each id that is cached
        self._pins: dict[int, int] = {}  # of ids that sequences use
        self._idle: OrderedDict[int, None] = OrderedDict()  # the others, the next victim first

    def num_hits(self, pieces: Sequence[Piece]) -> int:
        """How many of the pieces in front are cached."""
        for number, (key, num_blocks) in enumerate(pieces):
            if self._sizes.get(key, 0) < num_blocks:
                return number
        return len(pieces)

    def has_room(self, num_tokens: int, pieces: Sequence[Piece]) -> bool:
        """Can `lease` succeed? Ids that would be pinned can't be evicted for the rest."""
        hits = pieces[: self.num_hits(pieces)]
        num_own = -(-num_tokens // self._block_size) - _num_blocks(hits)
        num_idle_hits = sum(self._sizes[key] for key, _ in hits if key in self._idle)
        return num_own <= self.num_free + self.num_cached - num_idle_hits

    def lease(self, num_tokens: int, pieces: Sequence[Piece]) -> Lease:
        """Blocks for so many tokens, of which those of cached pieces are shared. Only after `has_room`."""
        hits = pieces[: self.num_hits(pieces)]
        for key, _ in hits:
            if key in self._idle:
                del self._idle[key]
                self.num_cached -= self._sizes[key]
            self._pins[key] = self._pins.get(key, 0) + 1
        num_cached = _num_blocks(hits)
        num_own = -(-num_tokens // self._block_size) - num_cached
        self._take(num_own)
        return Lease(num_own, [key for key, _ in hits], num_cached)

    def _take(self, num_blocks: int) -> None:
        while self.num_free < num_blocks:
            victim, _ = self._idle.popitem(last=False)
            size = self._sizes.pop(victim)
            self.num_free += size
            self.num_cached -= size
            _note((victim, size), self._removed, self._stored)
        self.num_free -= num_blocks

    def grow_to(self, num_tokens: int) -> bool:
        """Blocks for all that sequences have produced, beside their leases. False: there are not so many."""
        num_more = num_tokens // self._block_size - self._num_grown
        if num_more > self.num_free + self.num_cached:
            return False
        self._take(num_more)
        self._num_grown += num_more
        return True

    def commit(self, lease: Lease, pieces: Sequence[Piece]) -> None:
        """The KV of `pieces` has been computed or has landed: the cache has it, if not from others yet."""
        for key, num_blocks in pieces[len(lease.pinned) :]:
            if key in self._sizes:
                return  # the lease keeps its own copy, which no lookup finds
            self._sizes[key] = num_blocks
            self._pins[key] = 1
            lease.pinned.append(key)
            lease.num_own -= num_blocks
            _note((key, num_blocks), self._stored, self._removed)

    def release(self, lease: Lease) -> None:
        """The sequence's own blocks are free; what it pinned stays cached, its end being the next victim."""
        self.num_free += lease.num_own
        for key in reversed(lease.pinned):
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]
                self._idle[key] = None
                self.num_cached += self._sizes[key]

    def take_news(self) -> tuple[list[Piece], list[Piece]]:
        """Pieces stored and removed since the last call, in order; what came and went is in neither."""
        news = sorted(self._stored), sorted(self._removed)
        self._stored, self._removed = set(), set()
        return news


def _num_blocks(pieces: Sequence[Piece]) -> int:
    return sum(num_blocks for _, num_blocks in pieces)


def _note(piece: Piece, now_in: set[Piece], was_in: set[Piece]) -> None:
    if piece in was_in:
        was_in.discard(piece)
    else:
        now_in.add(piece)
