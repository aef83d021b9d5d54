"""Calls and reasoning in text: a split changes nothing, no text is lost, what templates write is read."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkv_gateway.parsers import (
    FORMATS,
    Arguments,
    CallBegins,
    Content,
    Leftover,
    Parser,
    Reasoning,
    parser_for,
)
from flowkv_gateway.parsers.harmony import Harmony

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "count": {"type": "integer"},
                    "ratio": {"type": "number"},
                    "exact": {"type": "boolean"},
                    "nothing": {"type": "null"},
                    "words": {"type": "array", "items": {"type": "string"}},
                    "filters": {"type": "object"},
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]
PARSERS = list(dict.fromkeys(format.parser for format in FORMATS))
every_parser = pytest.mark.parametrize("make", PARSERS)


class Found(NamedTuple):
    content: str
    reasoning: str
    calls: list[tuple[str, Any]]
    leftover: str
    ids: list[str | None]


def read(parser: Parser, *pieces: str) -> Found:
    events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    texts: dict[type, str] = dict.fromkeys((Content, Reasoning, Leftover), "")
    begins: list[CallBegins] = []
    arguments: list[str] = []
    for event in events:
        if isinstance(event, CallBegins):
            assert event.call == len(begins)
            begins.append(event)
            arguments.append("")
        elif isinstance(event, Arguments):
            arguments[event.call] += event.text
        else:
            texts[type(event)] += event.text
    calls = [(begin.name, _value(text)) for begin, text in zip(begins, arguments, strict=True)]
    return Found(texts[Content], texts[Reasoning], calls, texts[Leftover], [begin.id for begin in begins])


def _value(text: str) -> Any:
    """Of arguments as JSON; those that broke off stay text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


# --- any text ---------------------------------------------------------------------------------------

# What formats are made of, so that random text comes near to calls, and often is one.
_MARKUP = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<function=search>",
    "<function=",
    "</function>",
    "<parameter=text>",
    "</parameter>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "[THINK]",
    "[/THINK]",
    "<|python_tag|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|channel|>analysis",
    "<|channel|>final",
    "<|channel|>",
    "<|message|>",
    "<|start|>assistant",
    "<|end|>",
    "<|call|>",
    "<|constrain|>json",
    " to=functions.search",
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>functions.search:0",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
    "function",
    "search\n```json\n",
    "```",
    "<｜DSML｜tool_calls>",
    "</｜DSML｜tool_calls>",
    '<｜DSML｜invoke name="search">',
    "</｜DSML｜invoke>",
    '<｜DSML｜parameter name="text" string="true">',
    "</｜DSML｜parameter>",
    "<minimax:tool_call>",
    "</minimax:tool_call>",
    '<invoke name="search">',
    "</invoke>",
    '<parameter name="text">',
    "<|tool_call>call:search{",
    "}<tool_call|>",
    '<|"|>',
    "<|channel>thought\n",
    "<channel|>",
    "<start_function_call>",
    "<end_function_call>",
    "<escape>",
    "<|open|>think<|sep|>",
    "<|close|>think<|sep|>",
    "<|open|>response<|sep|>",
    "<|close|>response<|sep|>",
    "<|open|>tools<|sep|>",
    "<|close|>tools<|sep|>",
    '<|open|>call tool="search"<|sep|>',
    "<|close|>call<|sep|>",
    '<|open|>argument key="text" type="string"<|sep|>',
    "<|close|>argument<|sep|>",
    "search",
    "[search(text=",
    '{"name": "search", "arguments": {',
    '"parameters": {}}',
    '{"text": "x"}',
    "{}",
    "true",
    "1e5",
    "None",
]
_CHARS = [*"<>{}[]()\"'\\,:;=/|", " ", "\n", "\n\n", "  "]
near_calls = st.lists(st.sampled_from([*_MARKUP, *_CHARS, "word", "é", "｜", "\ud83d"]), max_size=40).map(
    "".join
)
prompts = st.sampled_from(["", "<think>\n", "<think>\n\n</think>\n\n", "[THINK]", "<|open|>think<|sep|>"])


