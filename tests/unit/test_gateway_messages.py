"""A history is taken as it was answered, by this server or another one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flowkv_common.errors import BadRequest
from flowkv_gateway.chat import for_template
from flowkv_gateway.schemas import ChatRequest, parse_json


def rendered(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    body = json.dumps({"messages": messages}).encode()
    return for_template(parse_json(body, ChatRequest).messages)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
        ({"role": "assistant"}, {"role": "assistant", "content": ""}),
        ({"role": "assistant", "content": "ok", "tool_calls": []}, {"role": "assistant", "content": "ok"}),
        ({"role": "assistant", "content": "ok", "tool_calls": None}, {"role": "assistant", "content": "ok"}),
        (
            {"role": "assistant", "content": "ok", "function_call": None, "audio": None, "refusal": None},
            {"role": "assistant", "content": "ok"},
        ),
        ({"role": "assistant", "content": None, "refusal": "No."}, {"role": "assistant", "content": "No."}),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "assistant", "content": "No."},
        ),
        (
            {"role": "assistant", "content": "ok", "reasoning_content": "hm", "annotations": []},
            {"role": "assistant", "content": "ok", "reasoning_content": "hm", "reasoning": "hm"},
        ),
        (
            {"role": "assistant", "reasoning": "hm"},
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "hm",
                "reasoning": "hm",
                "thinking": "hm",
            },
        ),
        (
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"role": "user", "content": "hi"},
        ),
        (
            {"role": "user", "content": ["hi", {"type": "text", "text": "you"}]},
            {"role": "user", "content": "hi\nyou"},
        ),
        ({"role": "user", "content": ""}, {"role": "user", "content": ""}),
        ({"role": "developer", "content": "brief"}, {"role": "system", "content": "brief"}),
        (
            {"role": "tool", "tool_call_id": "c1", "content": None},
            {"role": "tool", "content": "", "tool_call_id": "c1"},
        ),
        (
            {"role": "function", "name": "f", "content": "sunny"},
            {"role": "tool", "content": "sunny", "name": "f"},
        ),
    ],
)
def test_what_was_once_answered_can_be_sent_again(message: dict[str, Any], shown: dict[str, Any]) -> None:
    assert rendered(message) == [shown]


def test_ids_of_calls_reach_the_template() -> None:
    calls = [
        {"id": call_id, "function": {"name": "f", "arguments": "{}"}}
        for call_id in ("call_123456789abc", "x")
    ]
    history: list[dict[str, Any]] = [
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "1", "tool_call_id": "call_123456789abc"},
    ]
    asked, result = rendered(*history)
    assert [call["id"] for call in asked["tool_calls"]] == ["call_123456789abc", "x"]
    assert result["tool_call_id"] == "call_123456789abc"
    # Mistral's templates refuse longer ones.
    body = parse_json(json.dumps({"messages": history}).encode(), ChatRequest)
    asked, result = for_template(body.messages, 9)
    assert [call["id"] for call in asked["tool_calls"]] == ["456789abc", "x"]
    assert result["tool_call_id"] == "456789abc"


@pytest.mark.parametrize(
    ("arguments", "shown", "is_told"),
    [
        ('{"city": "Paris"}', {"city": "Paris"}, False),
        ({"city": "Paris"}, {"city": "Paris"}, False),
        ("", {}, False),
        ("{}", {}, False),
        ('{"city": "X', {}, True),
        ("null", {}, True),
        ("[]", {}, True),
        ("[" * 50_000, {}, True),
        (None, {}, True),
        ([], {}, True),
        (7, {}, True),
    ],
)
def test_arguments_that_a_model_wrote_wrongly_are_left_out(
    arguments: Any, shown: dict[str, Any], is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    first = {"role": "assistant", "tool_calls": [call]}
    older = {"role": "assistant", "content": None, "function_call": call["function"]}
    calls = [message["tool_calls"] for message in rendered(first, older)]
    assert [made["function"] for [made] in calls] == [{"name": "f", "arguments": shown}] * 2
    told = ["messages[0].tool_calls[0]", "messages[1].tool_calls[0]"] if is_told else []
    assert [line.split(":")[0] for line in caplog.messages] == told


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "user"}, "messages[0].content"),
        ({"role": "system", "content": None}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": ["a", {"type": "text"}]}, "messages[0].content[1].text"),
        ({"role": "wizard", "content": "a"}, "messages[0].role"),
        ({"role": "assistant", "tool_calls": [{"id": "c1"}]}, "messages[0].tool_calls[0].function"),
    ],
)
def test_what_would_be_lost_is_refused(message: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        rendered(message)
    assert caught.value.field == field
