"""Stored responses: found by their own key alone, and never more than there may be."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv_common.errors import BadRequest, NotFound
from flowkv_gateway.response_store import ResponseStore, Stored, page_of_items
from flowkv_gateway.schemas import ContentPart, InputItem

HI = InputItem(role="user", content="hi")


def response(response_id: str, text: str = "hello") -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    message = {"id": f"msg_{response_id}", "type": "message", "role": "assistant", "content": [part]}
    return {"id": response_id, "object": "response", "output": [message]}


def test_a_response_goes_on_from_all_that_was_said() -> None:
    store = ResponseStore(9)
    store.add("", [HI], response("a"))
    history = store.history("", "a")
    assert [(item.role, item.content) for item in history] == [
        ("user", [ContentPart("input_text", "hi")]),
        ("assistant", [ContentPart("output_text", "hello")]),
    ]
    store.add("", [*history, HI], response("b"))
    assert len(store.history("", "b")) == 4
    store.delete("", "a")
    assert len(store.history("", "b")) == 4
    assert store.history("", None) == []


def test_others_and_unknown_ones_are_not_there() -> None:
    store = ResponseStore(9)
    store.add("alice", [HI], response("a"))
    for key_name, response_id in (("bob", "a"), ("", "a"), ("alice", "b")):
        for ask in (store.get, store.delete):
            with pytest.raises(NotFound):
                ask(key_name, response_id)
        with pytest.raises(BadRequest) as refused:
            store.history(key_name, response_id)
        assert refused.value.field == "previous_response_id"
    assert msgspec.json.decode(store.get("alice", "a").response)["id"] == "a"
    with pytest.raises(BadRequest, match="not stored here"):
        ResponseStore(0).history("", "a")
    with pytest.raises(NotFound, match="not stored here"):
        ResponseStore(0).get("", "a")


def test_a_reference_is_the_item_that_it_means() -> None:
    store = ResponseStore(1)
    store.add("", [HI], response("a"))
    reference = InputItem(type="item_reference", id="msg_a")
    hi, item = store.resolved("", [HI, reference])
    assert (hi, item.content) == (HI, [ContentPart("output_text", "hello")])
    store.add("", [HI], response("b"))
    for key_name, gone in (("", "msg_a"), ("bob", "msg_b")):
        with pytest.raises(BadRequest) as refused:
            store.resolved(key_name, [HI, InputItem(type="item_reference", id=gone)])
        assert refused.value.field == "input[1].id"


@given(st.lists(st.tuples(st.sampled_from("xy"), st.integers(0, 300))), st.integers(1, 4))
def test_the_newest_ones_stay_that_there_is_room_for(sizes: list[tuple[str, int]], most: int) -> None:
    store, max_bytes = ResponseStore(most, max_bytes=1000), 1000
    kept: list[tuple[str, str, int]] = []
    for number, (key_name, size) in enumerate(sizes):
        store.add(key_name, [HI], response(str(number), "a" * size))
        added = store._stored.get((key_name, str(number)))
        num_bytes = added.num_bytes if added else max_bytes + 1
        kept.append((key_name, str(number), num_bytes))
        while len(kept) > most or sum(one[2] for one in kept) > max_bytes:
            kept.pop(0)
        assert list(store._stored) == [one[:2] for one in kept]
        assert store._num_bytes == sum(one[2] for one in kept)
        assert list(store._places) == [(key, f"msg_{response_id}") for key, response_id, _ in kept]


def test_pages_of_items() -> None:
    items = [{"id": str(number)} for number in range(25)]
    stored = Stored(b"", msgspec.json.encode(items))

    def page(**wanted: str) -> tuple[list[int], bool]:
        shown = page_of_items(stored, wanted)
        ids = [item["id"] for item in shown["data"]]
        assert [shown["first_id"], shown["last_id"]] == ([ids[0], ids[-1]] if ids else [None, None])
        return [int(one) for one in ids], shown["has_more"]

    assert page() == ([*range(24, 4, -1)], True)
    assert page(order="asc", limit="100") == ([*range(25)], False)
    assert page(order="asc", limit="2", after="3") == ([4, 5], True)
    assert page(after="0") == ([], False)
    for wanted in ({"limit": "0"}, {"limit": "101"}, {"limit": "x"}, {"order": "up"}, {"after": "none"}):
        with pytest.raises(BadRequest) as refused:
            page(**wanted)
        assert refused.value.field == next(iter(wanted))
