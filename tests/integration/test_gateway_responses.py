"""OpenAI's Responses over real HTTP, by its official client, with a model that says what it is told to."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import openai
import pydantic
import pytest

from flowkv_common.errors import Unavailable
from flowkv_common.wire.messages import TokenLogprob
from flowkv_gateway import answer
from flowkv_gateway.tokenizer import Tokenizer
from tests.gateway_support import (
    CARD,
    MODEL,
    Gateway,
    serving,
    text_chunks,
    token_chunk,
)

PATH = "/v1/responses"
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
ASKED: Any = {"model": MODEL, "input": "Weather in Paris?", "tools": [WEATHER]}


def without_ids(items: list[Any]) -> list[dict[str, Any]]:
    return [item.model_dump(exclude={"id", "call_id"}, exclude_none=True) for item in items]


async def test_an_answer_whole_and_streamed(gateway: Gateway) -> None:
    response = await gateway.client.responses.create(**ASKED)
    reasoning, message, call = response.output
    assert reasoning.type == "reasoning"
    assert reasoning.content is not None
    assert reasoning.content[0].text == "I ask."
    assert message.type == "message"
    assert response.output_text == "Well."
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Paris"})
    assert (response.status, response.model, response.object) == ("completed", MODEL, "response")
    [asked] = gateway.dispatch.asked
    assert response.id == asked.request_id
    assert response.usage is not None
    assert response.usage.input_tokens == len(asked.prompt_ids)
    assert response.usage.output_tokens == len(list(gateway.dispatch.script))
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens

    async with gateway.client.responses.stream(**ASKED) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    assert without_ids(final.output) == without_ids(response.output)


async def test_the_result_of_a_call_goes_back(gateway: Gateway, thinking: Tokenizer) -> None:
    create = gateway.client.responses.create
    first = await create(**ASKED)
    call = first.output[-1]
    assert call.type == "function_call"
    gateway.dispatch.script = text_chunks(thinking, "I know.</think>\n\nSunny.")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    history: Any = [{"role": "user", "content": "Weather?"}, *first.output, result]
    second = await create(**{**ASKED, "input": history})
    assert second.output_text == "Sunny."
    prompt = await thinking.decode(gateway.dispatch.asked[-1].prompt_ids)
    called = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}'
    assert f"assistant\n<think>I ask.</think>Well.{called}<|end|>" in prompt
    assert "tool\nsunny<|end|>" in prompt


class City(pydantic.BaseModel):
    name: str
    sights: list[str]


async def test_a_parsed_answer(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, text='{"name": "Paris", "sights": ["Louvre"]}') as gateway:
        response = await gateway.client.responses.parse(model=MODEL, input="A city", text_format=City)
        assert response.output_parsed == City(name="Paris", sights=["Louvre"])
        grammar = gateway.dispatch.asked[0].sampling.grammar
        assert grammar is not None
        assert grammar.kind == "json_schema"
        async with gateway.client.responses.stream(model=MODEL, input="A city", text_format=City) as stream:
            assert (await stream.get_final_response()).output_parsed == response.output_parsed
        bad = {"format": {"type": "json_schema", "name": "n", "schema": {"uniqueItems": True}}}
        refused = await gateway.http.post(PATH, json={"input": "A city", "text": bad})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "text.format.schema")
        assert refused.json()["error"]["message"].startswith("text.format.schema: ")


async def test_an_answer_without_room(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as gateway:
        gateway.dispatch.script = text_chunks(tokenizer, "hello", finish_reason="length")
        response = await gateway.client.responses.create(model=MODEL, input="hi", max_output_tokens=16)
        [message] = response.output
        assert message.type == "message"
        assert (response.status, message.status) == ("incomplete", "incomplete")
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        assert gateway.dispatch.asked[0].sampling.max_tokens == 16
        stream = await gateway.client.responses.create(model=MODEL, input="hi", stream=True)
        assert [event.type async for event in stream][-1] == "response.incomplete"
        long = await gateway.http.post(PATH, json={"input": "hello " * 200})
        assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert long.json()["error"]["param"] == "input"
        assert "your input resulted in" in long.json()["error"]["message"]


async def test_the_oldest_turns_are_dropped_where_that_is_asked_for(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as gateway:

        async def prompt(*said: str, **fields: Any) -> str:
            items = [
                {"role": ("user", "assistant")[place % 2], "content": one} for place, one in enumerate(said)
            ]
            body = {"input": items, "instructions": "Code.", "truncation": "auto", **fields}
            reply = await gateway.http.post(PATH, json=body)
            assert reply.status_code == 200, reply.text
            return await tokenizer.decode(gateway.dispatch.asked[-1].prompt_ids)

        system, last = "<|start|>system\nCode.<|end|>\n", "<|start|>user\nlast<|end|>\n<|start|>assistant\n"
        window, size = CARD.max_model_len, len(tokenizer._encode([system + last], False)[0])
        for num_turns in (1, 9, 40):
            turns = [f"{number} hello" for number in range(2 * num_turns)]
            shown = await prompt(*turns, "last")
            assert shown.startswith(system)
            assert shown.endswith(last)
            num_shown = len(gateway.dispatch.asked[-1].prompt_ids)
            if num_turns == 1:
                assert "user\n0 hello" in shown
                continue
            assert "user\n0 hello" not in shown
            assert shown.removeprefix(system).startswith("<|start|>user\n")
            whole = f"<|start|>user\n{turns[0]}<|end|>\n<|start|>assistant\n{turns[1]}<|end|>\n"
            turn_size = len(tokenizer._encode([whole], False)[0]) + 2  # numbers grow
            assert window - window // 8 - turn_size < num_shown <= window - window // 8
        assert await prompt(*turns, "last", max_output_tokens=window - size) == shown
        assert len(await prompt(*turns, "last", max_output_tokens=1)) >= len(shown)
        alone = {"input": "hello " * 200, "truncation": "auto"}
        assert (await gateway.http.post(PATH, json=alone)).status_code == 400


async def test_errors_before_and_in_a_stream(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as gateway:
        for script, status in (([Unavailable("no")], 503), ([], 500)):
            gateway.dispatch.script = script
            for streams in (True, False):
                with pytest.raises(openai.APIStatusError) as raised:
                    await gateway.client.responses.create(model=MODEL, input="hi", stream=streams)
                assert raised.value.status_code == status
        gateway.dispatch.script = [*text_chunks(tokenizer, "hi", finish_reason=None), Unavailable("no")]
        stream = await gateway.client.responses.create(model=MODEL, input="hi", stream=True)
        last = [event async for event in stream][-1]
        assert last.type == "response.failed"
        assert last.response.error is not None
        assert (last.response.status, last.response.error.code) == ("failed", "server_error")


async def test_a_stream_opens_before_its_first_token(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "HEADERS_AFTER_S", 0.01)
    gate = asyncio.Event()
    async with serving(tokenizer) as gateway:
        gateway.dispatch.script = [gate, *text_chunks(tokenizer, "hi")]
        stream = await gateway.client.responses.create(model=MODEL, input="hi\u2028there", stream=True)
        events = aiter(stream)
        assert [(await anext(events)).type for _ in range(2)] == ["response.created", "response.in_progress"]
        gate.set()
        assert [event.type async for event in events][-1] == "response.completed"


async def test_log_probabilities(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as gateway:
        [a, b] = tokenizer._encode(["ab"], False)[0]
        tops = [TokenLogprob(token_id=one, logprob=-0.5, top=[(a, -0.5), (b, -1.0)]) for one in (a, b)]
        gateway.dispatch.script = [
            token_chunk(a, logprobs=tops[:1]),
            token_chunk(b, logprobs=tops[1:], finish_reason="stop"),
        ]
        fields: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
        response = await gateway.client.responses.create(model=MODEL, input="hi", **fields)
        assert gateway.dispatch.asked[0].sampling.num_logprobs == 2
        [message] = response.output
        assert message.type == "message"
        [part] = message.content
        assert part.type == "output_text"
        assert part.logprobs is not None
        assert [(one.token, len(one.top_logprobs)) for one in part.logprobs] == [("a", 2), ("b", 2)]


async def test_what_the_coding_agents_of_this_api_send(gateway: Gateway) -> None:
    text = {"type": "input_text", "text": "<environment>linux</environment>"}
    tool = {"type": "function", "name": "shell", "strict": False, "parameters": {"type": "object"}}
    body = {
        "model": MODEL,
        "instructions": "You code.",
        "input": [
            {"type": "message", "role": "developer", "content": [text]},
            {"type": "message", "role": "user", "content": [text]},
            {"type": "reasoning", "summary": [], "content": None, "encrypted_content": "x"},
            {"type": "function_call", "name": "shell", "arguments": "{}", "call_id": "c1"},
            {
                "type": "function_call",
                "name": "wait",
                "namespace": "agents",
                "arguments": "{}",
                "call_id": "c2",
            },
            {"type": "function_call_output", "call_id": "c1", "output": "ok"},
        ],
        "tools": [tool, {"type": "namespace", "name": "agents", "description": "", "tools": [tool]}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
        "client_metadata": {"a": "b"},
    }
    reply = await gateway.http.post(PATH, json=body)
    assert reply.status_code == 200
    names = [line.removeprefix("event: ") for line in reply.text.splitlines() if line.startswith("event: ")]
    assert (names[0], names[-1]) == ("response.created", "response.completed")


# --- stored responses -------------------------------------------------------------------------------------


async def test_nothing_is_stored_unless_that_was_set(gateway: Gateway) -> None:
    response = await gateway.client.responses.create(model=MODEL, input="hi")
    assert response.model_dump()["store"] is False
    refused = await gateway.http.post(PATH, json={"input": "hi", "previous_response_id": response.id})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "previous_response_id")
    for ask in (gateway.client.responses.retrieve, gateway.client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            await ask(response.id)


async def test_a_stored_response_is_gone_on_from(thinking: Tokenizer) -> None:
    async with serving(thinking, text="I ask.</think>\n\nWell.", response_store=2) as gateway:
        gateway.dispatch.card = msgspec.structs.replace(CARD, max_model_len=2000)
        responses = gateway.client.responses
        first = await responses.create(model=MODEL, input="Hi.", instructions="You code.")
        assert first.model_dump()["store"] is True
        async with responses.stream(model=MODEL, input="And?", previous_response_id=first.id) as stream:
            second = await stream.get_final_response()
        assert second.previous_response_id == first.id
        prompt = await thinking.decode(gateway.dispatch.asked[-1].prompt_ids)
        said = "user\nHi.<|end|>\n<|start|>assistant\n<think>I ask.</think>Well.<|end|>\n<|start|>user\nAnd?"
        assert prompt.startswith(f"<|start|>{said}<|end|>")  # without the instructions
        kept = await responses.retrieve(second.id)
        assert kept.model_dump()["usage"] == second.model_dump()["usage"]
        message = kept.output[1]
        assert message.type == "message"
        assert message.id == second.output[1].to_dict()["id"]
        listed = (await responses.input_items.list(second.id, order="asc")).data
        assert [item.type for item in listed] == ["message", "reasoning", "message", "message"]

        again: Any = [
            {"role": "user", "content": "Hi."},
            {"type": "item_reference", "id": message.id},
        ]
        third = await responses.create(model=MODEL, input=again, store=False)
        prompt = await thinking.decode(gateway.dispatch.asked[-1].prompt_ids)
        assert "assistant\nWell.<|end|>" in prompt
        with pytest.raises(openai.NotFoundError):
            await responses.retrieve(third.id)
        await responses.delete(second.id)
        for gone in (second.id, "resp_none"):
            with pytest.raises(openai.BadRequestError) as refused:
                await responses.create(model=MODEL, input="And?", previous_response_id=gone)
            assert refused.value.code == "previous_response_not_found"
        refused_stream = await gateway.http.get(f"{PATH}/{first.id}", params={"stream": "true"})
        assert (refused_stream.status_code, refused_stream.json()["error"]["param"]) == (400, "stream")


async def test_a_key_sees_its_own_responses_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("alice sk-alice\nbob sk-bob\n")
    settings: dict[str, Any] = {"api_keys_file": str(tmp_path / "keys"), "response_store": 5}
    async with serving(tokenizer, **settings) as gateway:
        alice, bob = (
            gateway.client.with_options(api_key=f"sk-{name}").responses for name in ("alice", "bob")
        )
        response = await alice.create(model=MODEL, input="hi")
        assert (await alice.retrieve(response.id)).id == response.id
        for ask in (bob.retrieve, bob.delete, bob.input_items.list):
            with pytest.raises(openai.NotFoundError):
                await ask(response.id)
