"""pydantic-ai by its provider for OpenAI."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic_ai import Agent, ModelRetry, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.conftest import Served
from tests.clients.weather import (
    BOTH,
    PARIS,
    ROME,
    SAID,
    SAID_AS_JSON,
    SUM,
    THOUGHT,
    TYPED_WEATHER,
    WEATHER,
    Report,
    get_weather,
)

pytestmark = pytest.mark.client("pydantic-ai-slim")


def chat(served: Served, kind: Any = OpenAIChatModel) -> Any:
    return kind(served.model, provider=OpenAIProvider(base_url=served.url, api_key="none"))


@pytest.mark.parametrize("words", [WEATHER, THOUGHT])
def test_agent_of_two_steps(scripted: Served, words: str) -> None:
    agent = Agent(chat(scripted), tools=[get_weather])
    assert agent.run_sync(words).output == "It is 18 degrees."


@pytest.mark.parametrize("kind", [ToolOutput, NativeOutput, PromptedOutput])
def test_typed_agent_in_three_modes(scripted: Served, kind: Any) -> None:
    agent: Any = Agent(chat(scripted), tools=[get_weather], output_type=kind(Report))
    assert agent.run_sync(WEATHER if kind is ToolOutput else TYPED_WEATHER).output == PARIS


@pytest.mark.parametrize("kind", [ToolOutput, NativeOutput])
def test_typed_output(model: Served, kind: Any) -> None:
    words = SAID if kind is ToolOutput else SAID_AS_JSON
    agent: Any = Agent(
        chat(model), output_type=kind(Report), model_settings={"max_tokens": 80, "temperature": 0}
    )
    assert isinstance(agent.run_sync(words).output, Report)


async def _streamed(served: Served) -> list[str]:
    async with Agent(chat(served), tools=[get_weather]).run_stream(WEATHER) as result:
        return [text async for text in result.stream_text(delta=True)]


def test_stream_of_an_agent(scripted: Served) -> None:
    assert "".join(asyncio.run(_streamed(scripted))) == "It is 18 degrees."


@pytest.mark.parametrize("words", [WEATHER, THOUGHT])
def test_responses_agent_of_two_steps(scripted: Served, words: str) -> None:
    agent: Any = Agent(chat(scripted, OpenAIResponsesModel), tools=[get_weather])
    assert agent.run_sync(words).output == "It is 18 degrees."


def test_parallel_calls(scripted: Served) -> None:
    agent = Agent(chat(scripted), tools=[get_weather])
    assert agent.run_sync(BOTH).output == "It is 18 degrees in both."


def test_tool_that_asks_for_another_call(scripted: Served) -> None:
    def get_weather(city: str) -> str:
        if city == "Rome":
            raise ModelRetry("Use the full name.")
        return f"18 degrees in {city}"

    agent = Agent(chat(scripted), tools=[get_weather])
    assert agent.run_sync(ROME).output == "It is 18 degrees."


def test_thinking(scripted: Served) -> None:
    result = Agent(chat(scripted)).run_sync(SUM)
    kinds = [part.part_kind for message in result.new_messages() for part in message.parts]
    assert (result.output, kinds) == ("42", ["user-prompt", "thinking", "text"])


def test_history(scripted: Served) -> None:
    agent = Agent(chat(scripted), tools=[get_weather])
    first = agent.run_sync(WEATHER)
    again = agent.run_sync("Thank you.", message_history=first.all_messages())
    assert again.output == "It is 18 degrees."


@pytest.mark.parametrize("words", [WEATHER, THOUGHT])
def test_messages_agent_of_two_steps(scripted: Served, words: str) -> None:
    provider = AnthropicProvider(base_url=scripted.root, api_key="none")
    agent = Agent(AnthropicModel(scripted.model, provider=provider), tools=[get_weather])
    assert agent.run_sync(words).output == "It is 18 degrees."
