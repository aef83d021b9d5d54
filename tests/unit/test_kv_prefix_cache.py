"""The order in which the prefix cache gives blocks up, where two sequences have computed the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flowkv_common.wire.messages import Run
from flowkv_engine.kv.blocks import PrefixCache
from flowkv_engine.kv.segments import IntegrityError, ids_of


@pytest.fixture
def cache() -> Iterator[PrefixCache]:
    cache = PrefixCache(num_blocks=10)
    yield cache
    cache.check_integrity()


def insert_chain(cache: PrefixCache, hashes: str, block_ids: list[int], parent: str | None = None) -> None:
    for block_id, block_hash in zip(block_ids, hashes, strict=True):
        cache.insert(block_id, block_hash, parent)
        parent = block_hash


def cool_one(cache: PrefixCache) -> str | None:
    [block_id] = ids_of(cache.cool(1))
    return cache.hash_of(block_id)


def test_a_chain_is_cooled_by_runs_from_its_end(cache: PrefixCache) -> None:
    insert_chain(cache, "abcde", [2, 3, 4, 7, 8])
    cache.retire([2, 3, 4, 7, 8])
    assert cache.cool(4) == [Run(7, 2), Run(3, 2)]
    assert (cache.num_warm, cache.num_cold) == (1, 4)


def test_what_is_held_by_nobody_but_built_on_goes_after_younger_chains(cache: PrefixCache) -> None:
    insert_chain(cache, "ab", [0, 1])
    cache.retire([0, 1])
    insert_chain(cache, "x", [2])
    cache.retire([2])
    insert_chain(cache, "c", [3], parent="b")  # computed by one who has its own "a" and "b"
    assert [cool_one(cache) for _ in range(3)] == ["x", "b", "a"]


def test_parents_are_as_young_as_what_builds_on_them(cache: PrefixCache) -> None:
    insert_chain(cache, "ab", [0, 1])
    insert_chain(cache, "c", [2], parent="b")
    cache.retire([0, 1])
    insert_chain(cache, "x", [3])
    cache.retire([3])
    cache.retire([2])
    assert [cool_one(cache) for _ in range(4)] == ["x", "c", "b", "a"]


def test_what_is_left_of_a_chain_that_was_held_back_stays_the_oldest(cache: PrefixCache) -> None:
    insert_chain(cache, "abc", [0, 1, 2])
    cache.retire([0, 1])
    assert cool_one(cache) == "b"  # though "c" is busy: there is nothing else
    insert_chain(cache, "x", [3])
    cache.retire([3])
    assert [cool_one(cache) for _ in range(2)] == ["a", "x"]


def test_a_block_forgotten_in_use_no_longer_holds_back_what_it_was_built_on(cache: PrefixCache) -> None:
    insert_chain(cache, "ab", [0, 1])
    cache.retire([0])
    cache.forget([1])
    insert_chain(cache, "x", [2])
    cache.retire([2])
    assert cache.find("b") is None
    assert [cool_one(cache) for _ in range(2)] == ["a", "x"]


def test_an_overwritten_hash_is_found_again_only_in_its_new_block(cache: PrefixCache) -> None:
    insert_chain(cache, "ab", [0, 1])
    cache.retire([0, 1])
    cache.cool(2)
    assert cache.match("ab") == [0, 1]
    cache.overwrite(Run(0, 2))
    assert cache.match("ab") == []
    assert (cache.num_cold, cache.hash_of(0)) == (0, None)
    insert_chain(cache, "a", [5])
    insert_chain(cache, "c", [1])
    assert (cache.match("ab"), cache.find("c")) == ([5], 1)


def test_found_again_in_the_middle_a_chain_keeps_its_order(cache: PrefixCache) -> None:
    insert_chain(cache, "abcd", [0, 1, 2, 3])
    cache.retire([0, 1, 2, 3])
    insert_chain(cache, "x", [4], parent="b")  # takes "a" and "b" with it
    assert cache.revive([2]) == []
    cache.retire([2])
    assert [cool_one(cache) for _ in range(4)] == ["d", "c", "b", "a"]


def test_an_index_that_disagrees_is_reported(cache: PrefixCache) -> None:
    insert_chain(cache, "a", [0])
    cache.num_cold = 1
    with pytest.raises(IntegrityError, match="cold blocks: 1 != 0"):
        cache.check_integrity()
    cache.num_cold = 0
