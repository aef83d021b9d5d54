"""The index of prefixes, case by case."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from flowkv_common.errors import BadRequest
from flowkv_common.wire.messages import NodeRef
from flowkv_common.wire.nodes import BlockList, BlocksChanged
from flowkv_scheduler import prefixes
from flowkv_scheduler.prefixes import PART_SIZE, Expected, PrefixIndex, keys_of
from tests.described_nodes import blocks_by_node, knows, num_hashes

A, B, C, D, E = CHAIN = [f"{number:016x}{0:016x}" for number in range(5)]
LONG = [f"{number:016x}{1:016x}" for number in range(100, 100 + 2 * PART_SIZE + 3)]
N0, N1 = NodeRef(node_id="n0", incarnation="1"), NodeRef(node_id="n1", incarnation="1")


def changed(
    node: NodeRef, seq: int, stored: Sequence[str] = (), removed: Sequence[str] = ()
) -> BlocksChanged:
    return BlocksChanged(node=node, seq=seq, stored=list(stored), removed=list(removed))


def page(node: NodeRef, seq: int, hashes: Sequence[str] = (), num_pages: int = 1) -> BlockList:
    return BlockList(node=node, seq=seq, num_pages=num_pages, block_hashes=list(hashes))


def blocks(index: PrefixIndex, hashes: Sequence[str], now: float = 0.0) -> dict[str, int]:
    return blocks_by_node(index.hits(keys_of(hashes), now))


def test_counts_each_nodes_blocks_from_the_front_of_the_chain() -> None:
    index = PrefixIndex()
    assert index.apply_change(changed(N0, 1, [A, B, C]))
    assert index.apply_change(changed(N1, 1, [A, C, D]))
    assert blocks(index, CHAIN) == {"n0": 3, "n1": 1}
    assert blocks(index, [A]) == {"n0": 1, "n1": 1}
    assert blocks(index, [B, A]) == {"n0": 2}
    assert blocks(index, [E]) == blocks(index, []) == {}
    assert index.apply_change(changed(N0, 2, [D], removed=[B]))
    assert blocks(index, CHAIN) == {"n0": 1, "n1": 1}


def test_after_a_gap_changes_wait_for_the_list() -> None:
    index = PrefixIndex()
    assert index.apply_change(changed(N0, 1, [A]))
    assert not index.apply_change(changed(N0, 3, [C]))
    assert not knows(index, N0)
    assert not index.apply_change(changed(N0, 4, removed=[A]))
    assert blocks(index, [A]) == {"n0": 1}  # what is known is still the best guess
    assert index.load_page(page(N0, 3, [A, C, D], num_pages=2), 0)
    assert index.load_page(page(N0, 4, [B], num_pages=2), 1)
    assert knows(index, N0)
    assert blocks(index, [A]) == {}
    assert blocks(index, [B, C, D]) == {"n0": 3}
    assert index.apply_change(changed(N0, 5, [A]))
    assert index.apply_change(changed(N0, 5, removed=[A]))  # heard before: no news
    assert blocks(index, [A]) == {"n0": 1}


def test_a_list_after_which_a_change_was_missed_must_be_loaded_again() -> None:
    index = PrefixIndex()
    assert not index.apply_change(changed(N0, 3, [A]))
    assert not index.apply_change(changed(N0, 5, [B]))
    assert not index.load_page(page(N0, 3, [A]), 0)
    assert not knows(index, N0)
    assert index.load_page(page(N0, 5, [C]), 0)
    assert blocks(index, [C]) == {"n0": 1}
    assert blocks(index, [A]) == {}  # on the first list, but not on this one


def test_a_list_that_is_older_than_what_is_known_must_be_loaded_again() -> None:
    index = PrefixIndex()
    assert index.load_page(page(N0, 3, [A]), 0)
    assert index.apply_change(changed(N0, 4, [B]))
    assert not index.load_page(page(N0, 3, [A]), 0)
    assert blocks(index, [A, B]) == {"n0": 2}


def test_no_more_changes_wait_than_a_list_can_make_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "MAX_WAITING", 3)
    index = PrefixIndex()
    for seq in range(2, 8):
        assert not index.apply_change(changed(N0, seq, [A]))
    assert not index.load_page(page(N0, 2), 0)  # 3 and 4 have been thrown away
    assert index.load_page(page(N0, 7, [B]), 0)
    assert blocks(index, [B]) == {"n0": 1}


def test_a_page_of_a_node_that_was_dropped_in_between_counts_for_nothing() -> None:
    index = PrefixIndex()
    assert index.load_page(page(N0, 1, [A], num_pages=2), 0)
    index.drop_node("n0")
    assert not index.load_page(page(N0, 1, [B], num_pages=2), 1)
    assert blocks(index, [A, B]) == blocks(index, [B]) == {}


def test_a_new_life_begins_with_nothing() -> None:
    index = PrefixIndex()
    index.apply_change(changed(N0, 1, [A, B]))
    index.expect([N0], LONG, until=9.0)
    assert index.apply_change(changed(NodeRef(node_id="n0", incarnation="2"), 1, [B]))
    assert blocks(index, CHAIN) == {}
    assert blocks(index, [B]) == {"n0": 1}


def test_what_is_expected_counts_until_then_and_stays_if_it_comes() -> None:
    index = PrefixIndex()
    index.apply_change(changed(N0, 1, [LONG[0]]))
    index.expect([N0], LONG, until=5.0)  # two whole parts, and a rest that doesn't count
    index.expect([N0], LONG[:PART_SIZE], until=7.0)
    assert blocks(index, LONG, 4.9) == {"n0": 2 * PART_SIZE}
    assert blocks(index, LONG, 5.0) == {"n0": PART_SIZE}
    index.apply_change(changed(N0, 2, LONG[1:3]))
    index.apply_change(changed(N0, 3, removed=[LONG[0]]))
    # The first was evicted before the prompt came, and will be computed again.
    assert blocks(index, LONG, 6.9) == {"n0": PART_SIZE}
    assert blocks(index, LONG, 7.0) == {}
    assert blocks(index, LONG[1:], 7.0) == {"n0": 2}
    assert num_hashes(index) == 2


def test_who_has_the_last_block_of_a_part_is_taken_to_have_all_of_it() -> None:
    index = PrefixIndex()
    index.apply_change(changed(N0, 1, [LONG[0], LONG[PART_SIZE - 1], LONG[PART_SIZE]]))
    index.apply_change(changed(N1, 1, [LONG[0], LONG[1], LONG[PART_SIZE]]))
    assert blocks(index, LONG) == {"n0": PART_SIZE + 1, "n1": 2}


def test_a_prefix_of_all_nodes_counts_them_all_longest_first() -> None:
    index = PrefixIndex()
    nodes = [NodeRef(node_id=f"m{number}", incarnation="1") for number in range(100)]
    for node in nodes:
        index.apply_change(changed(node, 1, LONG[:2]))
    index.apply_change(changed(nodes[70], 2, LONG[2:4]))
    index.drop_node("m3")
    hits = index.hits(keys_of(LONG), 0.0)
    assert len(blocks_by_node(hits)) == 99
    assert [hits.num_blocks(name) for name in ("m70", "m4", "m3", "nobody")] == [4, 2, 0, 0]
    assert list(hits.longest_first())[:4] == ["m70", "m0", "m1", "m2"]


def test_slots_of_nodes_that_left_are_used_again_only_when_they_are_clean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefixes, "KEYS_PER_CALL", 2)
    index = PrefixIndex()
    index.apply_change(changed(N0, 1, CHAIN))
    index.drop_node("n0")
    assert blocks(index, CHAIN) == {}
    for number in range(1, 4):
        node = NodeRef(node_id=f"n{number}", incarnation="1")
        assert index.apply_change(changed(node, 1))
        assert blocks(index, CHAIN) == {}
    assert num_hashes(index) == 0
    assert index._names == ["n3", "n1", "n2"]
    assert index.apply_change(changed(N0, 1, [A]))
    assert blocks(index, [A]) == {"n0": 1}


@pytest.mark.parametrize("wrong", ["", "00", "g" * 32, "0" * 31, "0" * 64])
def test_what_is_no_hash_is_refused_and_changes_nothing(wrong: str) -> None:
    index = PrefixIndex()
    with pytest.raises(BadRequest) as caught:
        keys_of([A, wrong])
    assert caught.value.field == "block_hashes"
    with pytest.raises(BadRequest):
        index.apply_change(changed(N0, 1, [A, wrong]))
    assert blocks(index, [A]) == {}
    assert index.apply_change(changed(N0, 1, [A]))


def test_what_has_ended_is_emptied_bit_by_bit() -> None:
    expected = Expected()
    expected.expect_keys(list(range(10)), bits=1, until=1.0)
    expected.expect_keys([1, 2], bits=2, until=2.5)
    assert expected.masks(0.9) == [dict.fromkeys(range(10), 1), {1: 2, 2: 2}]
    assert expected.masks(2.9) == [{1: 2, 2: 2}]
    assert expected.expect_keys([], bits=4, until=7.0) == 7  # takes no place
    for num_left in (6, 2, 0, 0):
        expected.expect_keys([7, 8], bits=1, until=9.0)
        assert sum(map(len, expected._ended)) == num_left
