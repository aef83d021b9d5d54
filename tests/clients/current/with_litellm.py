"""litellm as a library, by its provider for servers that are like OpenAI's."""

from __future__ import annotations

from typing import Any

import litellm
import pytest

from tests.clients.conftest import Served
from tests.clients.weather import PARIS, SAID_AS_JSON, TOOL, WEATHER, Report

pytestmark = pytest.mark.client("litellm")


def ask(served: Served, words: str, **fields: Any) -> Any:
    return litellm.completion(
        model=f"openai/{served.model}",
        api_base=served.url,
        api_key="none",
        messages=[{"role": "user", "content": words}],
        **fields,
    )


def test_stream(scripted: Served) -> None:
    chunks = ask(scripted, "Hello", stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "Hello! How can I help?"


def test_tools(scripted: Served) -> None:
    message = ask(scripted, WEATHER, tools=[TOOL]).choices[0].message
    assert message.tool_calls[0].function.arguments == '{"city": "Paris"}'


def test_response_format(scripted: Served) -> None:
    content = ask(scripted, SAID_AS_JSON, response_format=Report).choices[0].message.content
    assert Report.model_validate_json(content) == PARIS


def test_context_window_exceeded(scripted: Served) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        ask(scripted, "a b " * 20_000)


def test_messages(scripted: Served) -> None:
    reply: Any = litellm.completion(
        model=f"anthropic/{scripted.model}",
        api_base=scripted.root,
        api_key="none",
        messages=[{"role": "user", "content": WEATHER}],
        tools=[TOOL],
    )
    assert reply.choices[0].message.tool_calls[0].function.name == "get_weather"


def test_responses(scripted: Served) -> None:
    reply: Any = litellm.responses(
        model=f"openai/{scripted.model}", api_base=scripted.url, api_key="none", input="Hello"
    )
    assert reply.output[0].content[0].text == "Hello! How can I help?"
