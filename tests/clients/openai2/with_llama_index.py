"""LlamaIndex by its package for servers that are like OpenAI's."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from tests.clients.conftest import Served
from tests.clients.weather import PARIS, SAID, WEATHER, Report, get_weather

pytestmark = pytest.mark.client("llama-index-llms-openai-like")


def chat(served: Served, **fields: Any) -> Any:
    return OpenAILike(
        model=served.model,
        api_base=served.url,
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=2048,
        **fields,
    )


def test_stream(scripted: Served) -> None:
    chunks = chat(scripted).stream_chat([ChatMessage(role="user", content="Hello")])
    assert "".join(chunk.delta or "" for chunk in chunks) == "Hello! How can I help?"


def test_structured_output(model: Served, scripted: Served) -> None:
    message = [ChatMessage(role="user", content=SAID)]
    assert chat(scripted).as_structured_llm(Report).chat(message).raw == PARIS
    found = chat(model, max_tokens=80, temperature=0).as_structured_llm(Report).chat(message).raw
    assert isinstance(found, Report)


def test_tools(model: Served, scripted: Served) -> None:
    tools = [FunctionTool.from_defaults(get_weather)]
    reply = chat(scripted).chat_with_tools(tools, user_msg=WEATHER)
    [call] = chat(scripted).get_tool_calls_from_response(reply)
    assert call.tool_kwargs == {"city": "Paris"}
    forced = chat(model, max_tokens=80, temperature=0).chat_with_tools(
        tools, user_msg=WEATHER, tool_required=True
    )
    assert forced.message.additional_kwargs["tool_calls"]


def test_agent_of_two_steps(scripted: Served) -> None:
    async def run() -> str:
        agent = FunctionAgent(tools=[get_weather], llm=chat(scripted), streaming=True)
        return str(await agent.run(WEATHER))

    assert asyncio.run(run()) == "It is 18 degrees."


def test_stream_of_a_call(scripted: Served) -> None:
    llm = chat(scripted)
    tools = [FunctionTool.from_defaults(get_weather)]
    *_, last = llm.stream_chat_with_tools(tools, user_msg=WEATHER)
    [call] = llm.get_tool_calls_from_response(last)
    assert call.tool_kwargs == {"city": "Paris"}


def test_completion(model: Served) -> None:
    llm = OpenAILike(
        model=model.model,
        api_base=model.url,
        api_key="none",
        is_chat_model=False,
        max_tokens=4,
        temperature=0,
    )
    assert llm.complete("One, two,").text.strip()
