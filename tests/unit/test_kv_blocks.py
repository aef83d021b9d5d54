"""States of blocks, case by case."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from flowkv_engine.kv.blocks import Blocks, OutOfBlocks
from flowkv_engine.kv.segments import IntegrityError


@pytest.fixture
def blocks() -> Iterator[Blocks]:
    blocks = Blocks(num_blocks=10)
    yield blocks
    blocks.check_integrity()


def commit_chain(blocks: Blocks, block_ids: Sequence[int], hashes: Sequence[str]) -> None:
    for block_id, block_hash, parent in zip(block_ids, hashes, [None, *hashes], strict=False):
        blocks.commit(block_id, block_hash, parent)


def cache_chain(blocks: Blocks, *hashes: str) -> list[int]:
    """Leaves one block per hash in the cache."""
    block_ids = blocks.allocate(len(hashes))
    commit_chain(blocks, block_ids, hashes)
    blocks.release(block_ids)
    return block_ids


def states(blocks: Blocks) -> tuple[int, int, int, int]:
    counts = blocks.counts()
    return counts.free, counts.cached, counts.leased, counts.quarantined


def test_allocated_blocks_are_leased_and_come_back_free(blocks: Blocks) -> None:
    taken = blocks.allocate(4)
    assert states(blocks) == (6, 0, 4, 0)
    blocks.release(taken)
    assert states(blocks) == (10, 0, 0, 0)
    assert blocks.counts().longest_free_run == 10


def test_committed_blocks_are_found_by_their_chain(blocks: Blocks) -> None:
    chain = cache_chain(blocks, "a", "b", "c")
    assert blocks.match_prefix(["a", "b", "x", "c"]) == chain[:2]
    assert states(blocks) == (7, 1, 2, 0)
    blocks.release(chain[:2])


def test_a_shared_block_is_cached_only_after_its_last_holder(blocks: Blocks) -> None:
    chain = cache_chain(blocks, "a")
    assert blocks.match_prefix(["a"]) == blocks.match_prefix(["a"]) == chain
    blocks.release(chain)
    assert states(blocks) == (9, 0, 1, 0)
    blocks.release(chain)
    assert states(blocks) == (9, 1, 0, 0)


def test_the_older_of_two_equal_blocks_is_kept(blocks: Blocks) -> None:
    first, second = blocks.allocate(2)
    blocks.commit(first, "a", None)
    blocks.commit(second, "a", None)
    blocks.release([first, second])
    assert states(blocks) == (9, 1, 0, 0)
    assert blocks.match_prefix(["a"]) == [first]


def test_evicts_tails_first_and_the_least_recently_used_chain_first(blocks: Blocks) -> None:
    old, new = cache_chain(blocks, "a", "b", "c"), cache_chain(blocks, "x", "y", "z")
    blocks.release(blocks.match_prefix(["a", "b", "c"]))  # now x y z is the older one
    blocks.allocate(4)
    blocks.allocate(1)
    assert blocks.match_prefix(["x", "y", "z"]) == new[:2]
    assert blocks.match_prefix(["a", "b", "c"]) == old


def test_prompts_overwrite_the_least_recently_used_chain_and_no_other() -> None:
    """Each finds a run where that chain lay, though little is evicted ahead of need."""
    blocks = Blocks(num_blocks=80)
    chains = [[f"{name}{place}" for place in range(8)] for name in "abcdefghijklmnopqrst"]
    for number, chain in enumerate(chains):
        cache_chain(blocks, *chain)
        for lately in chains[max(0, number - 8) : number + 1]:
            found = blocks.match_prefix(lately)
            assert len(found) == 8
            blocks.release(found)
    blocks.check_integrity()


def full_pool_with_chain(*released: int) -> tuple[Blocks, list[int]]:
    """Ten blocks: five leased, of which `released` are free again, then a cached chain of five."""
    blocks = Blocks(num_blocks=10)
    taken = blocks.allocate(10)
    commit_chain(blocks, taken[5:], "abcde")
    blocks.release(taken[5:])
    blocks.release(taken[place] for place in released)
    return blocks, taken


def test_a_few_more_evictions_are_worth_one_run() -> None:
    blocks, taken = full_pool_with_chain(0, 2)
    assert blocks.allocate(4) == taken[6:]  # two are free, and two evictions would leave three runs
    assert states(blocks) == (2, 1, 7, 0)
    blocks.check_integrity()


def test_what_may_be_overwritten_is_found_until_it_is() -> None:
    blocks, taken = full_pool_with_chain(0, 2)
    assert blocks.allocate(3) == taken[7:]  # "b" was evictable too
    assert blocks.match_prefix(["a", "b", "c"]) == taken[5:7]
    blocks.release(taken[5:7])
    assert states(blocks) == (2, 2, 6, 0)
    blocks.check_integrity()


def test_a_sequence_grows_into_what_may_be_overwritten() -> None:
    blocks, taken = full_pool_with_chain()
    assert blocks.allocate(1) == [taken[9]]
    assert blocks.match_prefix(["a", "b", "c"]) == taken[5:8]
    assert blocks.grow(taken[7]) == taken[8]  # "d" was cached there
    blocks.check_integrity()


def test_a_parent_whose_child_is_leased_goes_last_but_goes(blocks: Blocks) -> None:
    parent, child = blocks.allocate(2)
    blocks.commit(parent, "a", None)
    blocks.commit(child, "b", "a")
    blocks.release([parent])
    cache_chain(blocks, "x")
    blocks.allocate(8)
    assert blocks.match_prefix(["x"]) == []
    assert blocks.can_allocate(1)
    assert blocks.allocate(1) == [parent]
    assert blocks.match_prefix(["a", "b"]) == []


def test_out_of_blocks_changes_nothing(blocks: Blocks) -> None:
    chain = cache_chain(blocks, "a", "b")
    held = blocks.allocate(6)
    assert not blocks.can_allocate(5)
    with pytest.raises(OutOfBlocks, match="5 blocks wanted, 2 are free, 2 evictable"):
        blocks.allocate(5)
    with pytest.raises(OutOfBlocks):
        blocks.plan_runs(5)
    assert blocks.match_prefix(["a", "b"]) == chain
    blocks.release(held)


def test_grows_in_place_while_it_can(blocks: Blocks) -> None:
    [first] = blocks.allocate(1, room=2)
    assert blocks.grow(first) == first + 1
    assert blocks.grow(first + 1) == first + 2
    moved = blocks.grow(first + 2)
    assert moved not in range(first, first + 3)
    assert blocks.grow(None) not in (first, moved)


def test_grow_raises_when_nothing_is_left(blocks: Blocks) -> None:
    blocks.allocate(10)
    with pytest.raises(OutOfBlocks):
        blocks.grow(3)


def test_plan_runs_tells_what_allocate_will_give(blocks: Blocks) -> None:
    taken = blocks.allocate(10)
    blocks.release([taken[1], taken[2], taken[5]])
    plan = blocks.plan_runs(3)
    assert plan == [2, 1]
    assert blocks.allocate(3) == [taken[1], taken[2], taken[5]]


def test_plan_runs_counts_what_will_be_evicted(blocks: Blocks) -> None:
    cache_chain(blocks, *"abc")
    blocks.allocate(5)
    assert blocks.plan_runs(4) == [2, 2]


def test_quarantined_blocks_are_nobodys_until_settled(blocks: Blocks) -> None:
    shared, own, anonymous = blocks.allocate(3)
    commit_chain(blocks, [shared, own], ["a", "b"])
    blocks.match_prefix(["a"])
    blocks.quarantine([shared, own, anonymous])
    assert states(blocks) == (7, 0, 1, 2)
    assert blocks.match_prefix(["a", "b"]) == [shared]
    blocks.settle([own, anonymous])
    assert states(blocks) == (9, 0, 1, 0)


def test_refuses_to_release_what_is_not_leased_and_then_changes_nothing(blocks: Blocks) -> None:
    [block] = blocks.allocate(1)
    for wrong in ([block, block], [block, 7 - block], [99]):
        with pytest.raises(ValueError, match="not leased"):
            blocks.release(wrong)
        with pytest.raises(ValueError, match="not leased"):
            blocks.quarantine(wrong)
    assert states(blocks) == (9, 0, 1, 0)
    with pytest.raises(ValueError, match="not quarantined"):
        blocks.settle([block])


def test_refuses_to_commit_wrongly(blocks: Blocks) -> None:
    [block] = blocks.allocate(1)
    blocks.commit(block, "a", None)
    blocks.commit(block, "a", None)
    with pytest.raises(ValueError, match="committed as a"):
        blocks.commit(block, "b", None)
    with pytest.raises(ValueError, match="not leased"):
        blocks.commit(block - 1, "b", "a")


def test_a_lost_block_is_reported_with_both_sides(blocks: Blocks) -> None:
    [block] = blocks.allocate(1)
    blocks._refs[block] = 0
    with pytest.raises(IntegrityError, match=r"blocks not free.* 0 != 1"):
        blocks.check_integrity()
    blocks._refs[block] = 1


def test_the_strip_shows_where_blocks_are() -> None:
    blocks = Blocks(20)
    assert blocks.strip(5) == "00" * 5
    first = blocks.allocate(8)
    blocks.commit(first[0], "a", None)
    blocks.release(first[:4])
    at = dict.fromkeys(first[4:], "l") | {first[0]: "c"}
    cells = ["".join(at.get(block_id, "f") for block_id in range(cell, cell + 4)) for cell in range(0, 20, 4)]
    expected = [f"{-(-9 * cell.count('l') // 4)}{-(-9 * cell.count('c') // 4)}" for cell in cells]
    assert blocks.strip(5) == "".join(expected) != "00" * 5
    assert len(blocks.strip(64)) == 2 * 20
