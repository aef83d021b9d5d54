"""An answer as the client of a chat reads it: content, reasoning and calls, whole and in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv_common.wire.messages import SamplingParams
from flowkv_gateway.calls import tell_of_tools
from flowkv_gateway.output import ChatWriter, Choice, Delta, Display, prepare_stops
from flowkv_gateway.parsers import Parser
from flowkv_gateway.parsers.hermes import Hermes
from flowkv_gateway.parsers.kimi import Kimi
from flowkv_gateway.reader import AnswerReader
from flowkv_gateway.request_state import RequestState
from flowkv_gateway.schemas import ChoicesRequest
from flowkv_gateway.tokenizer import Vocabulary
from tests.gateway_support import no_usage, token_chunk

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
END, MARK = "<|end|>", "<|mark|>"
F = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
G = '<tool_call>\n{"name": "g", "arguments": {"b": "x"}}\n</tool_call>'


def deltas_of(
    tokens: Sequence[str],
    parser: type[Parser] = Hermes,
    *,
    finish_reason: str = "stop",
    stop: str = "",
    streams: bool = False,
    **reader: Any,
) -> list[Delta]:
    """Of an answer of these tokens; `END` and `MARK` are special ones."""
    texts = sorted({END, MARK, *tokens})
    special = frozenset(texts.index(text) for text in (END, MARK))
    vocabulary = Vocabulary(dict(enumerate(text.encode() for text in texts)), special)
    request = RequestState("r", [1], SamplingParams(max_tokens=99), 60.0, "f")
    display = Display(
        prepare_stops([stop] if stop else (), vocabulary.special_texts),
        stop_ids=frozenset({texts.index(END)}),
    )
    shows = {"special_texts": vocabulary.special_texts, **reader}
    reads = AnswerReader(parser(TOOLS, streams_calls=streams), **shows)
    choice = Choice(0, request, vocabulary, display, reads)

    def made() -> Iterator[Delta]:
        for place, text in enumerate(tokens, start=1):
            reason = finish_reason if place == len(tokens) else None
            yield from choice.push(token_chunk(texts.index(text), finish_reason=reason))
            if choice.finish_reason is not None:
                return

    return list(made())


def whole(tokens: Sequence[str], parser: type[Parser] = Hermes, **fields: Any) -> dict[str, Any]:
    """The message, and why it ended. Ids are of the gateway's making and of no length that matters here."""
    choice = writer().choice(deltas_of(tokens, parser, **fields), is_chunk=False)
    return {**choice["message"], "finish_reason": choice["finish_reason"]}


def joined(tokens: Sequence[str], **fields: Any) -> dict[str, Any]:
    """The same, as a client puts the chunks of a stream together."""
    message: dict[str, Any] = {"content": "", "reasoning": ""}
    calls: list[dict[str, Any]] = []
    for delta in deltas_of(tokens, streams=True, **fields):
        shown = msgspec.json.decode(writer().delta(delta, no_usage)[len(b"data: ") :])["choices"][0]
        for name in ("content", "reasoning"):
            message[name] += shown["delta"].get(name, "")
        for piece in shown["delta"].get("tool_calls", ()):
            if piece["index"] == len(calls):
                assert list(piece) == ["index", "id", "type", "function"]
                calls.append({**piece, "function": {**piece["function"], "arguments": ""}})
            calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
        message["finish_reason"] = shown["finish_reason"]
    return {**message, "calls": [call["function"] for call in calls]}


def writer() -> ChatWriter:
    return ChatWriter(Vocabulary({}, frozenset()), "m", ChoicesRequest())


def test_calls_and_reasoning_of_a_whole_answer() -> None:
    answer = whole(["<think>", "hm", "</think>", "\n\n", "Well. ", F, "\n", G, END])
    calls = answer.pop("tool_calls")
    assert answer == {
        "role": "assistant",
        "content": "Well.",
        "refusal": None,
        "reasoning_content": "hm",
        "reasoning": "hm",
        "finish_reason": "tool_calls",
    }
    ids = [call.pop("id") for call in calls]
    assert calls == [
        {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"type": "function", "function": {"name": "g", "arguments": '{"b": "x"}'}},
    ]
    assert len(set(ids)) == 2
    assert all(call_id.startswith("call_") for call_id in ids)


def test_content_is_null_only_beside_calls() -> None:
    assert whole([F, END])["content"] is None
    assert whole([END])["content"] == ""
    assert whole(["<think>", "hm", END])["content"] == ""


@given(data=st.data())
def test_a_stream_adds_up_to_the_whole_answer(data: st.DataObject) -> None:
    parts = data.draw(
        st.lists(st.sampled_from(["Well. ", F, "\n", G, "<tool", MARK, "{", "\u20ac"]), max_size=5)
    )
    thought = data.draw(st.sampled_from(["", "<think>a\nb</think>\n"]))
    tokens: list[str] = []
    for part in [thought, *parts]:
        if part == MARK:  # special tokens are whole
            tokens.append(part)
            continue
        cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(part) - 1)), max_size=4)))
        tokens += [part[start:end] for start, end in zip([0, *cuts], [*cuts, None], strict=True)]
    tokens = [token for token in tokens if token] + [END]
    answer, streamed = whole(tokens), joined(tokens)
    assert streamed["content"] == (answer["content"] or "")
    assert streamed["reasoning"] == answer.get("reasoning", "")
    assert streamed["calls"] == [call["function"] for call in answer.get("tool_calls", ())]
    assert streamed["finish_reason"] == answer["finish_reason"]
    assert MARK not in streamed["content"]


