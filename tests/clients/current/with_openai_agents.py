"""OpenAI's Agents SDK, by Chat Completions and by Responses."""

from __future__ import annotations

import asyncio
from typing import Any

import agents
import openai
import pytest

from tests.clients.conftest import Served
from tests.clients.weather import PARIS, THOUGHT, TYPED_WEATHER, WEATHER, Report, get_weather

pytestmark = pytest.mark.client("openai-agents")
agents.set_tracing_disabled(True)


@pytest.fixture(params=["chat", "responses"])
def chat(request: pytest.FixtureRequest, scripted: Served) -> Any:
    client = openai.AsyncOpenAI(base_url=scripted.url, api_key="none")
    if request.param == "responses":
        return agents.OpenAIResponsesModel(scripted.model, client)
    # It sends reasoning back to DeepSeek's models alone, unless it is told to.
    return agents.OpenAIChatCompletionsModel(
        scripted.model, client, should_replay_reasoning_content=lambda _: True
    )


@pytest.mark.parametrize("words", [WEATHER, THOUGHT])
def test_agent_of_two_steps(chat: Any, words: str) -> None:
    agent: Any = agents.Agent(name="a", model=chat, tools=[agents.function_tool(get_weather)])
    assert agents.Runner.run_sync(agent, words).final_output == "It is 18 degrees."


def test_typed_agent(chat: Any) -> None:
    tools: Any = [agents.function_tool(get_weather)]
    agent: Any = agents.Agent(name="a", model=chat, tools=tools, output_type=Report)
    assert agents.Runner.run_sync(agent, TYPED_WEATHER).final_output == PARIS


def test_stream_of_an_agent(chat: Any) -> None:
    async def run() -> list[str]:
        agent: Any = agents.Agent(name="a", model=chat, tools=[agents.function_tool(get_weather)])
        result = agents.Runner.run_streamed(agent, WEATHER)
        return [event.type async for event in result.stream_events()] + [result.final_output]

    *kinds, output = asyncio.run(run())
    assert output == "It is 18 degrees."
    assert {"raw_response_event", "run_item_stream_event"} <= set(kinds)


def test_handoff_to_another_agent(chat: Any) -> None:
    other: Any = agents.Agent(name="Greeter", model=chat, instructions="Greet.")
    agent: Any = agents.Agent(name="a", model=chat, handoffs=[other])
    assert agents.Runner.run_sync(agent, "Hello, hand me over.").final_output == "Handed over: hello."
