"""The order in which the prefix cache gives blocks up, where two sequences have computed the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flowkv_common.wire.messages import Run
from flowkv_engine.kv.blocks import PrefixCache
from flowkv_engine.kv.segments import IntegrityError


@pytest.fixture
def cache() -> Iterator[PrefixCache]:
    cache = PrefixCache(num_blocks=10)
    yield cache
    cache.check_integrity()


def insert_chain(cache: PrefixCache, hashes: str, block_ids: list[int], parent: str | None = None) -> None:
    for block_id, block_hash in zip(block_ids, hashes, strict=True):
        cache.insert(block_id, block_hash, parent)
        parent = block_hash


def evict_one(cache: PrefixCache) -> str | None:
    [block_id] = cache.evict(1)
    return cache.hash_of(block_id)


def test_a_chain_is_evicted_from_its_end(cache: PrefixCache) -> None:
    insert_chain(cache, "abcde", [2, 3, 4, 7, 8])
    cache.queue([2, 3, 4, 7, 8])
    assert cache.evict(4) == [8, 7, 4, 3]
    assert (cache.num_queued, cache.num_evictable) == (1, 4)


def test_what_leased_blocks_build_on_is_evicted_after_younger_chains(cache: PrefixCache) -> None:
    insert_chain(cache, "ab", [0, 1])
    cache.queue([0, 1])
    insert_chain(cache, "x", [2])
    cache.queue([2])
    insert_chain(cache, "c", [3], parent="b")  # computed by a sequence with its own "a" and "b"
    assert [evict_one(cache) for _ in range(3)] == ["x", "b", "a"]


def test_parents_are_as_young_as_what_builds_on_them(cache: PrefixCache) -> None:
    insert_chain(cache, "ab", [0, 1])
    insert_chain(cache, "c", [2], parent="b")
    cache.queue([0, 1])
    insert_chain(cache, "x", [3])
    cache.queue([3])
    cache.queue([2])
    assert [evict_one(cache) for _ in range(4)] == ["x", "c", "b", "a"]


def test_what_is_left_of_a_chain_evicted_as_last_resort_is_next(cache: PrefixCache) -> None:
    insert_chain(cache, "abc", [0, 1, 2])
    cache.queue([0, 1])
    assert evict_one(cache) == "b"  # though "c" is leased: there is nothing else
    insert_chain(cache, "x", [3])
    cache.queue([3])
    assert [evict_one(cache) for _ in range(2)] == ["a", "x"]


def test_a_forgotten_block_no_longer_keeps_what_it_was_built_on(cache: PrefixCache) -> None:
    insert_chain(cache, "ab", [0, 1])
    cache.queue([0])
    cache.forget([1])
    insert_chain(cache, "x", [2])
    cache.queue([2])
    assert cache.find("b") is None
    assert [evict_one(cache) for _ in range(2)] == ["a", "x"]


def test_an_overwritten_hash_is_found_again_only_in_its_new_block(cache: PrefixCache) -> None:
    insert_chain(cache, "ab", [0, 1])
    cache.queue([0, 1])
    cache.evict(2)
    assert cache.match("ab") == [0, 1]
    cache.overwrite(Run(0, 2))
    assert cache.match("ab") == []
    assert (cache.num_evictable, cache.hash_of(0)) == (0, None)
    insert_chain(cache, "a", [5])
    insert_chain(cache, "c", [1])
    assert (cache.match("ab"), cache.find("c")) == ([5], 1)


def test_found_again_in_the_middle_a_chain_keeps_its_order(cache: PrefixCache) -> None:
    insert_chain(cache, "abcd", [0, 1, 2, 3])
    cache.queue([0, 1, 2, 3])
    insert_chain(cache, "x", [4], parent="b")  # takes "a" and "b" with it
    assert cache.lease([2]) == []
    cache.queue([2])
    assert [evict_one(cache) for _ in range(4)] == ["d", "c", "b", "a"]


def test_an_index_that_disagrees_is_reported(cache: PrefixCache) -> None:
    insert_chain(cache, "a", [0])
    cache.num_evictable = 1
    with pytest.raises(IntegrityError, match="evictable blocks: 1 != 0"):
        cache.check_integrity()
    cache.num_evictable = 0


def test_a_parent_in_the_cache_is_evicted_after_a_child_of_another_sequence(cache: PrefixCache) -> None:
    insert_chain(cache, "a", [0])
    insert_chain(cache, "b", [1], parent="a")  # computed by a sequence with its own "a"
    insert_chain(cache, "c", [2], parent="b")  # by the first one, with its own "b"
    insert_chain(cache, "d", [3], parent="b")  # by a third one, with its own "a" and "b"
    cache.queue([1])
    cache.queue([0, 2])
    assert [evict_one(cache) for _ in range(3)] == ["c", "b", "a"]
