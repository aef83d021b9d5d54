"""From the bytes of a request to generations, or to an error that names the field."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from gateway_support import CARD
from hypothesis import given
from hypothesis import strategies as st

from flowkv_common.errors import BadRequest
from flowkv_common.wire.parts import SamplingParams
from flowkv_gateway.errors import ContextLengthExceeded
from flowkv_gateway.generation import Generation
from flowkv_gateway.params import ChatRequest, CompletionRequest
from flowkv_gateway.parsing import parse_json
from flowkv_gateway.planning import plan

USER = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> ChatRequest:
    request = parse_json(json.dumps({"messages": USER, **fields}).encode(), ChatRequest)
    request.check()
    return request


def completion(**fields: Any) -> CompletionRequest:
    request = parse_json(json.dumps({"prompt": "hi", **fields}).encode(), CompletionRequest)
    request.check()
    return request


def planned(request: ChatRequest | CompletionRequest, *prompts: list[int]) -> list[list[Generation]]:
    return plan(request, prompts or ([5, 6],), CARD, request_id="cmpl-1", seed=7, deadline_s=60.0)


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 10**30}, "top_k"),
    ({"min_p": -1}, "min_p"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": ["a", 1]}, "stop[1]"),
    ({"stop": "x" * 1001}, "stop"),
    ({"frequency_penalty": 2.1}, "frequency_penalty"),
    ({"presence_penalty": -2.1}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": float("nan")}}, "logit_bias"),
    ({"logit_bias": {"five": 1}}, "logit_bias"),
    ({"logit_bias": {"512": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"ignore_eos": "yes"}, "ignore_eos"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"max_tokens": 127}, "max_tokens"),
]
BAD_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [*USER, {"role": "user", "content": 5}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"max_completion_tokens": 127}, "max_completion_tokens"),
]
BAD_COMPLETION: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": [[1, "a"]]}, "prompt[0][1]"),
    ({"logprobs": 21}, "logprobs"),
    ({"echo": True}, "echo"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 2}, "best_of"),
]


def named_field(build: Any, fields: dict[str, Any]) -> str | None:
    with pytest.raises(BadRequest) as caught:
        planned(build(**fields))
    return caught.value.field


@pytest.mark.parametrize(("fields", "field"), BAD_FIELDS + BAD_CHAT)
def test_bad_chat_field_is_named(fields: dict[str, Any], field: str) -> None:
    assert named_field(chat, fields) == field


@pytest.mark.parametrize(("fields", "field"), BAD_FIELDS + BAD_COMPLETION)
def test_bad_completion_field_is_named(fields: dict[str, Any], field: str) -> None:
    assert named_field(completion, fields) == field


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"messages": "\xff"}',
        b'{"a":' + b"[" * 100_000,
        b'{"messages": "\\ud800"}',
    ],
)
def test_bytes_that_are_no_request(body: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_json(body, ChatRequest)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from([*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__])


@given(fields=st.dictionaries(FIELDS, JSON, max_size=4), body=st.binary(max_size=8))
def test_any_json_is_planned_or_refused(fields: dict[str, Any], body: bytes) -> None:
    for kind in (ChatRequest, CompletionRequest):
        for payload in (body, json.dumps({"messages": USER, "prompt": "a", **fields}).encode()):
            with contextlib.suppress(BadRequest):
                request = parse_json(payload, kind)
                request.check()
                planned(request)


def test_null_and_unknown_fields_are_nothing() -> None:
    nulls = dict.fromkeys((*CompletionRequest.__struct_fields__, "metadata", "zz"))
    [[generation]] = planned(completion(**{**nulls, "prompt": "a"}))
    assert generation.sampling == SamplingParams(max_tokens=16, seed=7)


def test_every_parameter_arrives() -> None:
    given_params = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "frequency_penalty": -1.0,
        "presence_penalty": 1.0,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "ignore_eos": True,
        "seed": -5,
    }
    request = chat(**given_params, logit_bias={"7": -100}, max_tokens=9, logprobs=True, priority=-3)
    [[generation]] = planned(request)
    assert generation.sampling == SamplingParams(
        max_tokens=9, num_logprobs=0, logit_bias={7: -100.0}, **given_params
    )
    assert generation.priority == -3
    assert generation.request_id == "cmpl-1"


@pytest.mark.parametrize(
    ("fields", "sampled"),
    [
        ({"temperature": 1e-300}, {"temperature": 0.0}),
        ({"top_p": 0}, {"top_p": 1e-9}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"max_tokens": 5, "max_completion_tokens": 6}, {"max_tokens": 6}),
        ({}, {"max_tokens": 126}),  # the rest of the context
        ({"logprobs": True, "top_logprobs": 4}, {"num_logprobs": 4}),
    ],
)
def test_values_that_stand_for_others(fields: dict[str, Any], sampled: dict[str, Any]) -> None:
    [[generation]] = planned(chat(**fields))
    assert {name: getattr(generation.sampling, name) for name in sampled} == sampled


def test_n_samples_of_several_prompts_differ_in_id_and_seed_alone() -> None:
    groups = planned(completion(n=2, seed=2**63 - 1), [1], [2])
    assert [[one.request_id for one in group] for group in groups] == [
        ["cmpl-1-0", "cmpl-1-1"],
        ["cmpl-1-2", "cmpl-1-3"],
    ]
    assert [[one.sampling.seed for one in group] for group in groups] == [[2**63 - 1, -(2**63)]] * 2
    assert [[one.prompt_ids for one in group] for group in groups] == [[[1]] * 2, [[2]] * 2]


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [([], BadRequest), ([512], BadRequest), ([-1], BadRequest), ([1] * 128, ContextLengthExceeded)],
)
def test_prompts_that_the_model_cannot_take(prompt: list[int], kind: type[BadRequest]) -> None:
    for request, field in ((chat(), "messages"), (completion(), "prompt")):
        with pytest.raises(kind) as caught:
            planned(request, prompt)
        assert caught.value.field == field


def test_a_prompt_that_leaves_room_for_one_token() -> None:
    [[generation]] = planned(completion(), [1] * 127)
    assert generation.sampling.max_tokens == 1


def test_too_many_choices() -> None:
    assert len(planned(completion(n=64), [1], [2])) == 2
    with pytest.raises(BadRequest):
        planned(completion(n=65), [1], [2])
