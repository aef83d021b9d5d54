"""From the bytes of a request to generations, or to an error that names the field."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from flowkv_common.errors import BadRequest
from flowkv_common.wire.messages import ModelCard, SamplingParams
from flowkv_gateway.chat import ChatFormat
from flowkv_gateway.errors import ContextLengthExceeded
from flowkv_gateway.messages import MessagesRequest
from flowkv_gateway.prompts import (
    SamplingDefaults,
    bad_word_ids,
    load_sampling_defaults,
    plan,
    service_goals,
)
from flowkv_gateway.request_state import RequestState, ServiceGoals
from flowkv_gateway.schemas import (
    REFUSED,
    Body,
    ChatRequest,
    CompletionRequest,
    Refused,
    ResponseRequest,
    TokenizeRequest,
    parse_json,
    parse_request,
)
from flowkv_gateway.tokenizer import Tokenizer
from tests.contract.api_page import CHANGE_NOTHING
from tests.e2e.bad_bodies import BAD_BODIES, BAD_HEADERS
from tests.gateway_support import CARD, write_tokenizer

USER = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> ChatRequest:
    body = json.dumps({"messages": USER, **fields}).encode()
    return parse_request(body, ChatRequest)


def completion(**fields: Any) -> CompletionRequest:
    body = json.dumps({"prompt": "hi", **fields}).encode()
    return parse_request(body, CompletionRequest)


def planned(
    request: ChatRequest | CompletionRequest,
    *prompts: list[int],
    defaults: SamplingDefaults | None = None,
    card: ModelCard = CARD,
) -> list[list[RequestState]]:
    return plan(
        request,
        prompts or ([5, 6],),
        card,
        defaults or SamplingDefaults(),
        request_id="cmpl-1",
        seed=7,
        deadline_s=60.0,
    )


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
    ({"stream": 2}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"max_tokens": 10.5}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stop_token_ids": [512]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
    ({"allowed_token_ids": [512]}, "allowed_token_ids"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids[0]"),
    ({"allowed_token_ids": [1] * 16_385}, "allowed_token_ids"),
    ({"allowed_token_ids": {"1": 1}}, "allowed_token_ids"),
    ({"bad_words": "x"}, "bad_words"),
    ({"bad_words": [""]}, "bad_words[0]"),
    ({"bad_words": ["x", [5]]}, "bad_words[1]"),
    ({"bad_words": ["x" * 101]}, "bad_words[0]"),
    ({"bad_words": ["x"] * 129}, "bad_words"),
    ({"service_tier": 5}, "service_tier"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": "all"}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 5, "truncation_side": "right"}, "truncation_side"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
]
BAD_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "system", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["a", {"type": "refusal"}]}]}, "messages[0].content[1].text"),
    ({"messages": [*USER, {"role": "user", "content": 5}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"echo": True}, "echo"),
    ({"echo": True, "max_tokens": 0}, "max_tokens"),
    ({"regex": "a|b"}, "regex"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
]
BAD_COMPLETION: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": [[1, "a"]]}, "prompt[0][1]"),
    ({"logprobs": 21}, "logprobs"),
    ({"suffix": "end"}, "suffix"),
    ({"max_tokens": 0, "echo": False}, "max_tokens"),
    ({"echo": "yes"}, "echo"),
    ({"best_of": 0}, "best_of"),
    ({"best_of": 2, "n": 3}, "best_of"),
    ({"best_of": 129}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
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


def test_to_tokenize_is_either_a_prompt_or_messages() -> None:
    for fields, field in (
        ({}, "prompt"),
        ({"prompt": "a", "messages": USER}, "prompt"),
        ({"prompt": "a", "messages": []}, "prompt"),
        ({"messages": []}, "messages"),
    ):
        with pytest.raises(BadRequest) as caught:
            parse_request(json.dumps(fields).encode(), TokenizeRequest)
        assert caught.value.field == field


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
    kinds: tuple[type[ChatRequest | CompletionRequest], ...] = (ChatRequest, CompletionRequest)
    for kind in kinds:
        for payload in (body, json.dumps({"messages": USER, "prompt": "a", **fields}).encode()):
            with contextlib.suppress(BadRequest):
                planned(parse_json(payload, kind))


def test_null_and_unknown_fields_are_nothing() -> None:
    nulls = dict.fromkeys((*CompletionRequest.__struct_fields__, "metadata", "zz"))
    [[generation]] = planned(completion(**{**nulls, "prompt": "a"}))
    assert generation.sampling == SamplingParams(max_tokens=16, seed=7)


def test_every_parameter_arrives() -> None:
    given_params: dict[str, Any] = {
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
        ({"max_tokens": 32000}, {"max_tokens": 126}),
        ({"max_completion_tokens": 127}, {"max_tokens": 126}),
        (
            {"max_tokens": 10.0, "temperature": "0.5", "top_k": "40"},
            {"max_tokens": 10, "temperature": 0.5, "top_k": 40},
        ),
        ({"logit_bias": []}, {"logit_bias": {}}),
        ({"seed": -1}, {"seed": 7}),  # the one that was drawn
        ({"stop_token_ids": [5, 9]}, {"stop_token_ids": [5, 9]}),
        ({"allowed_token_ids": [5, 9]}, {"allowed_token_ids": [5, 9]}),
        ({"allowed_token_ids": [], "bad_words": []}, {"allowed_token_ids": [], "bad_words": []}),
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


def test_an_overlong_prompt_is_refused_in_the_words_that_clients_look_for() -> None:
    with pytest.raises(
        ContextLengthExceeded, match=r"^This model's maximum context length is 128 tokens\. However,"
    ):
        planned(completion(max_tokens=1), [1] * 128)


def test_a_prompt_that_leaves_room_for_one_token() -> None:
    [[generation]] = planned(completion(), [1] * 127)
    assert generation.sampling.max_tokens == 1


def test_min_tokens_over_the_room_that_a_prompt_leaves() -> None:
    [[generation]] = planned(completion(min_tokens=8, max_tokens=200), [1] * 120)
    assert generation.sampling.min_tokens == generation.sampling.max_tokens == 8
    with pytest.raises(BadRequest, match=r"may have, 8 tokens: .* prompt leaves of the model's 128 tokens"):
        planned(completion(min_tokens=9, max_tokens=200), [1] * 120)


@pytest.mark.parametrize(
    ("fields", "kept", "max_tokens"),
    [
        ({"truncate_prompt_tokens": 3}, 3, 9),
        ({"truncate_prompt_tokens": 999, "max_tokens": 8}, 120, 8),
        ({"truncate_prompt_tokens": -1}, 119, 9),  # of 128 with the answer
        ({"truncate_prompt_tokens": -1, "max_tokens": 500}, 1, 127),
    ],
)
def test_a_prompt_is_cut_to_its_last_tokens(fields: dict[str, Any], kept: int, max_tokens: int) -> None:
    prompt = list(range(120))
    for request in (chat(**{"max_tokens": 9, **fields}), completion(**{"max_tokens": 9, **fields})):
        [[cut]] = planned(request, prompt)
        assert (cut.prompt_ids, cut.sampling.max_tokens) == (prompt[-kept:], max_tokens)


def test_only_the_first_of_several_answers_asks_for_the_prompts_log_probabilities() -> None:
    [group] = planned(completion(echo=True, logprobs=2, prompt_logprobs=5, n=3, max_tokens=0))
    assert [one.sampling.num_prompt_logprobs for one in group] == [5, None, None]
    assert [one.sampling.max_tokens for one in group] == [1, 1, 1]
    [[silent]] = planned(completion(echo=True, prompt_logprobs=None))
    [[plain]] = planned(completion(logprobs=2))
    assert silent.sampling.num_prompt_logprobs is plain.sampling.num_prompt_logprobs is None
    [[asked]] = planned(chat(prompt_logprobs=0))
    assert asked.sampling.num_prompt_logprobs == 0


def test_there_is_a_limit_to_what_is_told_of_prompts() -> None:
    card = replace(CARD, max_model_len=10_000)
    prompts = [[1] * 8_000] * 15
    with pytest.raises(BadRequest, match="1000000 log probabilities") as caught:
        planned(completion(prompt_logprobs=20), *prompts, card=card)
    assert caught.value.field == "prompt_logprobs"
    planned(completion(echo=True, logprobs=1), *prompts, card=card)


def test_the_limit_counts_what_each_choice_repeats() -> None:
    prompt, card = [1] * 8_000, replace(CARD, max_model_len=10_000)
    planned(completion(echo=True, logprobs=0, n=125), prompt, card=card)
    for fields in ({"echo": True, "logprobs": 0}, {"prompt_logprobs": 0}):
        with pytest.raises(BadRequest, match="in all its choices"):
            planned(completion(**fields, n=126), prompt, card=card)
    planned(chat(prompt_logprobs=20, n=128), prompt, card=card)  # at its top, once


def test_a_prompt_that_is_too_long_is_cut_to_what_leaves_room() -> None:
    [[silent]] = planned(chat(truncate_prompt_tokens=-1), [1] * 500)
    assert (len(silent.prompt_ids), silent.sampling.max_tokens) == (127, 1)
    [[cut]] = planned(completion(truncate_prompt_tokens=-1), [1] * 500)
    assert (len(cut.prompt_ids), cut.sampling.max_tokens) == (112, 16)


def test_best_of_makes_more_samples_than_are_sent() -> None:
    [group] = planned(completion(n=2, best_of=3))
    assert [one.sampling.num_logprobs for one in group] == [0] * 3
    assert len(planned(completion(n=2, best_of=2))[0]) == 2
    assert planned(completion(best_of=2, logprobs=4))[0][0].sampling.num_logprobs == 4


async def test_a_bad_word_is_bad_with_and_without_a_space_before_it(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path))
    words = await bad_word_ids([" fox", "fox", "  "], tokenizer)
    assert [await tokenizer.decode(word) for word in words] == ["fox", " fox", " "]
    words = await bad_word_ids(["\n"], tokenizer)
    assert [await tokenizer.decode(word) for word in words] == ["\n", " \n"]
    assert await bad_word_ids([], tokenizer) == []


def test_too_many_choices() -> None:
    assert len(planned(completion(n=64), [1], [2])) == 2
    with pytest.raises(BadRequest):
        planned(completion(n=65), [1], [2])


TOOL = {"function": {"name": "f"}}
SHOWS_ALL = "{{ messages[0].content }}|{{ tools is none }}|{{ documents is none }}|{{ tools }}{{ documents }}"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "hi|True|True|NoneNone"),
        ({"tools": [], "documents": []}, "hi|True|True|NoneNone"),
        ({"tools": [TOOL], "tool_choice": "none"}, "hi|True|True|NoneNone"),
        ({"tools": [TOOL], "tool_choice": "auto"}, "hi|False|True|[{'function': {'name': 'f'}}]None"),
        ({"documents": [{"a": 1}]}, "hi|True|False|None[{'a': 1}]"),
    ],
    ids=str,
)
async def test_what_is_tokenized_is_what_is_answered(
    tmp_path: Path, fields: dict[str, Any], text: str
) -> None:
    (write_tokenizer(tmp_path) / "chat_template.jinja").write_text(SHOWS_ALL)
    tokenizer = Tokenizer.load(tmp_path)
    messages = [{"role": "user", "content": "hi"}]
    counted = parse_request(json.dumps({"messages": messages, **fields}).encode(), TokenizeRequest)
    chats = ChatFormat(tokenizer)
    for request in (counted, chat(messages=messages, **fields)):
        prompt = await tokenizer.encode_chat(chats.conversation(request))
        assert prompt.text == text == await tokenizer.decode(prompt.token_ids)


# --- fields that are known and not served ------------------------------------------------------------------

GOOD: dict[type[Body], dict[str, Any]] = {
    ChatRequest: {"messages": USER},
    CompletionRequest: {"prompt": "a"},
    ResponseRequest: {"input": "a"},
    TokenizeRequest: {"prompt": "a"},
}


def served(kind: type[Body], **fields: Any) -> None:
    good = GOOD[kind]
    assert isinstance(parse_request(json.dumps({**good, **fields}).encode(), kind), kind)


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
def test_a_known_field_is_refused_by_its_name_unless_it_asks_for_nothing(row: Refused) -> None:
    for kind in row.bodies:
        for value in (True, False, 0, 1, 0.5, "x", ["x"], {"x": 1}):
            if value in row.accepted:
                continue
            with pytest.raises(BadRequest, match=row.name) as caught:
                served(kind, **{row.name: value})
            assert caught.value.field == row.name
        for value in row.accepted:
            served(kind, **{row.name: value})


@pytest.mark.parametrize(
    "fields",
    [
        *({"echo": off} for off in ("false", "0", 0, "False")),
        *({"use_beam_search": "false"}, {"return_tokens_as_token_ids": 0}),
        *({"thinking_token_budget": "-1"}, {"thinking_token_budget": -1.0}, {"watermarking": "false"}),
    ],
    ids=str,
)
def test_a_flag_or_number_that_asks_for_nothing_may_be_written_as_text(fields: dict[str, Any]) -> None:
    served(ChatRequest, **fields)
    [name] = fields
    with pytest.raises(BadRequest, match=f"{name} is not supported") as caught:
        served(ChatRequest, **{name: "1"})
    assert caught.value.field == name


def test_a_field_of_another_endpoint_is_unknown() -> None:
    served(ChatRequest, suffix="x", return_token_strs=True)
    served(TokenizeRequest, echo=True)


def test_what_can_change_nothing_is_accepted() -> None:
    fields: dict[str, Any] = dict.fromkeys(CHANGE_NOTHING, {"a": [1]})
    assert planned(chat(**fields, max_tokens=3)) == planned(chat(max_tokens=3))
    assert planned(completion(**fields)) == planned(completion())


def test_every_field_of_openai_is_known() -> None:
    from openai.types import completion_create_params as completions
    from openai.types.chat import completion_create_params as chats
    from openai.types.responses import response_create_params as responses

    kinds: list[tuple[Any, type[Body]]] = [
        (chats.CompletionCreateParamsStreaming, ChatRequest),
        (completions.CompletionCreateParamsStreaming, CompletionRequest),
        (responses.ResponseCreateParamsStreaming, ResponseRequest),
    ]
    for params, kind in kinds:
        refused = {row.name for row in REFUSED if kind in row.bodies}
        assert set(params.__annotations__) - set(kind.__struct_fields__) - refused <= set(CHANGE_NOTHING)


def test_a_cluster_is_sent_a_bad_value_of_every_field() -> None:
    named = {re.split(r"[.\[]", body.param)[0] for body in BAD_BODIES if body.param}
    for kind in (ChatRequest, CompletionRequest, ResponseRequest, MessagesRequest):
        assert set(kind.__struct_fields__) <= named


def test_no_field_is_told_of_twice() -> None:
    tables = [*{row.name for row in REFUSED}, *CHANGE_NOTHING]
    assert len(tables) == len(set(tables))
    for kind in GOOD:
        refused = {row.name for row in REFUSED if kind in row.bodies}
        assert not refused & set(kind.__struct_fields__)
        shown = {"metadata", "store"} if kind is ResponseRequest else set()
        assert set(CHANGE_NOTHING) & set(kind.__struct_fields__) == shown


# --- the model's own sampling defaults ---------------------------------------------------------------------

MODELS = SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20, min_p=0.05, repetition_penalty=1.05)


def test_the_models_defaults_apply_where_the_request_is_silent() -> None:
    [[silent]] = planned(chat(max_tokens=9, seed=3), defaults=MODELS)
    assert silent.sampling == SamplingParams(
        max_tokens=9, seed=3, temperature=0.6, top_p=0.95, top_k=20, min_p=0.05, repetition_penalty=1.05
    )
    neutral = {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1}
    [[said]] = planned(chat(max_tokens=9, seed=3, **neutral), defaults=MODELS)
    assert said.sampling == SamplingParams(max_tokens=9, seed=3, temperature=0.0)
    [[mixed]] = planned(completion(top_k=7), defaults=SamplingDefaults(top_k=-1, temperature=0.0))
    assert (mixed.sampling.top_k, mixed.sampling.temperature) == (7, 0.0)


def test_defaults_are_read_from_the_models_folder_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert load_sampling_defaults(tmp_path, "auto") == SamplingDefaults()
    file = tmp_path / "generation_config.json"
    file.write_text('{"eos_token_id": [2], "do_sample": false, "top_k": null}')
    assert load_sampling_defaults(tmp_path, "auto") == SamplingDefaults()
    assert caplog.messages == []
    file.write_text(
        '{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 9}'
    )
    assert load_sampling_defaults(tmp_path, "none") == SamplingDefaults()
    assert load_sampling_defaults(tmp_path, "auto") == SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95)
    [line] = caplog.messages
    assert "'temperature': 0.6" in line
    for broken in ('{"temperature": -1}', '{"top_p": "much"}', "[]", "{"):
        file.write_text(broken)
        with pytest.raises(ValueError, match="FLOWKV_GENERATION_CONFIG=none"):
            load_sampling_defaults(tmp_path, "auto")


# --- headers -----------------------------------------------------------------------------------------------


def test_goals_and_the_class_come_in_headers() -> None:
    assert service_goals({}) == ServiceGoals()
    headers = {"x-ttft-goal-ms": "1500", "x-itl-goal-ms": "62.5", "x-request-class": "batch"}
    goals = service_goals(headers)
    assert goals == ServiceGoals(ttft_s=1.5, itl_s=0.0625, is_batch=True)
    state = RequestState("r", [1], SamplingParams(max_tokens=1), 60.0, "f", goals=goals)
    asked = state.schedule_request([])
    assert (asked.ttft_goal_s, asked.itl_goal_s, asked.is_batch) == goals


@pytest.mark.parametrize(("name", "value"), BAD_HEADERS)
def test_a_bad_header_is_named(name: str, value: str) -> None:
    with pytest.raises(BadRequest) as caught:
        service_goals({name: value})
    assert caught.value.field == name
