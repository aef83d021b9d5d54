"""Anthropic's Messages over real HTTP, with a model that says what it was told to."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flowkv_common.errors import Full, Internal, Unavailable
from flowkv_gateway.tokenizer import Tokenizer
from tests.gateway_support import (
    CARD,
    EOS,
    MODEL,
    PLAIN,
    Gateway,
    ScriptedDispatch,
    serving,
    text_chunks,
    token_chunk,
    tokenizer_with,
)
from tests.message_events import events_of, joined, without_ids

PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
USER = [{"role": "user", "content": "Weather in Paris?"}]
TOOL = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}


async def create(gateway: Gateway, **fields: Any) -> dict[str, Any]:
    """The message, without its id."""
    body = {"model": MODEL, "max_tokens": 500, "messages": USER, **fields}
    reply = await gateway.http.post(PATH, json=body)
    assert reply.status_code == 200, reply.text
    message: dict[str, Any] = reply.json()
    assert message.pop("id").startswith("msg_")
    return message


async def stream(gateway: Gateway, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": MODEL, "max_tokens": 500, "messages": USER, "stream": True, **fields}
    return events_of((await gateway.http.post(PATH, json=body)).text)


async def test_thinking_text_and_a_call(gateway: Gateway) -> None:
    whole = await create(gateway, tools=[TOOL])
    thought, text, call = whole["content"]
    assert thought == {"type": "thinking", "thinking": "I ask.", "signature": "unsigned"}
    assert text == {"type": "text", "text": "Well."}
    assert call.pop("id").startswith("toolu_")
    assert call == {"type": "tool_use", "name": "weather", "input": {"city": "Paris"}}
    assert {name: whole[name] for name in ("type", "role", "model", "stop_reason", "stop_sequence")} == {
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "stop_reason": "tool_use",
        "stop_sequence": None,
    }
    events = await stream(gateway, tools=[TOOL])
    assert without_ids(joined(events)) == without_ids(whole)
    pieces = [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"]
    assert pieces.count("input_json_delta") > 2
    assert pieces.count("thinking_delta") > 2
    assert pieces.count("signature_delta") == 1


async def test_usage_counts_what_was_cached_apart(gateway: Gateway, thinking: Tokenizer) -> None:
    *chunks, last = text_chunks(thinking, "hm</think>ok", finish_reason=None)
    gateway.dispatch.script = [
        *[msgspec.structs.replace(chunk, num_cached_tokens=8) for chunk in (*chunks, last)],
        token_chunk(EOS, finish_reason="stop", num_cached_tokens=8),
    ]
    whole = await create(gateway)
    [asked] = gateway.dispatch.asked
    assert whole["usage"] == {
        "input_tokens": len(asked.prompt_ids) - 8,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 8,
        "output_tokens": len(chunks) + 2,
        "service_tier": "standard",
        "output_tokens_details": {"thinking_tokens": 2},
    }
    first, *_, end, _ = await stream(gateway)
    assert first["message"]["usage"]["cache_read_input_tokens"] == 8  # where clients look
    assert end["usage"] == whole["usage"]


async def test_two_turns_with_a_tool(gateway: Gateway, thinking: Tokenizer) -> None:
    called = await create(gateway, tools=[TOOL])
    [call] = [block for block in called["content"] if block["type"] == "tool_use"]
    result = {
        "type": "tool_result",
        "tool_use_id": call["id"],
        "content": [{"type": "text", "text": "sunny"}],
    }
    gateway.dispatch.script = text_chunks(thinking, "So.</think>It is sunny.")
    history = [
        *USER,
        {"role": "assistant", "content": called["content"]},
        {"role": "user", "content": [result]},
    ]
    answer = await create(gateway, messages=history, tools=[TOOL])
    assert answer["content"][-1] == {"type": "text", "text": "It is sunny."}
    assert answer["stop_reason"] == "end_turn"
    prompt = await thinking.decode(gateway.dispatch.asked[-1].prompt_ids)
    assert "assistant\n<think>I ask.</think>Well.<tool_call>" in prompt
    assert "tool\nsunny<|end|>" in prompt


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("fields", "end", "stop_reason", "stop_sequence"),
    [
        ({}, "stop", "end_turn", None),
        ({"max_tokens": 4}, "length", "max_tokens", None),
        ({}, "length", "model_context_window_exceeded", None),
        ({"stop_sequences": ["x", "o w"]}, "stop", "stop_sequence", "o w"),
    ],
)
async def test_why_an_answer_ended(
    tokenizer: Tokenizer,
    streams: bool,
    fields: dict[str, Any],
    end: str,
    stop_reason: str,
    stop_sequence: str | None,
) -> None:
    async with serving(tokenizer) as gateway:
        chunks = text_chunks(tokenizer, "hello world", finish_reason=None)
        chunks = [*chunks, token_chunk(EOS, finish_reason=end)]
        assert len(chunks) == 4
        gateway.dispatch.script = chunks
        message = joined(await stream(gateway, **fields)) if streams else await create(gateway, **fields)
        assert (message["stop_reason"], message["stop_sequence"]) == (stop_reason, stop_sequence)
        shown = "hello world".partition(stop_sequence or "!")[0]
        assert message["content"] == [{"type": "text", "text": shown}]


async def test_an_answer_without_text_has_no_blocks(gateway: Gateway) -> None:
    gateway.dispatch.script = [token_chunk(EOS, finish_reason="stop")]
    for message in (await create(gateway), joined(await stream(gateway))):
        assert (message["content"], message["stop_reason"]) == ([], "end_turn")


async def test_thinking_as_it_is_asked_for(gateway: Gateway, thinking: Tokenizer) -> None:
    async def prompt(**fields: Any) -> str:
        await create(gateway, **fields)
        return await thinking.decode(gateway.dispatch.asked[-1].prompt_ids)

    assert (await prompt()).endswith("<think>")
    assert (await prompt(thinking={"type": "enabled", "budget_tokens": 2048})).endswith("<think>")
    assert (await prompt(thinking={"type": "disabled"})).endswith("<think></think>")
    assert (await prompt(output_config={"effort": "low"})).endswith("low<think>")
    gateway.dispatch.script = text_chunks(thinking, "hm</think>ok")
    hidden = await create(gateway, thinking={"type": "adaptive", "display": "omitted"})
    assert hidden["content"] == [{"type": "text", "text": "ok"}]


async def test_a_begun_answer_is_continued(gateway: Gateway, thinking: Tokenizer) -> None:
    await create(gateway, messages=[*USER, {"role": "assistant", "content": "It is"}])
    prompt = await thinking.decode(gateway.dispatch.asked[-1].prompt_ids)
    assert prompt.endswith("<|start|>assistant\nIt is")
    bare = [*USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": "a"}]}]
    await check_refused(gateway, {"messages": bare}, "messages: The last message can't be continued")


async def test_structured_output(tmp_path: Path) -> None:
    tokenizer = await asyncio.to_thread(tokenizer_with, tmp_path, PLAIN)
    async with serving(tokenizer, text='{"a": 1}') as gateway:
        gateway.dispatch.card = msgspec.structs.replace(CARD, max_model_len=2000)
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        wanted = {"format": {"type": "json_schema", "schema": schema}}
        assert (await create(gateway, output_config=wanted))["content"][0]["text"] == '{"a": 1}'
        grammar = gateway.dispatch.asked[0].sampling.grammar
        assert grammar is not None
        assert json.loads(grammar.text) == schema
        wanted["format"]["schema"] = {"uniqueItems": True}
        await check_refused(gateway, {"output_config": wanted}, "output_config.format.schema: ")
        await create(gateway, tools=[TOOL], tool_choice={"type": "tool", "name": "weather"})
        grammar = gateway.dispatch.asked[1].sampling.grammar
        assert grammar is not None
        assert '"weather"' in grammar.text
        choice = {"type": "tool", "name": "no such"}
        await check_refused(gateway, {"tools": [TOOL], "tool_choice": choice}, "tool_choice")


async def test_tokens_are_counted_as_they_are_used(gateway: Gateway) -> None:
    asked = {"messages": USER, "system": "Be brief.", "tools": [TOOL], "thinking": {"type": "disabled"}}
    counted = await gateway.http.post(COUNT, json={"model": MODEL, **asked})
    message = await create(gateway, **asked)
    assert counted.json() == {"input_tokens": message["usage"]["input_tokens"]}
    unknown = await gateway.http.post(COUNT, json={**asked, "model": "another"})
    assert unknown.status_code == 404
    assert unknown.json()["error"]["type"] == "not_found_error"


# --- a coding agent ----------------------------------------------------------------------------------------

CACHED = {"cache_control": {"type": "ephemeral"}}
# As Claude Code sends it, but for the length of its texts.
AGENT: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 32000,
    "stream": True,
    "temperature": 1,
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.232; cch=fa690;"},
        {"type": "text", "text": "You are a coding agent.", **CACHED},
        {"type": "text", "text": "Use the tools.", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
    ],
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<system-reminder>\nToday is Sunday.\n</system-reminder>"},
                {"type": "text", "text": "List the files.", **CACHED},
            ],
        },
        {"role": "system", "content": "<total_tokens>5000 tokens left</total_tokens>"},
    ],
    "tools": [
        {
            "name": "Bash",
            "description": "Runs a command.",
            "input_schema": {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "type": "object",
                "properties": {
                    "command": {"type": "string"},
                    "timeout": {"type": "number", "minimum": 0},
                    "run_in_background": {"type": "boolean"},
                },
                "required": ["command"],
                "additionalProperties": False,
            },
        },
        {"name": "Edit", "input_schema": {"type": "object", "properties": {}}, "eager_input_streaming": True},
    ],
    "metadata": {"user_id": '{"device_id":"d","session_id":"s"}'},
    "thinking": {"type": "adaptive"},
    "output_config": {"effort": "medium"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
}
HEADERS = {
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
    "anthropic-dangerous-direct-browser-access": "true",
    "x-app": "cli",
    "x-api-key": "none",
}


async def test_the_requests_of_a_coding_agent(
    gateway: Gateway, thinking: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    count = {name: AGENT[name] for name in ("model", "messages", "system", "tools", "thinking")}
    counted = await gateway.http.post(f"{COUNT}?beta=true", json=count, headers=HEADERS)
    assert counted.json()["input_tokens"] > 50
    called = '{"name": "Bash", "arguments": {"command": "ls"}}'
    gateway.dispatch.script = text_chunks(thinking, f"Look.</think><tool_call>{called}</tool_call>")
    reply = await gateway.http.post(f"{PATH}?beta=true", json=AGENT, headers=HEADERS)
    first = joined(events_of(reply.text))
    call = first["content"][1]
    assert (call["type"], call["input"], first["stop_reason"]) == ("tool_use", {"command": "ls"}, "tool_use")
    [line] = [record for record in caplog.records if record.getMessage() == "request ended"]
    assert line.__dict__["fields"]["user"] == AGENT["metadata"]["user_id"]
    result = {
        "type": "tool_result",
        "tool_use_id": call["id"],
        "content": "a.py",
        "is_error": False,
        **CACHED,
    }
    gateway.dispatch.script = text_chunks(thinking, "Good.</think>There is a.py.")
    more = [
        *AGENT["messages"],
        {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": [result]},
        {"role": "system", "content": "<total_tokens>4000 tokens left</total_tokens>"},
    ]
    reply = await gateway.http.post(PATH, json={**AGENT, "messages": more}, headers=HEADERS)
    assert joined(events_of(reply.text))["content"][-1]["text"] == "There is a.py."
    before, after = [await thinking.decode(asked.prompt_ids) for asked in gateway.dispatch.asked]
    assert "billing" not in before
    assert before.count("<|start|>system") == after.count("<|start|>system") == 2  # tools have their own here
    history = before[: before.rindex("<|start|>assistant")]
    assert after.startswith(history)  # so the prefix cache has it


# --- errors ------------------------------------------------------------------------------------------------


async def check_refused(gateway: Gateway, fields: dict[str, Any], message: str) -> None:
    for path in (PATH, COUNT) if "output_config" not in fields else (PATH,):
        reply = await gateway.http.post(path, json={"max_tokens": 500, "messages": USER, **fields})
        assert reply.status_code == 400
        error = reply.json()
        assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
        assert message in error["error"]["message"]


async def test_an_error_names_its_field(gateway: Gateway) -> None:
    image = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    await check_refused(
        gateway, {"messages": image}, "messages[0].content[0].type: Only text can be read here, not 'image'."
    )
    overlong = [{"role": "user", "content": "a b " * 4000}]
    reply = await gateway.http.post(PATH, json={"max_tokens": 5, "messages": overlong})
    # By these words agents find out that they must shorten the history.
    assert re.search(r"prompt is too long: \d+ tokens > 3999 maximum", reply.json()["error"]["message"])


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Full("full", retry_after_s=3.0), 429, "rate_limit_error"),
        (Unavailable("no node", retry_after_s=1.0), 503, "overloaded_error"),
        (Internal("our fault"), 500, "api_error"),
    ],
)
async def test_errors_of_the_cluster(tokenizer: Tokenizer, error: Exception, status: int, kind: str) -> None:
    async with serving(tokenizer, dispatch=ScriptedDispatch([error])) as gateway:
        body = {"max_tokens": 5, "messages": USER, "stream": True}
        reply = await gateway.http.post(PATH, json=body)
        assert (reply.status_code, reply.json()["error"]["type"]) == (status, kind)
        assert reply.headers["request-id"] == reply.headers["x-request-id"]
        assert ("retry-after" in reply.headers) == (status != 500)
        gateway.dispatch.script = [*text_chunks(tokenizer, "hi", finish_reason=None), error]
        *_, last = events_of((await gateway.http.post(PATH, json=body)).text)
        assert last == {"type": "error", "error": {"type": kind, "message": str(error)}}


async def test_errors_before_the_endpoint(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("me secret\n")
    async with serving(tokenizer, api_keys_file=str(tmp_path / "keys"), max_body_bytes=4096) as gateway:
        body = {"max_tokens": 5, "messages": USER}
        for headers, kind in (({}, "authentication_error"), ({"x-api-key": "secret"}, None)):
            reply = await gateway.http.post(PATH, json=body, headers=headers)
            assert reply.json().get("error", {}).get("type") == kind
        keyed = {"x-api-key": "secret"}
        for reply, status, kind in (
            (await gateway.http.get(PATH, headers=keyed), 405, "invalid_request_error"),
            (await gateway.http.post(PATH, content="{", headers=keyed), 400, "invalid_request_error"),
            (await gateway.http.post(PATH, content=" " * 5000, headers=keyed), 413, "request_too_large"),
            (await gateway.http.post(f"{PATH}/batches", headers=keyed), 404, "not_found_error"),
        ):
            assert (reply.status_code, reply.json()["error"]["type"]) == (status, kind)


async def test_a_silence_is_filled_by_pings(tokenizer: Tokenizer) -> None:
    gate = asyncio.Event()
    async with serving(tokenizer, ping_s=0.05) as gateway:
        gateway.dispatch.script = [gate, *text_chunks(tokenizer, "hi")]
        body = {"max_tokens": 5, "messages": USER, "stream": True}
        async with gateway.http.stream("POST", PATH, json=body) as reply:
            lines = reply.aiter_lines()
            shown = [await anext(lines) for _ in range(3)]
            assert shown == ["event: ping", 'data: {"type":"ping"}', ""]
            gate.set()
            rest = [line async for line in lines if line.startswith("event: ") and line != "event: ping"]
        assert rest[0] == "event: message_start"
        assert rest[-1] == "event: message_stop"
