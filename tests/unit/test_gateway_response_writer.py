"""An answer as OpenAI's Responses show it: a stream's events add up to the whole answer."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from flowkv_common.errors import FlowKVError, Full, Unavailable
from flowkv_common.wire.messages import TokenLogprob
from flowkv_gateway.errors import ContextLengthExceeded
from flowkv_gateway.output import Delta, Usage
from flowkv_gateway.parsers import Arguments, CallBegins, Content, Event, Reasoning
from flowkv_gateway.response_writer import ResponseWriter
from flowkv_gateway.schemas import ResponseRequest
from flowkv_gateway.tokenizer import Vocabulary

VOCABULARY = Vocabulary({1: b"one", 2: b" two", 3: b"</x>"}, frozenset())


def writer(**fields: Any) -> ResponseWriter:
    return ResponseWriter(ResponseRequest(input="hi", **fields), VOCABULARY, "m")


def used() -> Usage:
    return Usage(num_prompt=9, num_cached=4, num_output=3, num_reasoning=None)


def delta(*events: Event, end: str | None = None, token_id: int | None = None) -> Delta:
    logprob = None if token_id is None else TokenLogprob(token_id=token_id, logprob=-0.5, top=[(2, -1.0)])
    return Delta(0, "", False, end, logprob, 0, token_id, events)


def plain(text: str, end: str | None = None, token_id: int | None = None) -> Delta:
    """Of an answer in which nothing is looked for."""
    return delta(end=end, token_id=token_id)._replace(text=text, events=None)


def whole(*deltas: Delta) -> dict[str, Any]:
    shown: dict[str, Any] = msgspec.json.decode(writer().whole([deltas], used()))
    return shown


def streamed(*deltas: Delta) -> list[dict[str, Any]]:
    """All events of a stream. Their names are their types."""
    one = writer()
    sent = one.opening(used) + b"".join([one.delta(delta, used) for delta in deltas]) + one.closing(used)
    return events_in(sent)


def events_in(sent: bytes) -> list[dict[str, Any]]:
    *parts, rest = sent.split(b"\n\n")
    assert rest == b""
    events = []
    for part in parts:
        name, data = part.split(b"\n")
        events.append(msgspec.json.decode(data.removeprefix(b"data: ")))
        assert name == b"event: " + events[-1]["type"].encode()
    return events


def types(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


ANSWER = (
    delta(Reasoning("h")),
    delta(Reasoning("m")),
    delta(Content("We")),
    delta(),
    delta(Content("ll.")),
    delta(CallBegins(0, "f", "c0"), Arguments(0, "{")),
    delta(Arguments(0, "}")),
    delta(CallBegins(1, "g")),
    delta(Arguments(1, "{}"), end="tool_calls"),
)


def test_a_whole_answer() -> None:
    response = whole(*ANSWER)
    assert (response["object"], response["status"], response["error"]) == ("response", "completed", None)
    reasoning, message, first, second = response["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert (message["role"], message["content"][0]["text"]) == ("assistant", "Well.")
    assert (first["name"], first["arguments"], first["call_id"]) == ("f", "{}", "c0")
    assert second["call_id"].startswith("call_")
    assert [item["id"].partition("_")[0] for item in response["output"]] == ["rs", "msg", "fc", "fc"]
    assert {item["status"] for item in response["output"]} == {"completed"}
    assert response["usage"] == {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 12,
    }


def test_a_stream() -> None:
    part = ["content_part.done", "output_item.done"]
    call = ["output_item.added", "function_call_arguments.delta"]
    assert types(streamed(*ANSWER)) == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("reasoning_text.delta", "reasoning_text.delta", "reasoning_text.done", *part),
        *("output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.delta", "output_text.done", *part),
        *(*call, "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        *(*call, "function_call_arguments.done", "output_item.done", "completed"),
    ]
    created = streamed(*ANSWER)[0]["response"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)


EVENT = st.one_of(
    st.builds(Content, st.text(min_size=1, max_size=3)),
    st.builds(Reasoning, st.text(min_size=1, max_size=3)),
    st.builds(lambda text: (CallBegins(0, "f"), Arguments(0, text)), st.text(min_size=1, max_size=3)),
)


@given(st.lists(st.lists(EVENT, max_size=3), max_size=6), st.sampled_from(["stop", "length"]))
def test_events_add_up_to_what_the_last_one_says(drawn: list[list[Any]], end: str) -> None:
    deltas = []
    for several in drawn:
        flat: list[Event] = []
        for event in several:
            flat += event if type(event) is tuple else [event]
        deltas.append(delta(*flat))
    events = streamed(*deltas, delta(end=end))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    items: list[dict[str, Any]] = []
    texts: list[str] = []
    for event in events[2:-1]:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert event["output_index"] == len(items)
            items.append(event["item"])
            texts.append("")
            continue
        assert event["output_index"] == len(items) - 1
        if kind == "response.output_item.done":
            assert event["item"]["id"] == items[-1]["id"]
            items[-1] = event["item"]
            continue
        assert event["item_id"] == items[-1]["id"]
        if kind.endswith(".delta"):
            texts[-1] += event["delta"]
        elif kind.endswith("content_part.done"):
            assert event["part"]["text"] == texts[-1]
        elif kind.endswith(".done"):
            assert event.get("text", event.get("arguments")) == texts[-1]
    last = events[-1]["response"]
    assert last["output"] == items
    assert [item.get("arguments") or item["content"][0]["text"] for item in items] == texts
    assert last["status"] == {"stop": "completed", "length": "incomplete"}[end]


def test_a_call_has_the_namespace_of_its_function() -> None:
    body = b"""{"input": "hi", "tools": [{"type": "function", "name": "f"}, {"type": "namespace", "name": "n",
    "tools": [{"type": "function", "name": "f"}]}]}"""
    one = ResponseWriter(msgspec.json.decode(body, type=ResponseRequest), VOCABULARY, "m")
    called = delta(CallBegins(0, "n__f"), Arguments(0, "{}"))
    calls = [called, delta(CallBegins(1, "f"), Arguments(1, "{}"), end="tool_calls")]
    first, second = msgspec.json.decode(one.whole([calls], used()))["output"]
    assert (first["name"], first["namespace"]) == ("f", "n")
    assert second["name"] == "f"
    assert "namespace" not in second


def test_reasoning_is_shown_as_a_summary_to_those_who_ask_for_one() -> None:
    body = (
        b"""{"input": "hi", "reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content"]}"""
    )
    one = ResponseWriter(msgspec.json.decode(body, type=ResponseRequest), VOCABULARY, "m")
    events = events_in(one.delta(delta(Reasoning("h"), Reasoning("m"), Content("!"), end="stop"), used))
    assert types(events)[:7] == [
        *("output_item.added", "reasoning_summary_part.added"),
        *("reasoning_summary_text.delta", "reasoning_summary_text.delta", "reasoning_summary_text.done"),
        *("reasoning_summary_part.done", "output_item.done"),
    ]
    assert {event["summary_index"] for event in events[1:6]} == {0}
    assert "content" not in events[0]["item"]
    item = events[6]["item"]
    assert item["summary"] == [{"type": "summary_text", "text": "hm"}]
    assert item["encrypted_content"]
    assert "encrypted_content" not in whole(delta(Reasoning("hm"), end="stop"))["output"][0]


def test_an_answer_that_breaks_off() -> None:
    response = whole(plain("We"), plain("ll", end="length"))
    assert (response["status"], response["completed_at"]) == ("incomplete", None)
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"
    assert types(streamed(plain("We", end="length")))[-1] == "incomplete"


def test_a_call_that_breaks_off_is_incomplete() -> None:
    for reason in ("stop", "length"):
        call = delta(CallBegins(0, "f"), Arguments(0, '{"a": '))
        broken, rest = whole(call, delta(Content("<tool_call>"), end=reason))["output"]
        assert (broken["type"], broken["status"]) == ("function_call", "incomplete")
        assert rest["status"] == ("completed" if reason == "stop" else "incomplete")


def test_an_answer_without_a_word_is_a_message() -> None:
    [message] = whole(plain("", end="stop"))["output"]
    assert message["content"] == [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
    [one] = whole(delta(Reasoning("hm"), end="length"))["output"]
    assert one["type"] == "reasoning"


def test_a_token_without_text_sends_nothing() -> None:
    one = writer()
    assert one.delta(plain(""), used) == b""


def test_log_probabilities_are_of_the_text() -> None:
    deltas = (
        delta(Reasoning("h"), token_id=1),
        delta(token_id=3),  # ends the reasoning
        delta(Content("one"), token_id=1),
        delta(token_id=2),  # held back
        delta(Content(" two!"), token_id=1, end="stop"),
    )
    [_, message] = whole(*deltas)["output"]
    shown = message["content"][0]["logprobs"]
    assert [entry["token"] for entry in shown] == ["one", " two", "one"]
    assert shown[0] == {
        "token": "one",
        "logprob": -0.5,
        "bytes": list(b"one"),
        "top_logprobs": [{"token": " two", "logprob": -1.0, "bytes": list(b" two")}],
    }
    told = [event for event in streamed(*deltas) if event["type"] == "response.output_text.delta"]
    assert [len(event["logprobs"]) for event in told] == [1, 2]
    [held] = whole(plain("", token_id=2), plain(" two", token_id=1, end="stop"))["output"]
    assert len(held["content"][0]["logprobs"]) == 2


def test_a_failure_says_why() -> None:
    def failed(error: FlowKVError) -> dict[str, Any]:
        one = writer()
        one.opening(used)
        one.delta(plain("We"), used)
        [event] = events_in(one.failure(error))
        assert (event["type"], event["response"]["status"]) == ("response.failed", "failed")
        shown: dict[str, Any] = event["response"]["error"]
        return shown

    assert failed(Unavailable("no")) == {"code": "server_error", "message": "no"}
    assert failed(Full("busy"))["code"] == "rate_limit_exceeded"
    assert failed(ContextLengthExceeded("long"))["code"] == "context_length_exceeded"


def test_what_is_asked_is_repeated() -> None:
    request = msgspec.json.decode(
        b'{"input": "hi", "instructions": "Code.", "tools": [{"type": "function", "name": "f"}],'
        b'"text": {"format": {"type": "json_schema", "name": "n", "schema": {}}}, "metadata": {"a": "b"},'
        b'"reasoning": {"effort": "low"}, "max_output_tokens": 5, "truncation": "auto"}',
        type=ResponseRequest,
    )
    one = ResponseWriter(request, VOCABULARY, "m")
    response = msgspec.json.decode(one.whole([[plain("x", end="stop")]], used()))
    assert response["tools"][0]["name"] == "f"
    assert response["text"]["format"] == {"type": "json_schema", "name": "n", "schema": {}}
    assert (response["instructions"], response["metadata"]) == ("Code.", {"a": "b"})
    assert (response["max_output_tokens"], response["truncation"]) == (5, "auto")
    assert response["reasoning"] == {"effort": "low", "summary": None}
    assert (response["tool_choice"], response["parallel_tool_calls"]) == ("auto", True)