def test_arguments_come_in_pieces_after_the_name() -> None:
    tokens = ["<tool_call>", '{"name": "f", ', '"arguments": {', '"a": ', "1}", "}", "</tool_call>", END]
    shown = [writer().choice([delta], is_chunk=True)["delta"] for delta in deltas_of(tokens, streams=True)]
    pieces = [piece["function"] for delta in shown for piece in delta.get("tool_calls", ())]
    assert len(pieces) > 2
    assert pieces[0]["name"] == "f"
    assert not any("name" in piece for piece in pieces[1:])
    assert "".join(piece["arguments"] for piece in pieces) == '{"a": 1}'
    assert shown[0]["role"] == "assistant"
    assert not any("role" in delta for delta in shown[1:])


def test_special_tokens_reach_the_parser_and_not_the_client() -> None:
    assert whole(["one", MARK, " two", END])["content"] == "one two"
    shown = whole(["one", MARK, " two", END], special_texts=frozenset())
    assert shown["content"] == "one<|mark|> two"
    # Its text, written with other tokens, is text.
    assert whole(["<|", "mark|>", END])["content"] == MARK


def test_the_models_own_ids() -> None:
    call = "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    tokens = ["<|tool_calls_section_begin|>", call, "<|tool_calls_section_end|>", END]
    [made] = whole(tokens, Kimi)["tool_calls"]
    assert made["id"] == "functions.f:0"


def test_a_call_that_breaks_off_is_content() -> None:
    answer = whole(["<tool_call>", '{"name": "f", '], finish_reason="length")
    assert answer["finish_reason"] == "length"
    assert answer["content"] == '<tool_call>{"name": "f", '
    assert "tool_calls" not in answer


def test_a_stop_string_ends_an_answer_with_its_calls_so_far() -> None:
    answer = whole([F, "\n", "Human:", " hi"], stop="Human:")
    assert answer["finish_reason"] == "tool_calls"
    assert len(answer["tool_calls"]) == 1


def test_a_call_that_a_stop_string_cuts_is_no_reason_to_call() -> None:
    tokens = ["<tool_call>", '{"name": "f", "arguments": {"a": ', "Human", ":", " 1}"]
    for make in (whole, joined):
        assert make(tokens, stop="Human:")["finish_reason"] == "stop"
        assert make([F, "\n", *tokens], stop="Human:")["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("streams", [False, True])
def test_only_one_call_where_only_one_is_wanted(streams: bool) -> None:
    tokens = [F, "\n", "<tool_call>", '{"name": "g", "arguments": {', "}", "}</tool_call>", "more", END]
    deltas = deltas_of(tokens, streams=streams, max_calls=1)
    assert len(deltas) < len(tokens) - 1  # the rest is not waited for
    message = writer().choice(deltas, is_chunk=False)["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["f"]
    assert deltas[-1].finish_reason == "tool_calls"


def test_reasoning_is_counted_and_can_be_left_out() -> None:
    vocabulary = Vocabulary({0: b"<think>", 1: b"a", 2: b"</think>", 3: b"b"}, frozenset())
    reader = AnswerReader(Hermes(), shows_reasoning=False)
    request = RequestState("r", [1], SamplingParams(max_tokens=99), 60.0, "f")
    choice = Choice(0, request, vocabulary, Display(), reader)
    deltas = list(choice.push(token_chunk(0, 1, 1, 2, 3, finish_reason="stop")))
    assert writer().choice(deltas, is_chunk=False)["message"] == {
        "role": "assistant",
        "content": "b",
        "refusal": None,
    }
    assert choice.num_reasoning_tokens == 3  # with the one that opened it


def test_tools_are_told_of_in_plain_messages() -> None:
    call = {"function": {"name": "f", "arguments": {"a": "\u00e9"}}}
    chat: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
        {"role": "tool", "content": "2", "tool_call_id": "c2"},
    ]
    system, user, asked, results = tell_of_tools(chat, TOOLS)
    assert system["content"].startswith("Be brief.\n\n")
    assert '{"type": "function", "function": {"name": "g"}}' in system["content"]
    assert user == chat[1]
    text = '<tool_call>\n{"name": "f", "arguments": {"a": "\u00e9"}}\n</tool_call>'
    assert asked == {"role": "assistant", "content": f"{text}\n{text}"}
    response = "<tool_response>\n{}\n</tool_response>"
    assert results == {"role": "user", "content": "\n".join(map(response.format, "12"))}
    [first, *_] = tell_of_tools(chat[1:], TOOLS)
    assert first["role"] == "system"
    assert tell_of_tools(chat[:2], ()) == chat[:2]
