"""The body of Anthropic's Messages as a chat: what templates get, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flowkv_common.errors import BadRequest
from flowkv_gateway.chat import for_template
from flowkv_gateway.messages import CountTokensRequest, MessagesRequest, as_chat
from flowkv_gateway.schemas import ChatRequest, parse_request

HI = {"role": "user", "content": "hi"}
TOOL = {"name": "f", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}


def chat_of(*messages: Any, **fields: Any) -> ChatRequest:
    body = {"max_tokens": 5, "messages": messages or [HI], **fields}
    return as_chat(parse_request(json.dumps(body).encode(), MessagesRequest))


def rendered(*messages: Any, **fields: Any) -> list[dict[str, Any]]:
    """What the template gets of each turn, with the ids of calls for themselves."""
    return for_template(chat_of(*messages, **fields).messages)


def result(text: Any, call: str = "c1", **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call, "content": text, **fields}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


CALL = {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}}
THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "unsigned"}


def test_a_turn_of_calls_and_their_results() -> None:
    asked, called, first, second, user = rendered(
        HI,
        {"role": "assistant", "content": [THOUGHT, text("Well."), CALL]},
        {"role": "user", "content": [text("and"), result("1"), result([text("a"), text("b")], "c2")]},
    )
    assert asked == {"role": "user", "content": "hi"}
    assert called == {
        "role": "assistant",
        "content": "Well.",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        "reasoning_content": "hm",
        "reasoning": "hm",
    }
    assert first == {"role": "tool", "content": "1", "tool_call_id": "c1"}
    assert second == {"role": "tool", "content": "a\nb", "tool_call_id": "c2"}
    assert user == {"role": "user", "content": "and"}  # results answer the turn before


@pytest.mark.parametrize(
    ("block", "shown"),
    [
        (result(None), ""),
        (result([]), ""),
        (result("no such file", is_error=True), "Error:\nno such file"),
        (result("", is_error=False), ""),
        ({"type": "tool_result", "tool_use_id": "c1", "cache_control": {"type": "ephemeral"}}, ""),
    ],
)
def test_results(block: dict[str, Any], shown: str) -> None:
    assert rendered({"role": "user", "content": [block]})[0]["content"] == shown


def test_messages_of_one_role_are_one_turn() -> None:
    thought = {"type": "redacted_thinking", "data": "x"}
    turns = rendered(
        HI,
        {"role": "user", "content": [text("you"), {**text("there"), "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [thought, text("a")]},
        {"role": "assistant", "content": [THOUGHT]},
        {"role": "assistant", "content": "b"},
        HI,
    )
    assert [turn["content"] for turn in turns] == ["hi\nyou\nthere", "a\nb", "hi"]
    assert turns[1]["reasoning"] == "hm"


def test_the_system_prompt() -> None:
    billing = text("x-anthropic-billing-header: cc_version=2; cch=fa690;")
    system = [billing, text("You code."), {**text("Be brief."), "cache_control": {"type": "ephemeral"}}]
    assert rendered(system="You code.")[0] == {"role": "system", "content": "You code."}
    assert rendered(system=system)[0]["content"] == "You code.\nBe brief."
    assert rendered({"role": "system", "content": "And kind."}, HI, system=system)[0]["content"] == (
        "You code.\nBe brief.\nAnd kind."
    )
    for nothing in (None, [], [billing]):
        assert rendered(system=nothing) == [{"role": "user", "content": "hi"}]


def test_a_later_system_message_changes_no_earlier_turn() -> None:
    note = {"role": "system", "content": "5 tokens left"}
    shown = "<system-reminder>\n5 tokens left\n</system-reminder>"
    called = {"role": "assistant", "content": [CALL]}
    history = [HI, note, called, {"role": "user", "content": [result("1")]}, note]
    turns = rendered(*history, system="You code.")
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "tool"]
    assert [turn["content"] for turn in turns] == ["You code.", f"hi\n{shown}", "", f"1\n{shown}"]
    more = rendered(*history, {"role": "assistant", "content": "ok"}, HI, system="You code.")
    assert more[: len(turns)] == turns
    assert rendered(HI, {"role": "assistant", "content": "ok"}, note)[-1] == {
        "role": "user",
        "content": shown,
    }


def test_an_answer_that_is_begun_is_continued() -> None:
    begun = chat_of(HI, {"role": "assistant", "content": "The best is ("})
    assert (begun.continue_final_message, begun.add_generation_prompt) == (True, False)
    plain = chat_of()
    assert (plain.continue_final_message, plain.add_generation_prompt) == (False, True)


def test_tools() -> None:
    described = {**TOOL, "type": "custom", "description": "d", "strict": True, "cache_control": None}
    assert chat_of(tools=[TOOL, described]).tools == [
        {"type": "function", "function": {"name": "f", "parameters": TOOL["input_schema"]}},
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": "d",
                "parameters": TOOL["input_schema"],
                "strict": True,
            },
        },
    ]


@pytest.mark.parametrize(
    ("choice", "shown", "is_parallel"),
    [
        (None, None, None),
        ({"type": "auto"}, "auto", None),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
        ({"type": "any", "disable_parallel_tool_use": False}, "required", None),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}, None),
        ({"type": "none"}, "none", None),
    ],
)
def test_tool_choice(choice: Any, shown: Any, is_parallel: bool | None) -> None:
    chat = chat_of(tools=[TOOL], tool_choice=choice)
    assert (chat.tool_choice, chat.parallel_tool_calls) == (shown, is_parallel)


@pytest.mark.parametrize(
    ("thinking", "is_enabled", "is_shown"),
    [
        (None, None, None),
        ({"type": "disabled"}, False, None),
        ({"type": "enabled", "budget_tokens": 1024}, True, None),
        ({"type": "adaptive"}, True, None),
        ({"type": "adaptive", "display": "omitted"}, True, False),
    ],
)
def test_thinking(thinking: Any, is_enabled: bool | None, is_shown: bool | None) -> None:
    own = {"thinking": "much"}
    chat = chat_of(thinking=thinking, chat_template_kwargs=own)
    assert (chat.enable_thinking, chat.include_reasoning) == (is_enabled, is_shown)
    assert chat.chat_template_kwargs == own


def test_what_else_reaches_the_chat() -> None:
    schema = {"type": "object"}
    wanted = {"type": "json_schema", "schema": schema}
    chat = chat_of(
        stop_sequences=["a", "b"],
        temperature=1,
        top_p=0.5,
        top_k=3,
        stream=True,
        metadata={"user_id": "me"},
        output_config={"effort": "low", "format": wanted},
        service_tier="standard_only",
    )
    assert (chat.max_tokens, chat.stop, chat.temperature, chat.top_p, chat.top_k, chat.stream, chat.user) == (
        *(5, ["a", "b"], 1.0, 0.5, 3, True, "me"),
    )
    assert chat.reasoning_effort == "low"
    older = chat_of(output_format=wanted)
    for one in (chat, older):
        assert one.response_format is not None
        assert one.response_format.json_schema is not None
        assert one.response_format.json_schema.schema == schema
    counted = parse_request(json.dumps({"messages": [HI]}).encode(), CountTokensRequest)
    assert as_chat(counted).messages == chat.messages


def block(**fields: Any) -> list[dict[str, Any]]:
    return [HI, {"role": "user", "content": [text("a"), fields]}]


AT = "messages[1].content[1]"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": block()}, f"{AT}.type"),
        ({"messages": block(type="text")}, f"{AT}.text"),
        ({"messages": block(type="image", source={})}, f"{AT}.type"),
        ({"messages": block(type="document")}, f"{AT}.type"),
        ({"messages": block(type="tool_use", name="f")}, f"{AT}.type"),  # users call nothing
        ({"messages": block(type="tool_result")}, f"{AT}.tool_use_id"),
        ({"messages": block(**result([text("a"), {"type": "image"}]))}, f"{AT}.content[1].type"),
        ({"messages": [HI, {"role": "system", "content": [CALL]}, HI]}, "messages[1].content[0].type"),
        ({"messages": [HI, {"role": "assistant", "content": [CALL]}]}, "messages"),
        (
            {"messages": [HI, {"role": "assistant", "content": [{"type": "tool_use"}]}, HI]},
            "messages[1].content[0].name",
        ),
        (
            {"messages": [HI, {"role": "assistant", "content": [{"type": "server_tool_use"}]}, HI]},
            "messages[1].content[0].type",
        ),
        ({"system": [text("a"), {"type": "image"}]}, "system[1].type"),
        ({"system": 5}, "system"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1.1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"stop_sequences": "a"}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL, {"name": "g"}]}, "tools[1].input_schema"),
        ({"tools": [{**TOOL, "name": ""}]}, "tools[0].name"),
        ({"tools": [{"name": "g", "input_schema": {"type": "string"}}]}, "tools[0].input_schema.type"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "always"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"thinking": {"type": "often"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens"),
        ({"output_config": {"format": {"type": "xml", "schema": {}}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"metadata": {"user_id": 5}}, "metadata.user_id"),
        ({"mcp_servers": [{"url": "a"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        (
            {
                "output_format": {"type": "json_schema", "schema": {}},
                "output_config": {"format": {"type": "json_schema", "schema": {}}},
            },
            "output_format",
        ),
    ],
)
def test_what_is_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        chat_of(**fields)
    assert caught.value.field == field
