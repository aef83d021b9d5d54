"""pydantic-ai by its provider for OpenAI."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.conftest import Served
from tests.clients.weather import PARIS, SAID, SAID_AS_JSON, TYPED_WEATHER, WEATHER, Report, get_weather

pytestmark = pytest.mark.client("pydantic-ai-slim")


def chat(served: Served, kind: Any = OpenAIChatModel) -> Any:
    return kind(served.model, provider=OpenAIProvider(base_url=served.url, api_key="none"))


def test_agent_of_two_steps(scripted: Served) -> None:
    agent = Agent(chat(scripted), tools=[get_weather])
    assert agent.run_sync(WEATHER).output == "It is 18 degrees."


@pytest.mark.parametrize("kind", [ToolOutput, NativeOutput, PromptedOutput])
def test_typed_agent(scripted: Served, kind: Any) -> None:
    agent: Any = Agent(chat(scripted), tools=[get_weather], output_type=kind(Report))
    assert agent.run_sync(WEATHER if kind is ToolOutput else TYPED_WEATHER).output == PARIS


@pytest.mark.parametrize("kind", [ToolOutput, NativeOutput])
def test_typed_output(model: Served, kind: Any) -> None:
    words = SAID if kind is ToolOutput else SAID_AS_JSON
    agent: Any = Agent(chat(model), output_type=kind(Report), model_settings={"max_tokens": 80})
    assert isinstance(agent.run_sync(words).output, Report)


async def _streamed(served: Served) -> list[str]:
    async with Agent(chat(served), tools=[get_weather]).run_stream(WEATHER) as result:
        return [text async for text in result.stream_text(delta=True)]


def test_stream_of_an_agent(scripted: Served) -> None:
    assert "".join(asyncio.run(_streamed(scripted))) == "It is 18 degrees."


def test_responses_agent_of_two_steps(scripted: Served) -> None:
    agent: Any = Agent(chat(scripted, OpenAIResponsesModel), tools=[get_weather])
    assert agent.run_sync(WEATHER).output == "It is 18 degrees."
