"""LangChain by its package for Anthropic."""

from __future__ import annotations

import os
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_anthropic import ChatAnthropic
from langchain_core.tools import tool

from tests.clients.conftest import Served
from tests.clients.weather import PARIS, SAID, THOUGHT, WEATHER, Report, get_weather

pytestmark = pytest.mark.client("langchain-anthropic")
os.environ["LANGSMITH_TRACING"] = "false"


def chat(served: Served, **fields: Any) -> Any:
    return ChatAnthropic(base_url=served.root, api_key="none", model=served.model, max_tokens=200, **fields)


def test_stream(scripted: Served) -> None:
    texts = [chunk.text for chunk in chat(scripted).stream("Hello")]
    assert "".join(texts) == "Hello! How can I help?"


def test_with_structured_output(scripted: Served) -> None:
    assert chat(scripted).with_structured_output(Report).invoke(SAID) == PARIS


@pytest.mark.parametrize("words", [WEATHER, THOUGHT])
def test_agent_of_two_steps(scripted: Served, words: str) -> None:
    agent: Any = create_agent(chat(scripted), [tool(get_weather)])
    state = agent.invoke({"messages": [("user", words)]})
    assert state["messages"][-1].text == "It is 18 degrees."
