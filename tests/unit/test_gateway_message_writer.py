"""A message in blocks: the events of a stream open, fill and close what the whole answer has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from flowkv_gateway.message_writer import MessageWriter
from flowkv_gateway.output import Delta
from flowkv_gateway.parsers import Arguments, CallBegins, Content, Event, Reasoning
from tests.gateway_support import no_usage
from tests.message_events import events_of, joined, without_ids

TEXT = st.text(min_size=1, max_size=5)
KINDS = st.lists(st.sampled_from([Content, Reasoning, CallBegins]), max_size=5)


def deltas_of(groups: Sequence[Sequence[Event] | None], text: str = "", reason: str = "stop") -> list[Delta]:
    """One for each of the groups; the last ends the answer."""
    return [
        Delta(0, text, place == 0, reason if place == len(groups) - 1 else None, None, 0, 1, group)
        for place, group in enumerate(groups)
    ]


def whole(deltas: Sequence[Delta]) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(MessageWriter("m", 99).whole([deltas], no_usage()))
    del message["id"]
    return message


def streamed(deltas: Sequence[Delta]) -> dict[str, Any]:
    writer = MessageWriter("m", 99)
    events = [writer.delta(delta, no_usage) for delta in deltas] + [writer.closing(no_usage)]
    return joined(events_of(b"".join(events).decode()))


@settings(max_examples=40)
@given(data=st.data())
def test_a_stream_adds_up_to_the_whole_message(data: st.DataObject) -> None:
    events: list[Event] = []
    for kind in data.draw(KINDS):
        if kind is CallBegins:
            call = sum(isinstance(event, CallBegins) for event in events)
            events.append(CallBegins(call, data.draw(TEXT), data.draw(st.none() | TEXT)))
            arguments = json.dumps({"a": data.draw(TEXT)}, ensure_ascii=False)
            cut = data.draw(st.integers(0, len(arguments)))
            events += [Arguments(call, arguments[:cut]), Arguments(call, arguments[cut:])]
        else:
            events += [kind(text) for text in data.draw(st.lists(TEXT, min_size=1, max_size=3))]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(events)), max_size=4)))
    groups = [events[start:end] for start, end in zip([0, *cuts], [*cuts, None], strict=True)]
    deltas = deltas_of(groups, reason=data.draw(st.sampled_from(["stop", "length", "tool_calls"])))
    assert without_ids(streamed(deltas)) == without_ids(whole(deltas))
    ids = [event.id for event in events if isinstance(event, CallBegins)]
    calls = [block for block in whole(deltas)["content"] if block["type"] == "tool_use"]
    assert len(calls) == len(ids)
    for call, call_id in zip(calls, ids, strict=True):
        assert call["id"] == call_id if call_id else call["id"].startswith("toolu_")


def test_blocks_come_in_the_order_in_which_they_were_written() -> None:
    events: list[Event] = [
        Reasoning("hm"),
        Reasoning("."),
        Content("a"),
        CallBegins(0, "f"),
        Arguments(0, '{"x": 10000000000000000000001}'),
        CallBegins(1, "g"),
        Content("b"),
    ]
    kinds = ["thinking", "text", "tool_use", "tool_use", "text"]
    for message in (whole(deltas_of([events])), streamed(deltas_of([[event] for event in events]))):
        assert [block["type"] for block in message["content"]] == kinds
        assert message["content"][0] == {"type": "thinking", "thinking": "hm.", "signature": "unsigned"}
        assert [block["input"] for block in message["content"][2:4]] == [{"x": 10**22 + 1}, {}]


def test_without_a_reader_all_is_text() -> None:
    for made in (whole, streamed):
        assert made(deltas_of([None, None], "ab"))["content"] == [{"type": "text", "text": "abab"}]
        assert made(deltas_of([None, None]))["content"] == []
