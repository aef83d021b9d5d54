"""The official `openai` client for Python."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.clients.conftest import Served
from tests.clients.weather import (
    FRANCE,
    PARAMETERS,
    PARIS,
    SAID,
    SAID_AS_JSON,
    SUM,
    THOUGHT,
    TOOL,
    WEATHER,
    Report,
    get_weather,
)

pytestmark = pytest.mark.client("openai")


@pytest.fixture(params=["model", "scripted"])
def served(request: pytest.FixtureRequest) -> Served:
    found: Served = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def asked(content: str) -> Any:
    return [{"role": "user", "content": content}]


only_model = pytest.mark.parametrize("served", ["model"], indirect=True)
only_scripted = pytest.mark.parametrize("served", ["scripted"], indirect=True)


@only_model
def test_models(client: openai.OpenAI, served: Served) -> None:
    assert [model.id for model in client.models.list()] == [served.model]


@only_model
def test_chat(client: openai.OpenAI, served: Served) -> None:
    reply = client.chat.completions.create(model=served.model, messages=FRANCE, temperature=0, max_tokens=8)
    assert "Paris" in (reply.choices[0].message.content or "")
    assert reply._request_id


@only_model
def test_stream(client: openai.OpenAI, served: Served) -> None:
    fields: Any = {"model": served.model, "messages": FRANCE, "temperature": 0, "max_tokens": 8}
    stream = client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **fields)
    chunks = list(stream)
    whole = client.chat.completions.create(**fields)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


@only_model
def test_completions(client: openai.OpenAI, served: Served) -> None:
    reply = client.completions.create(model=served.model, prompt=["One, two,", "A, b,"], max_tokens=4)
    assert [choice.index for choice in reply.choices] == [0, 1]


@only_scripted
def test_stream_helper(client: openai.OpenAI, served: Served) -> None:
    with client.chat.completions.stream(model=served.model, messages=asked(WEATHER), tools=[TOOL]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    [call] = final.choices[0].message.tool_calls or []
    assert call.function.name == "get_weather"


@only_scripted
def test_reasoning(client: openai.OpenAI, served: Served) -> None:
    message: Any = client.chat.completions.create(model=served.model, messages=asked(SUM)).choices[0].message
    assert (message.content, message.reasoning_content) == ("42", "Ten and thirty, two more.")


def test_parse(client: openai.OpenAI, served: Served) -> None:
    reply = client.chat.completions.parse(
        model=served.model, messages=asked(SAID_AS_JSON), response_format=Report, max_tokens=60, temperature=0
    )
    parsed = reply.choices[0].message.parsed
    assert isinstance(parsed, Report)
    assert served.model != "scripted" or parsed == PARIS


@only_model
def test_parse_of_a_stream(client: openai.OpenAI, served: Served) -> None:
    with client.chat.completions.stream(
        model=served.model, messages=asked(SAID), response_format=Report, max_tokens=60, temperature=0
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Report)


def test_parse_of_a_tool(client: openai.OpenAI, served: Served) -> None:
    tool = openai.pydantic_function_tool(Report)
    reply = client.chat.completions.parse(
        model=served.model,
        messages=asked(SAID),
        tools=[tool],
        tool_choice="required",
        max_tokens=80,
        temperature=0,
        parallel_tool_calls=False,
    )
    [call, *_] = reply.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Report)


@only_scripted
@pytest.mark.parametrize("words", [WEATHER, THOUGHT])
def test_agent_of_two_steps(client: openai.OpenAI, served: Served, words: str) -> None:
    messages = asked(words)
    reply = client.chat.completions.create(model=served.model, messages=messages, tools=[TOOL])
    message = reply.choices[0].message
    assert reply.choices[0].finish_reason == "tool_calls"
    [call] = message.tool_calls or []
    assert call.type == "function"
    result = get_weather(**json.loads(call.function.arguments))
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": result}]
    last = client.chat.completions.create(model=served.model, messages=messages, tools=[TOOL])
    assert (last.choices[0].message.content, last.choices[0].finish_reason) == ("It is 18 degrees.", "stop")


@only_model
def test_embeddings_are_refused(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="embeddings"):
        client.embeddings.create(model=served.model, input="hi")


# --- Responses -----------------------------------------------------------------------------------------


@only_model
def test_responses(client: openai.OpenAI, served: Served) -> None:
    reply = client.responses.create(
        model=served.model, input=FRANCE[0]["content"], temperature=0, max_output_tokens=16
    )
    assert "Paris" in reply.output_text


@only_scripted
def test_responses_stream(client: openai.OpenAI, served: Served) -> None:
    with client.responses.stream(model=served.model, input=SUM) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert "response.output_text.delta" in kinds
    assert final.output_text == "42"
    assert [item.type for item in final.output] == ["reasoning", "message"]


def test_responses_parse(client: openai.OpenAI, served: Served) -> None:
    reply = client.responses.parse(
        model=served.model, input=SAID_AS_JSON, text_format=Report, max_output_tokens=60, temperature=0
    )
    assert isinstance(reply.output_parsed, Report)


@only_scripted
@pytest.mark.parametrize("words", [WEATHER, THOUGHT])
def test_responses_agent_of_two_steps(client: openai.OpenAI, served: Served, words: str) -> None:
    tool: Any = {"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": True}
    items = asked(words)
    reply = client.responses.create(model=served.model, input=items, tools=[tool])
    [call] = [item for item in reply.output if item.type == "function_call"]
    result = get_weather(**json.loads(call.arguments))
    items += [*reply.output, {"type": "function_call_output", "call_id": call.call_id, "output": result}]
    last = client.responses.create(model=served.model, input=items, tools=[tool])
    assert last.output_text == "It is 18 degrees."


@only_scripted
def test_responses_stream_of_a_call(client: openai.OpenAI, served: Served) -> None:
    tool: Any = {"type": "function", "name": "get_weather", "parameters": PARAMETERS}
    with client.responses.stream(model=served.model, input=WEATHER, tools=[tool]) as stream:
        events = {event.type: event for event in stream}
    done: Any = events["response.function_call_arguments.done"]
    assert json.loads(done.arguments) == {"city": "Paris"}
    assert "response.function_call_arguments.delta" in events


@only_scripted
def test_responses_with_reasoning_in_the_history(client: openai.OpenAI, served: Served) -> None:
    first = client.responses.create(
        model=served.model, input=asked(SUM), include=["reasoning.encrypted_content"]
    )
    items = [*asked(SUM), *first.output, *asked("Hello")]
    assert client.responses.create(model=served.model, input=items, store=False).output_text == "42"


@only_model
def test_responses_that_are_not_stored(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model=served.model, input="Hello", previous_response_id="resp_1")


@only_scripted
def test_responses_that_are_stored(client: openai.OpenAI, served: Served) -> None:
    tool: Any = {"type": "function", "name": "get_weather", "parameters": PARAMETERS}
    first = client.responses.create(model=served.model, input=WEATHER, tools=[tool])
    [call] = [item for item in first.output if item.type == "function_call"]
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees in Paris"}
    last = client.responses.create(
        model=served.model, input=[output], previous_response_id=first.id, tools=[tool]
    )
    assert last.output_text == "It is 18 degrees."
    assert client.responses.retrieve(last.id).output_text == last.output_text
    client.responses.delete(last.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(last.id)