@every_parser
@given(text=near_calls, prompt=prompts, streams=st.booleans(), data=st.data())
@settings(max_examples=25)
def test_a_split_changes_nothing(
    make: type[Parser], text: str, prompt: str, streams: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read(make(TOOLS, prompt, streams_calls=streams), text)
    assert read(make(TOOLS, prompt, streams_calls=streams), *pieces) == whole
    assert read(make(TOOLS, prompt, streams_calls=streams), *text) == whole


@every_parser
@given(
    markup=st.lists(st.sampled_from([*_MARKUP, *_CHARS]), min_size=1, max_size=12),
    prompt=prompts,
    streams=st.booleans(),
)
@settings(max_examples=25)
def test_no_word_is_lost(make: type[Parser], markup: list[str], prompt: str, streams: bool) -> None:
    """Between all markup there are words, each of its own: every one is in something that was told."""
    words = [f"w{place}w" for place in range(len(markup) + 1)]
    text = words[0] + "".join(mark + word for mark, word in zip(markup, words[1:], strict=True))
    found = read(make(TOOLS, prompt, streams_calls=streams), text)
    told = " ".join((found.content, found.reasoning, found.leftover, json.dumps(found.calls), str(found.ids)))
    # A message's header names who writes to whom: what else is in it is nothing.
    headers = re.findall(r"<\|(?:start|channel)\|>.*?<\|message\|>", text) if make is Harmony else ()
    assert [word for word in words if word not in told and word not in "".join(headers)] == []


@every_parser
@given(text=st.text(st.sampled_from("ab é日.,\n\n'\"-#*`")))
@settings(max_examples=25)
def test_plain_text_is_content(make: type[Parser], text: str) -> None:
    assert read(make(TOOLS), text) == Found(text, "", [], "", [])
    assert read(make(), text) == Found(text, "", [], "", [])


# --- what templates write ---------------------------------------------------------------------------

Call = tuple[str, Mapping[str, Any]]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _plain(value: Any) -> str:
    """As templates write a value without quotes: strings as they are, all else as JSON."""
    return value if isinstance(value, str) else _json(value)


def _hermes(calls: Sequence[Call]) -> str:
    bodies = [_json({"name": name, "arguments": arguments}) for name, arguments in calls]
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def _qwen_coder(calls: Sequence[Call]) -> str:
    def call(name: str, arguments: Mapping[str, Any]) -> str:
        lines = [f"<parameter={key}>\n{_plain(value)}\n</parameter>\n" for key, value in arguments.items()]
        return f"<tool_call>\n<function={name}>\n{''.join(lines)}</function>\n</tool_call>"

    return "\n".join(call(*each) for each in calls)


def _glm(calls: Sequence[Call], gap: str = "") -> str:
    def call(name: str, arguments: Mapping[str, Any]) -> str:
        parts = [
            f"<arg_key>{key}</arg_key>{gap}<arg_value>{_plain(value)}</arg_value>{gap}"
            for key, value in arguments.items()
        ]
        return f"<tool_call>{name}{gap}{''.join(parts)}</tool_call>"

    return gap.join(call(*each) for each in calls)


def _llama(calls: Sequence[Call]) -> str:
    return "; ".join(_json({"name": name, "parameters": arguments}) for name, arguments in calls)


def _pythonic(calls: Sequence[Call]) -> str:
    def call(name: str, arguments: Mapping[str, Any]) -> str:
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"

    return f"[{', '.join(call(*each) for each in calls)}]"


def _mistral_list(calls: Sequence[Call]) -> str:
    return "[TOOL_CALLS] " + _json([{"name": name, "arguments": arguments} for name, arguments in calls])


def _mistral(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{_json(arguments)}" for name, arguments in calls)


def _deepseek_v3(calls: Sequence[Call]) -> str:
    bodies = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{_json(arguments)}\n```<｜tool▁call▁end｜>"
        for name, arguments in calls
    ]
    return "<｜tool▁calls▁begin｜>" + "\n".join(bodies) + "<｜tool▁calls▁end｜>"


def _deepseek_v31(calls: Sequence[Call]) -> str:
    bodies = [
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{_json(arguments)}<｜tool▁call▁end｜>"
        for name, arguments in calls
    ]
    return "<｜tool▁calls▁begin｜>" + "".join(bodies) + "<｜tool▁calls▁end｜>"


def _dsml(calls: Sequence[Call], section: str = "tool_calls", gap: str = "") -> str:
    def call(name: str, arguments: Mapping[str, Any]) -> str:
        lines = [
            f'<｜DSML｜{gap}parameter name="{key}" string="{_json(isinstance(value, str))}">'
            f"{_plain(value)}</｜DSML｜{gap}parameter>\n"
            for key, value in arguments.items()
        ]
        return f'<｜DSML｜{gap}invoke name="{name}">\n{"".join(lines)}</｜DSML｜{gap}invoke>\n'

    bodies = "".join(call(*each) for each in calls)
    return f"<｜DSML｜{gap}{section}>\n{bodies}</｜DSML｜{gap}{section}>"


def _minimax(calls: Sequence[Call]) -> str:
    def call(name: str, arguments: Mapping[str, Any]) -> str:
        lines = [f'<parameter name="{key}">{_plain(value)}</parameter>\n' for key, value in arguments.items()]
        return f'<invoke name="{name}">\n{"".join(lines)}</invoke>\n'

    return f"<minimax:tool_call>\n{''.join(call(*each) for each in calls)}</minimax:tool_call>"


def _harmony(calls: Sequence[Call]) -> str:
    messages = [
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{_json(arguments)}<|call|>"
        for name, arguments in calls
    ]
    return "<|start|>assistant".join(messages)


def _kimi(calls: Sequence[Call]) -> str:
    bodies = [
        f"<|tool_call_begin|>functions.{name}:{place}<|tool_call_argument_begin|>{_json(arguments)}<|tool_call_end|>"
        for place, (name, arguments) in enumerate(calls)
    ]
    return f"<|tool_calls_section_begin|>{''.join(bodies)}<|tool_calls_section_end|>"


def _kimi_k3(calls: Sequence[Call]) -> str:
    types = {str: "string", bool: "boolean", type(None): "null", list: "array", dict: "object"}

    def call(name: str, arguments: Mapping[str, Any]) -> str:
        parts = [
            f'<|open|>argument key="{escape(key)}" type="{types.get(type(value), "number")}"<|sep|>'
            f"{_plain(value)}<|close|>argument<|sep|>"
            for key, value in arguments.items()
        ]
        return f'<|open|>call tool="{name}" index="1"<|sep|>{"".join(parts)}<|close|>call<|sep|>'

    bodies = "".join(call(*each) for each in calls)
    return f"<|open|>response<|sep|><|close|>response<|sep|><|open|>tools<|sep|>{bodies}<|close|>tools<|sep|>"


def _gemma(
    calls: Sequence[Call], begin: str = "<|tool_call>", end: str = "<tool_call|>", quote: str = '<|"|>'
) -> str:
    def notation(value: Any) -> str:
        if isinstance(value, str):
            return quote + value + quote
        if isinstance(value, list):
            return f"[{','.join(map(notation, value))}]"
        if isinstance(value, dict):
            return "{" + ",".join(f"{key}:{notation(item)}" for key, item in value.items()) + "}"
        return _json(value)

    return "".join(f"{begin}call:{name}{notation(dict(arguments))}{end}" for name, arguments in calls)


RENDERERS: dict[str, list[Callable[[Sequence[Call]], str]]] = {
    "hermes": [_hermes],
    "qwen3_coder": [_qwen_coder],
    "glm45": [lambda calls: _glm(calls, "\n")],
    "glm47": [_glm],
    "llama3_json": [_llama],
    "pythonic": [_pythonic],
    "mistral": [_mistral_list, _mistral],
    "deepseek_v3": [_deepseek_v3],
    "deepseek_v31": [_deepseek_v31],
    "deepseek_v32": [lambda calls: _dsml(calls, "function_calls")],
    "deepseek_v4": [_dsml],
    "deepseek_v41": [lambda calls: _dsml(calls, "calls", " ")],
    "minimax_m2": [_minimax],
    "openai": [_harmony],
    "kimi_k2": [_kimi],
    "kimi_k3": [_kimi_k3],
    "gemma4": [_gemma],
    "functiongemma": [
        lambda calls: _gemma(calls, "<start_function_call>", "<end_function_call>", "<escape>")
    ],
}
_strings = st.text(st.sampled_from("ab {}[]<>()\"'\\/,:=;\n\té日🌸`")).filter(lambda text: text != "null")
_numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
_keys = st.text("abc_", min_size=1, max_size=4)
_values = st.recursive(
    st.none() | st.booleans() | _numbers | _strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3),
    max_leaves=6,
)
_arguments = st.fixed_dictionaries(
    {},
    optional={
        "text": _strings,
        "count": st.integers(),
        "ratio": _numbers,
        "exact": st.booleans(),
        "nothing": st.none(),
        "words": st.lists(_strings, max_size=3),
        "filters": st.dictionaries(_keys, _values, max_size=3),
        "note": st.none() | st.sampled_from(["x", "a\nb"]),
    },
)
_calls = st.lists(
    st.tuples(st.just("search"), _arguments) | st.just(("get_time", {})), min_size=1, max_size=3
)


@pytest.mark.parametrize("name", RENDERERS)
@given(calls=_calls)
@settings(max_examples=15)
def test_calls_are_read_back(name: str, calls: list[Call]) -> None:
    make = parser_for("", name)
    assert make is not None
    for render in RENDERERS[name]:
        text = render(calls)
        found = read(make(TOOLS), text)
        assert found == Found("", "", list(calls), "", found.ids)
        assert read(make(TOOLS, streams_calls=True), *text) == found
        # Whoever offers no tools gets text.
        assert read(make(), text).calls == []


@pytest.mark.parametrize("name", RENDERERS)
def test_arguments_are_streamed(name: str) -> None:
    make = parser_for("", name)
    assert make is not None
    text = RENDERERS[name][-1]([("search", {"count": 1, "text": "@" * 20})])
    before, after = text.split("@" * 20)
    parser = make(TOOLS, streams_calls=True)
    parser.push(before)
    told = [event for _ in range(20) for event in parser.push("@")]
    if name in ("pythonic", "gemma4", "functiongemma"):  # no JSON, and no text: read at the end
        assert told == []
    else:
        assert told == [Arguments(0, "@")] * 20
    # An answer that breaks off here has no call if calls aren't streamed.
    assert read(make(TOOLS), before).calls == []
    assert read(make(TOOLS), before, after).calls == [("search", {"count": 1, "text": ""})]


@pytest.mark.parametrize("name", RENDERERS)
def test_time_is_linear_in_the_text(name: str) -> None:
    make = parser_for("", name)
    assert make is not None
    within_a_call = RENDERERS[name][0]([("search", {"text": "@"})]).split("@")[0]

    def seconds(length: int, opening: str, piece: str) -> float:
        parser = make(TOOLS, streams_calls=True)
        parser.push(opening)
        begin = time.process_time()
        for _ in range(length):
            parser.push(piece)
        parser.finish()
        return time.process_time() - begin

    for opening, piece in (
        ("", "word "),
        ("", "\n"),
        (within_a_call, "word\n <"),
        (within_a_call, '", {"a": ['),
    ):
        long = min(seconds(6400, opening, piece) for _ in range(2))
        # 64 times the text; quadratic time would be 4096 times as much.
        assert long < 256 * min(seconds(100, opening, piece) for _ in range(3))


# --- single answers ---------------------------------------------------------------------------------


def parse(name: str, text: str, prompt: str = "") -> Found:
    make = parser_for("", name)
    assert make is not None
    return read(make(TOOLS, prompt), text)


def test_reasoning_may_begin_in_the_prompt() -> None:
    whole = parse("hermes", "<think>\nHm.\n\nYes.\n</think>\n\nHello.\n")
    assert whole == Found("Hello.\n", "Hm.\n\nYes.", [], "", [])
    assert parse("hermes", "Hm.\n\nYes.\n</think>\n\nHello.\n", "<|im_start|>assistant\n<think>\n") == whole
    assert parse("hermes", "Hello.", "<think>\n\n</think>\n\n") == Found("Hello.", "", [], "", [])
    assert parse("deepseek_r1", "Hm.</think>Use </think>.", "<think>") == Found(
        "Use </think>.", "Hm.", [], "", []
    )


def test_reasoning_comes_as_it_is_written() -> None:
    parser = parser_for("", "hermes")
    assert parser is not None
    reading = parser(TOOLS, "<think>\n")
    assert reading.push("\nHm") == [Reasoning("Hm")]
    assert reading.push(".\n") == [Reasoning(".")]
    assert reading.push("</thi") == []
    assert reading.push("s\n") == [Reasoning("\n</this")]
    assert reading.push("</think>\n\nHel") == [Content("Hel")]
    assert reading.push("lo <") == [Content("lo")]
    assert reading.push("b>") == [Content(" <b>")]


def test_a_call_that_breaks_off_is_left_over() -> None:
    cut = '<tool_call>\n{"name": "search", "arguments": {"text": "rm -rf /'
    assert parse("hermes", "Yes.\n" + cut) == Found("Yes.", "", [], cut, [])
    assert parse("hermes", cut + '"}}').calls == [("search", {"text": "rm -rf /"})]


def test_what_only_looks_like_a_call_is_content() -> None:
    for text in (
        "Write <tool_call> before it.",
        "<tool_call>not JSON</tool_call>",
        '<tool_call>{"name": 3}</tool_call> and <tool_call>{"a": nan}</tool_call>',
        '<tool_call>{"name": "search", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "search", "arguments": {"ratio": 1e999}}</tool_call>',
        "<tool_call>" + "[" * 5000 + "]" * 5000 + "</tool_call>",
    ):
        assert parse("hermes", text) == Found(text, "", [], "", [])
    assert (
        parse("qwen3_coder", "Use <function=other> or <tool_call>.").content
        == "Use <function=other> or <tool_call>."
    )
    assert (
        parse("llama3_json", '{"name": "other", "parameters": {}}').content
        == '{"name": "other", "parameters": {}}'
    )
    assert parse("pythonic", "[1, 2] and [search(a, b)]").content == "[1, 2] and [search(a, b)]"


def test_text_around_calls_is_content() -> None:
    call = '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>'
    assert parse("hermes", f"One.\n{call}\n{call}\n").content == "One."
    assert parse("hermes", f"One. {call} two").content == "One. two"
    assert parse("mistral", "One. [TOOL_CALLS]get_time[ARGS]{}").content == "One. "


def test_arguments_may_be_a_string_of_json() -> None:
    text = '<tool_call>{"name": "search", "arguments": "{\\"count\\": 1}"}</tool_call>'
    assert parse("hermes", text).calls == [("search", {"count": 1})]


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "deepseek_v3", "kimi_k2", "mistral"])
def test_line_breaks_within_strings_are_no_less_json_in_a_stream(name: str) -> None:
    make = parser_for("", name)
    assert make is not None
    text = RENDERERS[name][-1]([("search", {"text": "@"})])
    parser = make(TOOLS, streams_calls=True)
    events = [event for char in text.replace("@", "a\n\tb") for event in parser.push(char)]
    told = "".join([event.text for event in events if isinstance(event, Arguments)])
    assert json.loads(told) == {"text": "a\n\tb"}


