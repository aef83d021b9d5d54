"""What a node tells of its prefix cache, change by change and page by page."""

from __future__ import annotations

import pytest

from flowkv_common.errors import BadRequest
from flowkv_common.wire.messages import NodeRef
from flowkv_common.wire.nodes import BlocksChanged
from flowkv_engine.kv.blocks import Blocks
from flowkv_node import reporting as block_news
from flowkv_node.reporting import BlockNews

REF = NodeRef(node_id="n", incarnation="1")


def cached(blocks: Blocks, *hashes: str) -> None:
    """One block per hash, held by nobody."""
    block_ids = blocks.allocate(len(hashes))
    for block_id, block_hash, parent in zip(block_ids, hashes, [None, *hashes], strict=False):
        blocks.commit(block_id, block_hash, parent)
    blocks.release(block_ids)


def overwrite_all(blocks: Blocks) -> None:
    blocks.release(blocks.allocate(blocks.num_blocks))


def told(change: BlocksChanged | None) -> tuple[int, set[str], set[str]]:
    assert change is not None
    assert change.node == REF
    return change.seq, set(change.stored), set(change.removed)


def test_tells_what_has_changed_since_and_nothing_while_nothing_does() -> None:
    blocks = Blocks(num_blocks=8)
    news = BlockNews(REF, blocks)
    assert news.next_change() is None
    cached(blocks, "a", "b")
    assert told(news.next_change()) == (1, {"a", "b"}, set())
    blocks.release(blocks.match_prefix(["a", "b"]))
    assert news.next_change() is None
    overwrite_all(blocks)
    cached(blocks, "c")
    assert told(news.next_change()) == (2, {"c"}, {"a", "b"})
    blocks.check_integrity()


def test_what_comes_and_goes_in_between_is_never_told() -> None:
    blocks = Blocks(num_blocks=4)
    news = BlockNews(REF, blocks)
    cached(blocks, "a")
    assert told(news.next_change()) == (1, {"a"}, set())
    cached(blocks, "x", "y")
    overwrite_all(blocks)
    cached(blocks, "a")  # in another block, for all we know
    assert news.next_change() is None
    assert news.page(0).block_hashes == ["a"]


def test_blocks_aborted_under_a_copy_are_told_as_removed() -> None:
    blocks = Blocks(num_blocks=4)
    news = BlockNews(REF, blocks)
    block_ids = blocks.allocate(1)
    blocks.commit(block_ids[0], "a", None)
    assert told(news.next_change()) == (1, {"a"}, set())
    blocks.quarantine(block_ids)
    blocks.settle(block_ids)
    assert told(news.next_change()) == (2, set(), {"a"})


def test_more_than_fits_waits_for_the_next_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_news, "MAX_CHANGES", 3)
    blocks = Blocks(num_blocks=8)
    news = BlockNews(REF, blocks)
    cached(blocks, *"abcde")
    first, second = news.next_change(), news.next_change()
    assert first is not None
    assert second is not None
    assert (first.stored, second.stored) == (["a", "b", "c"], ["d", "e"])
    overwrite_all(blocks)
    first, second = news.next_change(), news.next_change()
    assert first is not None
    assert second is not None
    assert (len(first.removed), len(second.removed)) == (3, 2)
    assert set(first.removed + second.removed) == set("abcde")
    assert news.next_change() is None


def test_cut_off_for_long_it_keeps_no_more_than_the_cache_holds() -> None:
    blocks = Blocks(num_blocks=4)
    news = BlockNews(REF, blocks)
    for number in range(100):
        cached(blocks, f"{number}a", f"{number}b", f"{number}c")
    stored, removed = blocks.prefix_cache.take_changes(1000)
    assert (len(stored) <= 4, removed) == (True, [])
    assert stored[-3:] == ["99a", "99b", "99c"]
    assert news.next_change() is None


def test_after_what_may_be_a_loss_a_number_is_missing_and_soon_noticed() -> None:
    blocks = Blocks(num_blocks=4)
    news = BlockNews(REF, blocks)
    cached(blocks, "a")
    news.next_change()
    news.skip()
    assert told(news.next_change()) == (3, set(), set())
    assert news.next_change() is None
    assert news.page(0).seq == 3


def test_messages_and_pages_are_as_large_as_a_server_takes_them() -> None:
    blocks = Blocks(num_blocks=100)
    news = BlockNews(REF, blocks, max_hashes=20)
    hashes = [f"{number:032x}" for number in range(30)]
    cached(blocks, *hashes)
    changes = [news.next_change(), news.next_change()]
    assert [len(change.stored) for change in changes if change] == [20, 10]
    pages = [news.page(number).block_hashes for number in range(10)]
    assert sorted(block_hash for page in pages for block_hash in page) == hashes
    with pytest.raises(BadRequest):
        news.page(10)


def test_pages_hold_what_was_told_each_hash_once() -> None:
    blocks = Blocks(num_blocks=block_news.PAGE_SIZE + 1)
    news = BlockNews(REF, blocks)
    hashes = [f"{number:032x}" for number in range(1000)]
    cached(blocks, *hashes)
    assert [news.page(number).block_hashes for number in (0, 1)] == [[], []]
    news.next_change()
    pages = [news.page(number) for number in (0, 1)]
    assert [(page.seq, page.num_pages) for page in pages] == [(1, 2), (1, 2)]
    assert sorted(pages[0].block_hashes + pages[1].block_hashes) == hashes
    assert all(page.block_hashes for page in pages)
    for number in (-1, 2):
        with pytest.raises(BadRequest) as caught:
            news.page(number)
        assert caught.value.field == "page"
