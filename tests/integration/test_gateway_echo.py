"""`echo` and `prompt_logprobs` over HTTP: an answer tells of its prompt."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from flowkv_common.wire.messages import TokenChunk, TokenLogprob
from flowkv_gateway.tokenizer import Tokenizer
from tests.gateway_support import EOS, Gateway, serving, token_chunk

PROMPT = "the fox"


@pytest.fixture
async def gateway(tokenizer: Tokenizer) -> AsyncIterator[Gateway]:
    async with serving(tokenizer) as gateway:
        yield gateway


@pytest.fixture
def prompt_ids(tokenizer: Tokenizer) -> list[int]:
    return tokenizer._encode([PROMPT], False)[0]


def told(prompt_ids: list[int], first: int = 1, num_top: int = 3) -> TokenChunk:
    """Token `i` of the prompt is number `i` of all, with -i; better ones are 10, 11, ..."""
    entries = [
        TokenLogprob(
            token_id=prompt_ids[at],
            logprob=-float(at),
            top=[(10 + rank, -0.5 - rank) for rank in range(num_top)],
            rank=at,
        )
        for at in range(first, len(prompt_ids))
    ]
    return TokenChunk(transfer_id="r.0", index=0, token_ids=[], prompt_logprobs=entries, prompt_index=first)


def answer(token_id: int) -> list[TokenChunk]:
    logprob = TokenLogprob(token_id=token_id, logprob=-0.25, top=[(token_id, -0.25)])
    return [token_chunk(token_id, logprobs=[logprob]), token_chunk(EOS, finish_reason="stop")]


async def complete(gateway: Gateway, **fields: Any) -> dict[str, Any]:
    response = await gateway.http.post("/v1/completions", json={"prompt": PROMPT, **fields})
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


async def test_the_prompt_stands_in_front_of_the_answer(
    gateway: Gateway, tokenizer: Tokenizer, prompt_ids: list[int]
) -> None:
    vocabulary = tokenizer.vocabulary
    [a] = tokenizer._encode(["a"], False)[0]
    gateway.dispatch.script = [told(prompt_ids), *answer(a)]
    reply = await complete(gateway, echo=True, logprobs=1)
    [choice] = reply["choices"]
    assert choice["text"] == PROMPT + "a"
    shown = choice["logprobs"]
    texts = [vocabulary.token_text(token_id) for token_id in prompt_ids]
    assert shown["tokens"] == [*texts, "a"]
    assert "".join(shown["tokens"]) == choice["text"]
    num_prompt = len(prompt_ids)
    assert shown["token_logprobs"] == [None, *(-float(at) for at in range(1, num_prompt)), -0.25]
    best = vocabulary.token_text(10)
    expected = [{best: -0.5, text: -float(at)} for at, text in enumerate(texts)][1:]
    assert shown["top_logprobs"] == [None, *expected, {"a": -0.25}]
    for offset, token in zip(shown["text_offset"], shown["tokens"], strict=True):
        assert choice["text"][offset:].startswith(token)
    assert reply["usage"]["completion_tokens"] == 2
    assert "prompt_logprobs" not in choice


async def test_nothing_but_the_prompt(gateway: Gateway, tokenizer: Tokenizer, prompt_ids: list[int]) -> None:
    [a] = tokenizer._encode(["a"], False)[0]
    gateway.dispatch.script = [told(prompt_ids), *answer(a)]
    reply = await complete(gateway, echo=True, logprobs=0, max_tokens=0, n=2, stop="fox")
    assert [choice["text"] for choice in reply["choices"]] == [PROMPT, PROMPT]
    assert [choice["finish_reason"] for choice in reply["choices"]] == ["length", "length"]
    shown = [choice["logprobs"]["token_logprobs"] for choice in reply["choices"]]
    assert shown == [[None, *(-float(at) for at in range(1, len(prompt_ids)))]] * 2
    assert reply["usage"]["completion_tokens"] == 0
    assert reply["usage"]["total_tokens"] == len(prompt_ids)
    [without] = (await complete(gateway, echo=True, max_tokens=0))["choices"]
    assert (without["text"], without["logprobs"]) == (PROMPT, None)


async def test_each_prompt_of_a_batch_is_told_as_it_was_given(
    gateway: Gateway, tokenizer: Tokenizer, prompt_ids: list[int]
) -> None:
    gateway.dispatch.script = answer(5)
    fields: dict[str, Any] = {"echo": True, "max_tokens": 0}
    texts = ["hello", "<|start|>the dog", "world"]
    reply = await complete(gateway, prompt=texts, n=2, **fields)
    assert [choice["text"] for choice in reply["choices"]] == [text for text in texts for _ in range(2)]
    for ids in (prompt_ids, [prompt_ids]):
        [choice] = (await complete(gateway, prompt=ids, **fields))["choices"]
        assert choice["text"] == PROMPT
    [cut] = (await complete(gateway, truncate_prompt_tokens=1, **fields))["choices"]
    assert cut["text"] == tokenizer.vocabulary.token_text(prompt_ids[-1])


async def test_a_stream_has_the_prompt_with_its_first_token(
    gateway: Gateway, tokenizer: Tokenizer, prompt_ids: list[int]
) -> None:
    [a] = tokenizer._encode(["a"], False)[0]
    gateway.dispatch.script = [told(prompt_ids), *answer(a)]
    body = {"prompt": PROMPT, "echo": True, "logprobs": 0, "stream": True}
    lines = (await gateway.http.post("/v1/completions", json=body)).text.splitlines()
    first, second = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert (first["text"], second["text"]) == (PROMPT + "a", "")
    assert len(first["logprobs"]["tokens"]) == len(prompt_ids) + 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "n": 2}),
        ("/v1/completions", {"prompt": PROMPT, "echo": True, "logprobs": 0, "n": 2}),
    ],
)
async def test_vllms_form(gateway: Gateway, tokenizer: Tokenizer, path: str, body: dict[str, Any]) -> None:
    """At the top of a chat, in each choice of a completion."""
    ids: list[int] = []

    def script() -> Any:
        if not ids:
            ids.extend(gateway.dispatch.asked[0].prompt_ids)
        yield told(ids)
        yield from answer(5)

    class Scripts:
        def __iter__(self) -> Any:
            return script()

    gateway.dispatch.script = Scripts()
    reply = (await gateway.http.post(path, json={**body, "prompt_logprobs": 2})).json()
    holders = [reply] if "chat" in path else reply["choices"]
    text = tokenizer.vocabulary.token_text
    for holder in holders:
        first, *others = holder["prompt_logprobs"]
        assert first is None
        for at, entry in enumerate(others, start=1):
            assert entry == {
                str(ids[at]): {"logprob": -float(at), "rank": at, "decoded_token": text(ids[at])},
                "10": {"logprob": -0.5, "rank": 1, "decoded_token": text(10)},
                "11": {"logprob": -1.5, "rank": 2, "decoded_token": text(11)},
            }
        assert len(others) == len(ids) - 1
    if "chat" not in path:  # each form has as many as it asks for
        tops = reply["choices"][1]["logprobs"]["top_logprobs"]
        assert [len(entry) for entry in tops[1:]] == [1] * len(ids)
    assert "prompt_logprobs" not in json.dumps((await gateway.http.post(path, json=body)).json())