def test_ids_of_the_model() -> None:
    assert parse("kimi_k2", _kimi([("get_time", {}), ("search", {})])).ids == [
        "functions.get_time:0",
        "functions.search:1",
    ]
    assert parse("mistral", "[TOOL_CALLS]get_time[CALL_ID]abc123def[ARGS]{}").ids == ["abc123def"]
    assert parse("mistral", '[TOOL_CALLS][{"name": "get_time", "arguments": {}, "id": "abc123def"}]').ids == [
        "abc123def"
    ]


def test_types_of_plain_values() -> None:
    def values(**texts: str) -> Any:
        return parse("qwen3_coder", _qwen_coder([("search", texts)])).calls[0][1]

    assert values(text="5", count="5", ratio="5", exact="True", nothing="None", note="null") == {
        "text": "5", "count": 5, "ratio": 5, "exact": True, "nothing": None, "note": None
    }  # fmt: skip
    # Python's literals, what fits no type, and what no schema tells.
    assert values(words="['a']", filters="{'a': (1, None)}") == {"words": ["a"], "filters": {"a": [1, None]}}
    assert values(count="many", words="3", exact="1") == {"count": "many", "words": "3", "exact": "1"}
    assert values(other="0042", more="7", some="{'a': 1}") == {"other": "0042", "more": 7, "some": "{'a': 1}"}


