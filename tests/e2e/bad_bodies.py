"""Bodies that can't be served: (name, path, bytes, field that must be named). All of them get status 400."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"

MESSAGES_PATH = "/v1/messages"
RESPONSES_PATH = "/v1/responses"

USER = [{"role": "user", "content": "hi"}]
HUGE = b"1" + b"0" * 400


class BadBody(NamedTuple):
    """`param` None: the error is about no one field."""

    name: str
    path: str
    body: bytes
    param: str | None


def bad_field(path: str, field: str, value: Any, param: str | None = None) -> BadBody:
    """A request that is good but for one field."""
    good = {"prompt": "hi"} if path == TEXT else {"messages": USER}
    body = json.dumps({**good, "max_tokens": 2, field: value}).encode()
    return BadBody(f"{field}={value!r}"[:40], path, body, param or field)


def raw_field(field: str, value: bytes, param: str | None = None, name: str = "") -> BadBody:
    """A completion with a value that `json` would not write."""
    body = b'{"prompt": "hi", "%s": %s}' % (field.encode(), value)
    return BadBody(name or f"{field}: {value[:20]!r}", TEXT, body, param or field)


NO_JSON = [
    BadBody("nothing", CHAT, b"", None),
    BadBody("cut off", CHAT, b'{"messages": [', None),
    BadBody("no object", CHAT, b"[]", None),
    BadBody("null", TEXT, b"null", None),
    BadBody("not UTF-8", TEXT, b'{"prompt": "\xff\xfe"}', None),
    BadBody("raw surrogate", TEXT, b'{"prompt": "\xed\xa0\x80"}', None),
    BadBody("escaped surrogate", TEXT, b'{"prompt": "\\ud800 hi"}', None),
    BadBody("surrogates the wrong way round", TEXT, b'{"prompt": "\\udc00\\ud800"}', None),
    BadBody("surrogate in a stop string", TEXT, b'{"prompt": "hi", "stop": "\\ud800"}', None),
    BadBody("deep lists", TEXT, b'{"prompt": "hi", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    BadBody("deep objects", TEXT, b'{"prompt": "hi", "x": ' + b'{"a":' * 100_000 + b"}" * 100_000, None),
]

WRONG_TYPES = [
    bad_field(CHAT, field, value)
    for field, values in {
        "model": (5, ["test-model"]),
        "messages": ("hi", None, {}, 5),
        "stream": ("yes", 2),
        "stream_options": ("x", []),
        "max_tokens": ("five", 1.5, 1e300, True),
        "max_completion_tokens": ("five", [5]),
        "n": ("one", 1.5, True),
        "stop": (5, {}),
        "seed": ("a", 1.5),
        "temperature": ("hot", True, []),
        "top_p": ("a", {}),
        "top_k": ("a", 0.5),
        "min_p": ("a",),
        "frequency_penalty": ("a",),
        "presence_penalty": ("a", [1]),
        "repetition_penalty": ("a",),
        "logit_bias": ([1], 5, {"a": 1}, {"5": "a"}),
        "min_tokens": ("a", 1.5),
        "bad_words": ("a", 5),
        "allowed_token_ids": (5,),
        "truncate_prompt_tokens": ("a", 1.5),
        "ignore_eos": ("x", 2),
        "return_token_ids": (3,),
        "priority": ("high",),
        "logprobs": (5, "x"),
        "top_logprobs": ("a", True),
        "tools": ("x", {}),
        "tool_choice": (5, "always", {}),
        "parallel_tool_calls": ("x", []),
        "include_reasoning": ("x", 2),
        "reasoning_effort": (5, []),
        "enable_thinking": ("maybe", 2),
        "add_generation_prompt": ("x",),
        "chat_template": (5, "{{ messages }}"),
        "chat_template_kwargs": ([], "x"),
        "documents": ("x", [{"text": "a"}]),
        "include_stop_str_in_output": ("x",),
        "skip_special_tokens": ("x",),
        "add_special_tokens": ("x",),
        "guided_json": ("{", 5),
        "guided_grammar": ("::", 5),
        "service_tier": (5,),
        "user": (5,),
        "safety_identifier": ({},),
        "response_format": ("text",),
    }.items()
    for value in values
]

OUT_OF_RANGE = [
    bad_field(CHAT, field, value)
    for field, values in {
        "max_tokens": (0, -5, 10**18, 10**400),
        "max_completion_tokens": (0, -1),
        "n": (0, -1, 1000),
        "stop": ("", ["a"] * 17, "a" * 1001),
        "seed": (2**63, -(10**30)),
        "temperature": (-0.1, 2.1, 10**400),
        "top_p": (-0.1, 1.1),
        "top_k": (-2, 10**12),
        "min_p": (-0.1, 1.1),
        "frequency_penalty": (-2.1, 2.1),
        "presence_penalty": (-2.1, 2.1),
        "repetition_penalty": (0, -1, 101),
        "logit_bias": ({"5": 101}, {"-1": 1}, {"49152": 1}, {str(10**30): 1}, dict.fromkeys(range(1025), 1)),
        "min_tokens": (-1, 3),
        "bad_words": (["a"] * 129,),
        "allowed_token_ids": ([49152], [5] * 16_385),
        "truncate_prompt_tokens": (0, -2),
        "top_logprobs": (-1, 21),
        "model": (),
        "messages": ([],),
    }.items()
    for value in values
] + [
    raw_field(field, value)
    for field in ("temperature", "top_p", "frequency_penalty", "max_tokens")
    for value in (b"NaN", b"Infinity", b"-Infinity")
]
OUT_OF_RANGE += [
    *(bad_field(CHAT, "bad_words", [word], "bad_words[0]") for word in (5, "a" * 101, "")),
    *(bad_field(CHAT, "allowed_token_ids", [wrong], "allowed_token_ids[0]") for wrong in ("a", -1)),
    raw_field("temperature", b"1e999"),
    raw_field("temperature", HUGE),
    raw_field("seed", HUGE),
    raw_field("logit_bias", b'{"5": NaN}'),
]

MESSAGES = [
    bad_field(CHAT, "messages", value, param)
    for value, param in (
        ([5], "messages[0]"),
        ([{}], "messages[0].role"),
        ([{"role": "alien", "content": "hi"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([*USER, {"role": "user", "content": None}], "messages[1].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [5]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": "a b " * 8192}], "messages"),
        ([{"role": "assistant", "tool_calls": [{"id": "c1"}]}], "messages[0].tool_calls[0].function"),
    )
]

PROMPTS = [
    bad_field(TEXT, "prompt", value, param)
    for value, param in (
        ("", "prompt"),
        ([], "prompt"),
        ([[]], "prompt"),
        ([[5], []], "prompt"),
        ([""], "prompt"),
        (5, "prompt"),
        (None, "prompt"),
        ({}, "prompt"),
        ([1, "a"], "prompt"),
        ([True], "prompt[0]"),
        ([1.5], "prompt[0]"),
        ([[["a"]]], "prompt[0][0]"),
        ([-1], "prompt"),
        ([49152], "prompt"),
        ([2**63], "prompt"),
        ([10**400], "prompt"),
        (["a"] * 1000, "prompt"),
        ([[5]] * 1000, "prompt"),
        ([5] * 8192, "prompt"),
        ("a b " * 8192, "prompt"),
    )
]

CONTRADICTIONS = [
    bad_field(CHAT, "stream_options", {"include_usage": True}),
    bad_field(CHAT, "top_logprobs", 2),
    bad_field(CHAT, "continue_final_message", " "),
    bad_field(TEXT, "regex", "a|b"),
    bad_field(CHAT, "guided_regex", "("),
    bad_field(TEXT, "guided_choice", [5], "guided_choice[0]"),
    bad_field(CHAT, "structured_outputs", {"json": {"uniqueItems": True}}, "structured_outputs.json"),
    bad_field(CHAT, "tool_choice", "required"),
    bad_field(CHAT, "tools", [{}], "tools[0].function"),
    bad_field(CHAT, "tools", [{"type": "custom"}], "tools[0].type"),
    bad_field(CHAT, "tools", [{"function": {"name": ""}}], "tools[0].function.name"),
    bad_field(CHAT, "tools", [{"function": {"name": "f", "strict": 1}}], "tools[0].function.strict"),
    bad_field(CHAT, "echo", True),
    bad_field(TEXT, "max_tokens", 0),
    bad_field(TEXT, "prompt_logprobs", 21),
    BadBody(
        "a stream of what is told at once",
        TEXT,
        b'{"prompt": "a", "stream": true, "prompt_logprobs": 1}',
        "prompt_logprobs",
    ),
    bad_field(TEXT, "suffix", "the end"),
    BadBody("best_of below n", TEXT, b'{"prompt": "a", "n": 2, "best_of": 1}', "best_of"),
    BadBody("best_of in a stream", TEXT, b'{"prompt": "a", "stream": true, "best_of": 2}', "best_of"),
    BadBody("100 choices of 2 prompts", TEXT, b'{"prompt": ["a", "b"], "n": 100}', "n"),
    BadBody("neither", "/tokenize", b"{}", "prompt"),
    BadBody("both", "/tokenize", b'{"prompt": "a", "messages": []}', "prompt"),
    BadBody("no text", "/tokenize", b'{"prompt": 5}', "prompt"),
    BadBody("nothing to decode", "/detokenize", b"{}", "tokens"),
    BadBody("negative id", "/detokenize", b'{"tokens": [-1]}', "tokens[0]"),
    BadBody("huge id", "/detokenize", b'{"tokens": [' + HUGE + b"]}", "tokens[0]"),
]

# Of Anthropic's API, whose errors have the field in their message.
ANTHROPIC = [
    BadBody("no JSON for Anthropic", MESSAGES_PATH, b"{", None),
    BadBody("no max_tokens", MESSAGES_PATH, b'{"messages": []}', "max_tokens"),
    *(
        bad_field(MESSAGES_PATH, field, value, param)
        for field, value, param in (
            ("messages", [], "messages"),
            ("messages", [{"role": "user", "content": [{"type": "image"}]}], "messages[0].content[0].type"),
            ("messages", [{"role": "user", "content": "a b " * 8192}], "messages"),
            ("max_tokens", 0, "max_tokens"),
            ("temperature", 1.5, "temperature"),
            ("stop_sequences", [""], "stop_sequences[0]"),
            ("system", [{"type": "text"}], "system[0].text"),
            ("tools", [{"name": "web_search", "type": "web_search_20250305"}], "tools[0].type"),
            ("tool_choice", {"type": "any"}, "tool_choice"),
            ("thinking", {"type": "often"}, "thinking.type"),
            ("output_format", {"type": "json_schema", "schema": 5}, "output_format.schema"),
            ("chat_template_kwargs", {"tools": [1]}, "chat_template_kwargs.tools"),
            ("mcp_servers", [{}], "mcp_servers"),
            ("container", "c", "container"),
            ("service_tier", 5, "service_tier"),
            ("metadata", {"user_id": 5}, "metadata.user_id"),
            (
                "output_config",
                {"format": {"type": "json_schema", "schema": {"uniqueItems": True}}},
                "output_config.format.schema",
            ),
        )
    ),
]

WRONG_IN_RESPONSES: dict[str, dict[str, Any]] = {
    "input": {"input": []},
    "input[0].content[0].type": {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
    "input[0].type": {"input": [{"type": "computer_call"}]},
    "max_output_tokens": {"max_output_tokens": 0},
    "max_tokens": {"max_tokens": 5},
    "temperature": {"temperature": "hot"},
    "include[0]": {"include": ["all"]},
    "top_logprobs": {"top_logprobs": 2},
    "tools[0].type": {"tools": [{"type": "web_search"}]},
    "tool_choice": {"tool_choice": "required"},
    "text.format.schema": {"text": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
    "text.verbosity": {"text": {"verbosity": "high"}},
    "previous_response_id": {"previous_response_id": "resp_1"},
    "instructions": {"instructions": ["be brief"]},
    "reasoning.summary": {"reasoning": {"summary": "long"}},
    "truncation": {"truncation": "middle"},
    "metadata": {"metadata": {"a": 5}},
    "store": {"store": "yes"},
    "background": {"background": True},
    "stop_token_ids": {"stop_token_ids": [49152]},
}
RESPONSES = [
    BadBody(f"{field} of a response", RESPONSES_PATH, json.dumps({"input": "hi"} | fields).encode(), field)
    for field, fields in WRONG_IN_RESPONSES.items()
] + [
    BadBody("a long input", RESPONSES_PATH, json.dumps({"input": "a b " * 8192}).encode(), "input"),
    BadBody("no input", RESPONSES_PATH, b"{}", "input"),
]

BAD_BODIES = [*NO_JSON, *WRONG_TYPES, *OUT_OF_RANGE, *MESSAGES, *PROMPTS, *CONTRADICTIONS]
BAD_BODIES += [*RESPONSES, *ANTHROPIC]

# Of requests whose bodies are good: (name, value). The error is about the header.
BAD_HEADERS = [
    ("x-request-class", "interactive"),
    ("x-request-class", ""),
    *(
        (name, value)
        for name in ("x-ttft-goal-ms", "x-itl-goal-ms")
        for value in ("", "0", "0.000", "-5", "soon", "nan", "inf", "1e3", "1_000", "3600001", "9" * 400)
    ),
]
