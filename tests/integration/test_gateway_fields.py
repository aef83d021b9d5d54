"""Fields of OpenAI and vLLM that ask for more than the plain answer, over HTTP."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from flowkv_common.wire.messages import TokenChunk, TokenLogprob
from flowkv_gateway.tokenizer import Tokenizer
from tests.gateway_support import CARD, EOS, Gateway, serving, text_chunks, token_chunk


@pytest.fixture
async def gateway(tokenizer: Tokenizer) -> AsyncIterator[Gateway]:
    async with serving(tokenizer, text="hello world") as gateway:
        yield gateway


class OneAfterAnother:
    """A script of its own for each request."""

    def __init__(self, scripts: Iterable[list[TokenChunk]]) -> None:
        self._scripts = iter(scripts)

    def __iter__(self) -> Iterator[TokenChunk]:
        return iter(next(self._scripts))


def sure(token_id: int, *logprobs: float) -> list[TokenChunk]:
    """An answer of this token, so often and so probable."""
    entries = [TokenLogprob(token_id=token_id, logprob=logprob) for logprob in logprobs]
    *others, last = [token_chunk(token_id, logprobs=[entry]) for entry in entries]
    return [*others, token_chunk(*last.token_ids, logprobs=last.logprobs, finish_reason="length")]


async def test_each_prompt_has_its_best_answer(gateway: Gateway, tokenizer: Tokenizer) -> None:
    a, b, c, d = tokenizer._encode(["abcd"], False)[0]
    # The first of each prompt goes ahead.
    gateway.dispatch.script = OneAfterAnother([sure(a, -3), sure(b, -9), sure(c, -4), sure(d, -8)])
    reply = (
        await gateway.http.post("/v1/completions", json={"prompt": [[5], [6]], "best_of": 2, "max_tokens": 3})
    ).json()
    assert [(choice["index"], choice["text"]) for choice in reply["choices"]] == [(0, "a"), (1, "d")]
    assert reply["usage"]["completion_tokens"] == 4
    assert [asked.sampling.num_logprobs for asked in gateway.dispatch.asked] == [0] * 4


async def test_the_best_come_first(gateway: Gateway, tokenizer: Tokenizer) -> None:
    """By their mean: a long answer is no worse than a short one."""
    a, b, c = tokenizer._encode(["abc"], False)[0]
    answers = [sure(a, -3.0), sure(b, -1.0, -1.0, -1.0), sure(c, -2.0)]
    fields: dict[str, Any] = {"prompt": [5], "n": 2, "best_of": 3}
    for logprobs in (None, 0):
        gateway.dispatch.script = OneAfterAnother(answers)
        reply = (await gateway.http.post("/v1/completions", json={**fields, "logprobs": logprobs})).json()
        assert [(choice["index"], choice["text"]) for choice in reply["choices"]] == [(0, "bbb"), (1, "c")]
        shown = [choice["logprobs"] and choice["logprobs"]["token_logprobs"] for choice in reply["choices"]]
        assert shown == ([None, None] if logprobs is None else [[-1.0, -1.0, -1.0], [-2.0]])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi"}),
    ],
)
async def test_bans_and_cuts_reach_the_nodes(
    gateway: Gateway, tokenizer: Tokenizer, path: str, body: dict[str, Any]
) -> None:
    bans = {"bad_words": ["fox"], "allowed_token_ids": [5, 6], "truncate_prompt_tokens": 1}
    assert (await gateway.http.post(path, json={**body, **bans})).status_code == 200
    [asked] = gateway.dispatch.asked
    assert asked.sampling.allowed_token_ids == [5, 6]
    words = [await tokenizer.decode(word) for word in asked.sampling.bad_words]
    assert words == ["fox", " fox"]
    assert len(asked.prompt_ids) == 1
    outside = {**body, "allowed_token_ids": [CARD.vocab_size]}
    refused = await gateway.http.post(path, json=outside)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "allowed_token_ids")


CHAT: tuple[str, dict[str, Any]] = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
TEXT: tuple[str, dict[str, Any]] = ("/v1/completions", {"prompt": "hi"})


@pytest.mark.parametrize(
    ("fields", "end", "finish_reason", "stop_reason"),
    [
        ({}, "stop", "stop", None),
        ({}, "length", "length", None),
        ({"stop": ["x", "o w", "lo w"]}, "stop", "stop", "lo w"),
        ({"stop": "world"}, "length", "stop", "world"),
        ({"stop_token_ids": [EOS]}, "stop", "stop", EOS),
        ({"stop_token_ids": [EOS]}, "length", "length", None),
        ({"stop_token_ids": [7]}, "stop", "stop", None),
    ],
)
@pytest.mark.parametrize(("path", "body"), [CHAT, TEXT])
async def test_what_stopped_an_answer_is_said_once(
    gateway: Gateway,
    tokenizer: Tokenizer,
    path: str,
    body: dict[str, Any],
    fields: dict[str, Any],
    end: str,
    finish_reason: str,
    stop_reason: str | int | None,
) -> None:
    tokens = text_chunks(tokenizer, "hello world", finish_reason=None)
    gateway.dispatch.script = [*tokens, token_chunk(EOS, finish_reason=end)]
    [choice] = (await gateway.http.post(path, json={**body, **fields})).json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == (finish_reason, stop_reason)
    lines = (await gateway.http.post(path, json={**body, **fields, "stream": True})).text.splitlines()
    *deltas, last = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert (last["finish_reason"], last["stop_reason"]) == (finish_reason, stop_reason)
    assert not any("stop_reason" in delta for delta in deltas)


@pytest.mark.parametrize(("path", "body"), [CHAT, TEXT])
async def test_an_answer_says_by_what_it_was_made(gateway: Gateway, path: str, body: dict[str, Any]) -> None:
    plain = (await gateway.http.post(path, json=body)).json()
    assert plain["system_fingerprint"].startswith("fp_")
    assert "service_tier" not in plain
    asked = {**body, "service_tier": "flex", "metadata": {"a": "b"}}
    tiered = (await gateway.http.post(path, json=asked)).json()
    assert (tiered["system_fingerprint"], tiered["service_tier"]) == (plain["system_fingerprint"], "default")
    gateway.dispatch.card = replace(CARD, fingerprint="g")
    other = (await gateway.http.post(path, json=body)).json()
    assert other["system_fingerprint"] != plain["system_fingerprint"]


async def test_a_model_has_several_names(tokenizer: Tokenizer) -> None:
    names: dict[str, Any] = {"model_name": "nodes-name", "model_names": "main, other/name,,third"}
    async with serving(tokenizer, model_path="/models/folder", **names) as gateway:
        listed = (await gateway.http.get("/v1/models")).json()["data"]
        assert [entry["id"] for entry in listed] == ["main", "other/name", "third"]
        assert {entry["root"] for entry in listed} == {"main"}
        for name, shown in (("main", "main"), ("other/name", "other/name"), ("folder", "main")):
            assert (await gateway.http.get(f"/v1/models/{name}")).json()["id"] == shown
            answer = (await gateway.http.post("/v1/completions", json={"prompt": "a", "model": name})).json()
            assert answer["model"] == "main"
        for name in ("nodes-name", "main, other/name", ""):
            refused = await gateway.http.post("/v1/completions", json={"prompt": "a", "model": name})
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert (
            await gateway.metric('vllm:request_success_total{finished_reason="stop",model_name="main"') == 3
        )