def test_a_call_ends_reasoning_without_an_end() -> None:
    text = "I look.\n" + _qwen_coder([("search", {"text": "x"})])
    assert parse("qwen3_coder", text, "<think>\n") == Found(
        "", "I look.", [("search", {"text": "x"})], "", [None]
    )
    # Reasoning about calls goes on.
    about = "I write <tool_call> first.</think>Yes."
    assert parse("qwen3_coder", about, "<think>\n") == Found("Yes.", "I write <tool_call> first.", [], "", [])


def test_gpt_oss_may_leave_out_the_namespace() -> None:
    text = (
        "<|channel|>commentary to=search<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    )
    assert parse("openai", text) == Found("Yes.", "", [("search", {})], "", [None])
    # It was trained with tools of its own, and calls them unasked.
    own = "<|channel|>analysis to=browser.open<|message|>{}<|call|>"
    assert parse("openai", own) == Found("", "", [], "{}", [])


def test_kimi_k3_may_write_all_arguments_as_json() -> None:
    block = '<|open|>json type="object"<|sep|>{"count": 1}<|close|>json<|sep|>'
    call = f'<|open|>tools<|sep|><|open|>call tool="search" index="1"<|sep|>{block}<|close|>call<|sep|>'
    assert parse("kimi_k3", call).calls == [("search", {"count": 1})]
    assert parse("kimi_k3", call.replace(": 1", ": ")).calls == []


# --- which parser -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ('"<tool_call>\\n{\\"name\\": " + tool_call.name', "hermes"),
        ("'<tool_call>\\n<function=' + tool_call.name + '>\\n'", "qwen3_coder"),
        ("'<tool_call>' + tc.name }}<arg_key>{{ k }}</arg_key>", "glm45"),
        ("'[TOOL_CALLS] [' ... </think>", "mistral"),
        ("<|tool_calls_section_begin|> ... </think>", "kimi_k2"),
        ("<｜tool▁calls▁begin｜> ... </think>", "deepseek_v3"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "openai"),
        ("<|tool_call>call:", "gemma4"),
        ("<minimax:tool_call> ... <tool_call>", "minimax_m2"),
        ("<|python_tag|>", "llama3_json"),
        ('Respond in the format {"name": function name, "parameters": dictionary of', "llama3_json"),
        ("<|python_start|>", "llama4_pythonic"),
        ("message.content.split('</think>')", "deepseek_r1"),
    ],
)
def test_the_template_tells_the_format(template: str, name: str) -> None:
    assert parser_for(template) is parser_for("", name)


def test_a_name_counts_before_the_template() -> None:
    assert parser_for("<tool_call>", "mistral") is parser_for("[TOOL_CALLS]")
    assert parser_for("{{ messages[0].content }}") is None
    with pytest.raises(ValueError, match="no tool parser 'other'; there are deepseek_r1, .*qwen3_coder"):
        parser_for("", "other")
