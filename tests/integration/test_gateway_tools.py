"""Tools and reasoning over real HTTP, with a model that says what it was told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from canitoolcall.probe import probe

from flowkv_common.errors import CannotStart
from flowkv_common.wire.messages import TokenChunk
from flowkv_gateway.chat import ChatFormat
from flowkv_gateway.request_state import RequestState
from flowkv_gateway.tokenizer import Tokenizer
from tests.gateway_support import (
    CALL,
    CARD,
    MODEL,
    PLAIN,
    Gateway,
    ScriptedDispatch,
    serving,
    text_chunks,
    tokenizer_with,
)
from tests.told_answers import ANSWERS

USER: Any = [{"role": "user", "content": "Weather in Paris?"}]
TOOL: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}},
}


async def test_a_call_and_reasoning_whole_and_streamed(gateway: Gateway) -> None:
    create = gateway.client.chat.completions.create
    reply = await create(model=MODEL, messages=USER, tools=[TOOL])
    [choice] = reply.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Well."
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Paris"}')
    assert choice.message.model_dump()["reasoning_content"] == "I ask."
    assert reply.usage is not None
    assert reply.usage.completion_tokens_details is not None
    num_reasoning = reply.usage.completion_tokens_details.reasoning_tokens
    assert num_reasoning is not None
    assert 0 < num_reasoning < reply.usage.completion_tokens

    async with gateway.client.chat.completions.stream(model=MODEL, messages=USER, tools=[TOOL]) as stream:
        events = [event async for event in stream]
    final = (await stream.get_final_completion()).choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.content == "Well."
    assert final.message.tool_calls is not None
    assert final.message.tool_calls[0].function.arguments == call.function.arguments
    assert sum(event.type == "tool_calls.function.arguments.delta" for event in events) > 2
    reasoning = "".join(
        event.chunk.choices[0].delta.model_dump().get("reasoning") or ""
        for event in events
        if event.type == "chunk" and event.chunk.choices
    )
    assert reasoning == "I ask."


async def test_reasoning_without_tools(gateway: Gateway, thinking: Tokenizer) -> None:
    async def message(**fields: Any) -> dict[str, Any]:
        reply = await gateway.http.post("/v1/chat/completions", json={"messages": USER, **fields})
        assert reply.status_code == 200, reply.text
        shown: dict[str, Any] = reply.json()["choices"][0]["message"]
        return shown

    shown = await message()
    assert shown["reasoning"] == shown["reasoning_content"] == "I ask."
    assert shown["content"] == f"Well.\n{CALL}"  # no tools: no calls
    assert "reasoning" not in await message(include_reasoning=False)
    prompts = []
    for fields in (
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "none"},
        {"reasoning_effort": "low"},
        {"enable_thinking": False},
        {"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": True}},
    ):
        await message(**fields)
        prompts.append(await thinking.decode(gateway.dispatch.asked[-1].prompt_ids))
    assert prompts[0].endswith("<think></think>")
    assert prompts[1].endswith("none<think></think>")
    assert prompts[2].endswith("low<think>")
    assert prompts[3] == prompts[0]
    assert prompts[4].endswith("<think>")
    history = [*USER, {"role": "assistant", "content": "hi", "reasoning": "I greet."}, *USER]
    await message(messages=history)
    prompt = await thinking.decode(gateway.dispatch.asked[-1].prompt_ids)
    assert "assistant\n<think>I greet.</think>hi<|end|>" in prompt


async def test_a_template_that_knows_no_tools(tmp_path: Path) -> None:
    tokenizer = await asyncio.to_thread(tokenizer_with, tmp_path, PLAIN)
    async with serving(tokenizer, text=CALL) as gateway:
        gateway.dispatch.card = msgspec.structs.replace(CARD, max_model_len=2000)
        create = gateway.client.chat.completions.create
        reply = await create(model=MODEL, messages=USER, tools=[TOOL])
        assert reply.choices[0].finish_reason == "tool_calls"
        result = {"role": "tool", "content": "sunny", "tool_call_id": "c1"}
        history: Any = [*USER, reply.choices[0].message, result]
        await create(model=MODEL, messages=history, tools=[TOOL])
        prompt = await tokenizer.decode(gateway.dispatch.asked[-1].prompt_ids)
        assert '<tools>\n{"type": "function", "function": {"name": "weather"' in prompt
        assert f"assistant\n{CALL}<|end|>" in prompt
        assert "user\n<tool_response>\nsunny\n</tool_response><|end|>" in prompt
        reply = await create(model=MODEL, messages=USER)
        assert reply.choices[0].message.content == CALL


async def test_a_plain_chat_has_no_parser(tokenizer: Tokenizer, thinking: Tokenizer) -> None:
    assert ChatFormat(tokenizer).parser(has_tools=False) is None
    assert ChatFormat(thinking).parser(has_tools=False) is not None


async def test_a_format_is_named_where_the_template_does_not_tell(tokenizer: Tokenizer) -> None:
    chat = {"messages": USER, "tools": [TOOL]}
    async with serving(tokenizer, text=CALL) as gateway:
        gateway.dispatch.card = msgspec.structs.replace(CARD, max_model_len=2000)
        reply = await gateway.http.post("/v1/chat/completions", json=chat)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tools")
        assert "FLOWKV_TOOL_PARSER" in reply.json()["error"]["message"]
    async with serving(tokenizer, text=CALL, tool_parser="hermes") as gateway:
        gateway.dispatch.card = msgspec.structs.replace(CARD, max_model_len=2000)
        reply = await gateway.http.post("/v1/chat/completions", json=chat)
        assert reply.json()["choices"][0]["finish_reason"] == "tool_calls"
    with pytest.raises(CannotStart, match=r"FLOWKV_TOOL_PARSER.*'hermse'.*hermes"):
        ChatFormat(tokenizer, "hermse")


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": fields}


BAD_TOOLS: list[tuple[Any, str]] = [
    ([{"type": "custom", "custom": {"name": "f"}}], "tools[0].type"),
    ([TOOL, {"type": "function"}], "tools[1].function"),
    ([function()], "tools[0].function.name"),
    ([function(name="f", parameters=[])], "tools[0].function.parameters"),
    ([function(name="f", parameters={"type": "string"})], "tools[0].function.parameters.type"),
]


@pytest.mark.parametrize(("tools", "field"), BAD_TOOLS)
async def test_tools_that_are_none(gateway: Gateway, tools: Any, field: str) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        reply = await gateway.http.post(path, json={"messages": USER, "tools": tools})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)


async def test_a_template_of_the_requests_own(tokenizer: Tokenizer) -> None:
    own = {"messages": USER, "chat_template": "{{ bos_token }}<think>{{ messages[0].content }}"}
    async with serving(tokenizer, text="hm</think>Well.", trust_request_chat_template=True) as gateway:
        reply = await gateway.http.post("/v1/chat/completions", json=own)
        assert reply.json()["choices"][0]["message"]["content"] == "hm</think>Well."
        opened = {**own, "chat_template": own["chat_template"] + "<think>{# </think> #}"}
        reply = await gateway.http.post("/v1/chat/completions", json=opened)
        assert reply.json()["choices"][0]["message"]["reasoning"] == "hm"
        counted = (await gateway.http.post("/tokenize", json=opened)).json()
        assert counted["tokens"] == gateway.dispatch.asked[1].prompt_ids
        assert await tokenizer.decode(counted["tokens"]) == "<|start|><think>Weather in Paris?<think>"
        for bad in ("{% if %}", "{{ messages.append(1) }}", "{{ 1 / 0 }}"):
            reply = await gateway.http.post("/v1/chat/completions", json={**own, "chat_template": bad})
            assert reply.status_code == 400
    async with serving(tokenizer) as gateway:
        for path in ("/v1/chat/completions", "/tokenize"):
            reply = await gateway.http.post(path, json=own)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "chat_template")


# --- the yardstick's probe ---------------------------------------------------------------------------------


class ObedientDispatch(ScriptedDispatch):
    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(card=msgspec.structs.replace(CARD, max_model_len=5000))
        self._tokenizer = tokenizer

    async def generate(self, request: RequestState) -> AsyncGenerator[TokenChunk, None]:
        prompt = await self._tokenizer.decode(request.prompt_ids)
        self.script = text_chunks(
            self._tokenizer, next(text for words, text in ANSWERS.items() if words in prompt)
        )
        async with aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk


async def test_the_probe_of_the_yardstick_passes(tmp_path: Path) -> None:
    template = PLAIN + "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}{# <think> </think> #}"
    tokenizer = await asyncio.to_thread(tokenizer_with, tmp_path, template)
    async with serving(tokenizer, dispatch=ObedientDispatch(tokenizer)) as gateway:
        report = await asyncio.to_thread(probe, f"http://127.0.0.1:{gateway.port}/v1", MODEL)
    summary = report.summary()
    assert summary["pass"] == len(report.outcomes) > 20, report.render_text()
    assert not any(outcome.warnings for outcome in report.outcomes), report.render_text()


# --- forced calls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_forced_calls_where_the_models_own_are_no_json(tmp_path: Path, choice: Any) -> None:
    tokenizer = await asyncio.to_thread(tokenizer_with, tmp_path, PLAIN + "{{ tools }}<function=")
    async with serving(tokenizer, text=CALL) as gateway:
        gateway.dispatch.card = msgspec.structs.replace(CARD, max_model_len=2000)
        create = gateway.client.chat.completions.create
        reply = await create(model=MODEL, messages=USER, tools=[TOOL], tool_choice=choice)
        assert reply.choices[0].finish_reason == "tool_calls"
        assert reply.choices[0].message.content is None
        grammar = gateway.dispatch.asked[0].sampling.grammar
        assert grammar is not None
        assert '"weather"' in grammar.text
        # A model that is not forced writes its own.
        own = "<tool_call><function=weather><parameter=city>Rome</parameter></function></tool_call>"
        gateway.dispatch.script = text_chunks(tokenizer, own)
        reply = await create(model=MODEL, messages=USER, tools=[TOOL])
        assert gateway.dispatch.asked[1].sampling.grammar is None
        assert reply.choices[0].message.tool_calls is not None
        bad = function(name="f", parameters={"type": "object", "not": {}})
        refused = await gateway.http.post(
            "/v1/chat/completions", json={"messages": USER, "tools": [bad], "tool_choice": "required"}
        )
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice")
        assert '"not"' in refused.json()["error"]["message"]
