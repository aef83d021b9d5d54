"""The official `anthropic` client for Python, and LangChain's use of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.clients.conftest import Served
from tests.clients.weather import FRANCE, PARAMETERS, SUM, THOUGHT, WEATHER, get_weather

pytestmark = pytest.mark.client("anthropic")
TOOL: Any = {"name": "get_weather", "description": "The weather.", "input_schema": PARAMETERS}


@pytest.fixture
def client(scripted: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=scripted.root, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def asked(words: str, **fields: Any) -> Any:
    return {
        "model": "scripted",
        "max_tokens": 200,
        "messages": [{"role": "user", "content": words}],
        **fields,
    }


def test_messages(model: Served) -> None:
    with anthropic.Anthropic(base_url=model.root, api_key="none", max_retries=0) as client:
        reply: Any = client.messages.create(
            model=model.model, messages=FRANCE, max_tokens=8, extra_body={"temperature": 0}
        )
    assert "Paris" in reply.content[0].text
    assert (reply.stop_reason, reply.usage.output_tokens) in (("end_turn", 8), ("max_tokens", 8))


def test_stream(client: anthropic.Anthropic) -> None:
    with client.messages.stream(**asked("Hello")) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "Hello! How can I help?"
    assert final.stop_reason == "end_turn"


def test_thinking(client: anthropic.Anthropic) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    with client.messages.stream(**asked(SUM, max_tokens=1500, thinking=thinking)) as stream:
        kinds = {event.type for event in stream}
        final: Any = stream.get_final_message()
    assert "thinking" in kinds
    assert [block.type for block in final.content] == ["thinking", "text"]
    assert final.content[1].text == "42"


@pytest.mark.parametrize("words", [WEATHER, THOUGHT])
def test_agent_of_two_steps(client: anthropic.Anthropic, words: str) -> None:
    fields = asked(words, tools=[TOOL])
    reply = client.messages.create(**fields)
    assert reply.stop_reason == "tool_use"
    [call] = [block for block in reply.content if block.type == "tool_use"]
    arguments: Any = call.input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": get_weather(**arguments)}
    fields["messages"] += [
        {"role": "assistant", "content": reply.content},
        {"role": "user", "content": [result]},
    ]
    last: Any = client.messages.create(**fields)
    assert last.content[0].text == "It is 18 degrees."


def test_stream_of_a_call(client: anthropic.Anthropic) -> None:
    with client.messages.stream(**asked(WEATHER, tools=[TOOL])) as stream:
        kinds = {event.type for event in stream}
        final: Any = stream.get_final_message()
    assert "input_json" in kinds
    assert final.content[-1].input == {"city": "Paris"}


def test_forced_tool(model: Served) -> None:
    choice: Any = {"type": "tool", "name": "get_weather"}
    with anthropic.Anthropic(base_url=model.root, api_key="none", max_retries=0) as client:
        reply = client.messages.create(
            model=model.model,
            messages=FRANCE,
            max_tokens=80,
            tools=[TOOL],
            tool_choice=choice,
            extra_body={"temperature": 0},
        )
    assert [block.type for block in reply.content] == ["tool_use"]


def test_count_tokens(client: anthropic.Anthropic) -> None:
    fields = asked(WEATHER, tools=[TOOL])
    counted = client.messages.count_tokens(
        model=fields["model"], messages=fields["messages"], tools=fields["tools"]
    )
    reply = client.messages.create(**fields)
    cached = reply.usage.cache_read_input_tokens or 0
    assert counted.input_tokens == reply.usage.input_tokens + cached


def test_errors(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**asked("Hello", model="another"))
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(**asked("Hello", max_tokens=0))
