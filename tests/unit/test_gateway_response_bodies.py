"""The body of OpenAI's Responses as a chat: what templates get, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flowkv_common.errors import BadRequest
from flowkv_gateway.chat import for_template
from flowkv_gateway.responses import as_chat, input_items
from flowkv_gateway.schemas import ChatRequest, InputItem, ResponseRequest, parse_request

HI: dict[str, Any] = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
CALL = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}
THOUGHT = {
    "type": "reasoning",
    "id": "rs_1",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "hm"}],
}
ANSWER = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "Well.", "annotations": []}],
}


def chat_of(**fields: Any) -> ChatRequest:
    body = parse_request(json.dumps({"input": "hi", **fields}).encode(), ResponseRequest)
    return as_chat(body, input_items(body))


def rendered(*items: Any, **fields: Any) -> list[dict[str, Any]]:
    """What the template gets of each turn."""
    return for_template(chat_of(input=items, **fields).messages)


def shown(*items: Any, **fields: Any) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in rendered(*items, **fields)]


def test_what_an_answer_held_is_one_turn() -> None:
    _, turn, result = rendered(HI, THOUGHT, ANSWER, CALL, {**CALL, "call_id": "c2"}, RESULT)
    assert (turn["role"], turn["content"], turn["reasoning_content"]) == ("assistant", "Well.", "hm")
    assert [call["id"] for call in turn["tool_calls"]] == ["c1", "c2"]
    assert turn["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert result == {"role": "tool", "content": "sunny", "tool_call_id": "c1"}


@pytest.mark.parametrize(
    ("items", "turns"),
    [
        ([HI, ANSWER, ANSWER], 3),
        ([HI, THOUGHT, THOUGHT, ANSWER], 2),
        ([HI, ANSWER, THOUGHT, ANSWER], 3),
        ([HI, CALL, RESULT, CALL, RESULT], 5),
        ([HI, CALL, ANSWER], 3),
        ([HI, {"type": "reasoning", "encrypted_content": "x", "summary": []}, HI], 2),
    ],
)
def test_turns_of_the_assistant(items: list[Any], turns: int) -> None:
    assert len(rendered(*items)) == turns


def test_reasoning_is_that_of_the_model_or_a_summary_of_it() -> None:
    summary = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "short"}]}
    assert rendered(HI, {**THOUGHT, **summary, "content": THOUGHT["content"]})[1]["reasoning"] == "hm"
    assert rendered(HI, summary, summary, ANSWER)[1]["reasoning"] == "short\nshort"


def test_instructions_and_what_developers_say_first_are_one_message() -> None:
    said = {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]}
    assert shown(HI, instructions="You code.")[0] == ("system", "You code.")
    assert shown(said, HI, instructions="You code.")[0] == ("system", "You code.\nBe brief.")
    assert shown(said, HI) == [("system", "Be brief."), ("user", "hi")]
    assert shown(HI, said, HI) == [("user", "hi"), ("system", "Be brief."), ("user", "hi")]
    assert shown(HI, instructions="") == [("user", "hi")]


@pytest.mark.parametrize(
    "content", ["hi", ["hi"], [{"type": "input_text", "text": "hi"}], [{"type": "text", "text": "hi"}]]
)
def test_forms_of_a_text(content: Any) -> None:
    assert shown({"role": "user", "content": content}) == [("user", "hi")]
    assert shown(HI, {**RESULT, "output": content})[1] == ("tool", "hi")


def test_history_comes_first() -> None:
    before = InputItem(role="user", content="before")
    body = parse_request(b'{"input": [{"role": "user"}]}', ResponseRequest)
    with pytest.raises(BadRequest) as refused:
        as_chat(body, [before, *input_items(body)], 1)
    assert refused.value.field == "input[0].content"
    body = parse_request(b'{"input": "now", "instructions": "You code."}', ResponseRequest)
    chat = as_chat(body, [before, *input_items(body)], 1)
    assert [turn["content"] for turn in for_template(chat.messages)] == ["You code.", "before", "now"]


def test_what_else_is_asked_for() -> None:
    schema = {"type": "object"}
    chat = chat_of(
        max_output_tokens=7,
        temperature=0.5,
        seed=5,
        stop=["x"],
        stream=True,
        stream_options={"include_obfuscation": False},
        truncation="auto",
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
        reasoning={"effort": "low", "summary": "auto"},
        include=["message.output_text.logprobs", "reasoning.encrypted_content"],
        top_logprobs=3,
        tools=[TOOL],
        tool_choice={"type": "function", "name": "f"},
        parallel_tool_calls=False,
        safety_identifier="me",
        chat_template_kwargs={"enable_thinking": False},
        metadata={"a": "b"},
        prompt_cache_key="k",
        text_unknown=5,
    )
    assert (chat.max_completion_tokens, chat.temperature, chat.seed, chat.stop) == (7, 0.5, 5, ["x"])
    assert (chat.stream, chat.stream_options) == (True, None)
    assert chat.response_format is not None
    assert chat.response_format.json_schema is not None
    assert chat.response_format.json_schema.schema == schema
    assert (chat.reasoning_effort, chat.num_logprobs) == ("low", 3)
    function = {"name": "f", "parameters": {"type": "object"}, "strict": True}
    assert chat.tools == [{"type": "function", "function": function}]
    assert chat.tool_choice == {"type": "function", "function": {"name": "f"}}
    assert chat.parallel_tool_calls is False
    assert (chat.safety_identifier, chat.chat_template_kwargs) == ("me", {"enable_thinking": False})
    plain = chat_of(text={"format": {"type": "text"}, "verbosity": "medium"}, include=[], background=False)
    assert (plain.response_format, plain.num_logprobs, plain.tools) == (None, None, None)
    json_object = chat_of(text={"format": {"type": "json_object"}}).response_format
    assert json_object is not None
    assert json_object.type == "json_object"


def test_functions_of_namespaces() -> None:
    space = {"type": "namespace", "name": "n", "description": "All of it.", "tools": [TOOL]}
    chat = chat_of(tools=[TOOL, space, {**space, "name": "o", "tools": [{**TOOL, "description": "One."}]}])
    assert [tool["function"]["name"] for tool in chat.tools or ()] == ["f", "n__f", "o__f"]
    described = [tool["function"].get("description") for tool in chat.tools or ()]
    assert described == [None, "All of it.", "All of it.\nOne."]
    [_, turn] = rendered(HI, {**CALL, "namespace": "n"})
    assert turn["tool_calls"][0]["function"]["name"] == "n__f"


def part(**fields: Any) -> list[Any]:
    return [HI, HI, {"role": "user", "content": [fields]}]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{"content": "hi"}]}, "input[0].role"),
        ({"input": [{"role": "alien", "content": "hi"}]}, "input[0].role"),
        ({"input": [HI, {"role": "user"}]}, "input[1].content"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        ({"input": part(type="input_image", image_url="x")}, "input[2].content[0].type"),
        ({"input": part(type="input_text")}, "input[2].content[0].text"),
        ({"input": part(text="hi")}, "input[2].content[0].type"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0].type"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "arguments": "{}"}]}, "input[0].name"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
        ({"input": [{**RESULT, "output": [{"type": "input_file"}]}]}, "input[0].output[0].type"),
        ({"instructions": [HI]}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"max_completion_tokens": 5}, "max_completion_tokens"),
        ({"n": 2}, "n"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["everything"]}, "include[0]"),
        ({"tools": [{"type": "web_search_preview"}]}, "tools[0].type"),
        ({"tools": [TOOL, {"type": "custom", "name": "f"}]}, "tools[1].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name"),
        ({"tools": [{**TOOL, "parameters": []}]}, "tools[0].parameters"),
        ({"tools": [{**TOOL, "parameters": {"type": "string"}}]}, "tools[0].parameters.type"),
        ({"tools": [{"type": "namespace", "tools": [TOOL, {"type": "custom"}]}]}, "tools[0].tools[1].type"),
        ({"tools": [{"type": "namespace", "tools": [{"type": "function"}]}]}, "tools[0].tools[0].name"),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search_preview"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": 5}}}, "text.format.schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning": {"effort": 5}}, "reasoning.effort"),
        ({"reasoning": {"summary": "long"}}, "reasoning.summary"),
        ({"truncation": "middle"}, "truncation"),
        ({"metadata": {"a": 5}}, "metadata"),
        ({"metadata": {str(key): "" for key in range(17)}}, "metadata"),
        ({"store": "maybe"}, "store"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"previous_response_id": 5}, "previous_response_id"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"cache_salt": "s"}, "cache_salt"),
    ],
)
def test_what_is_wrong_is_named_as_the_client_wrote_it(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest) as refused:
        chat_of(**fields)
    assert refused.value.field == field
    assert refused.value.message
