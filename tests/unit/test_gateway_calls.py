"""Answers whose calls are forced, or kept to their schemas, by a grammar."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer

from flowkv_common.errors import BadRequest
from flowkv_common.grammar import Grammars
from flowkv_common.wire.messages import Grammar
from flowkv_gateway.calls import forced_names, offered_tools
from flowkv_gateway.chat import ChatFormat
from flowkv_gateway.parsers import CallBegins, Content, Reasoning
from flowkv_gateway.schemas import ChatRequest, parse_request
from flowkv_gateway.tokenizer import Tokenizer
from tests.gateway_support import write_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **fields}}


def call(name: str, arguments: str = '{"a": 1}') -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


TOOLS = [tool("f"), tool("g")]
F, G, WRONG, OTHER = call("f"), call("g"), call("f", '{"a": "x"}'), call("h")
NAMED_G = {"type": "function", "function": {"name": "g"}}
JSON_ANSWER = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


def chat(**fields: Any) -> ChatRequest:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return parse_request(json.dumps(body).encode(), ChatRequest)


class Constrained:
    """What a model with this template may answer."""

    def __init__(
        self, folder: Path, template: str, added: Collection[str] = (), *, is_special: bool = False
    ) -> None:
        """`added`: texts that are tokens."""
        (write_tokenizer(folder) / "chat_template.jinja").write_text(template, encoding="utf-8")
        raw = RawTokenizer.from_file(str(folder / "tokenizer.json"))
        raw.add_tokens([AddedToken(text, special=is_special) for text in sorted(added)])
        raw.save(str(folder / "tokenizer.json"))
        self.tokenizer = Tokenizer.load(folder)
        self.format = ChatFormat(self.tokenizer)
        self.grammars = Grammars(folder / "tokenizer.json", [0])

    def grammar(self, request: ChatRequest, prompt: str = "") -> Grammar | None:
        wanted = self.format.answer_format(request, prompt).wanted
        return wanted.grammar if wanted else None

    def allows(self, text: str, request: ChatRequest, prompt: str = "", *, spelled: str = "") -> bool:
        """`spelled` comes first, in tokens that are no marks, whatever their text is together."""
        grammar = self.grammar(request, prompt)
        assert grammar is not None
        matcher = self.grammars.matcher(grammar)
        for token_id in chain.from_iterable(self.tokenizer._encode([*spelled, text], False)):
            if not matcher.compute_bitmask()[token_id // 8] >> token_id % 8 & 1:
                return False
            matcher.consume_token(token_id)
        return matcher.is_accepting()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Constrained:
    return Constrained(tmp_path_factory.mktemp("plain"), "{{ messages }}")


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Constrained:
    return Constrained(
        tmp_path_factory.mktemp("thinking"), "{{ messages }}{{ tools }}<tool_call><think></think>"
    )


# One call, and what stands between calls and around them.
FORMS = {
    "{{ tools }}<|python_": ('{"name": "f", "parameters": {"a": 1}}', "; ", "", ""),
    "{{ tools }}[TOOL_CALLS]": ('{"name": "f", "arguments": {"a": 1}}', ", ", "[TOOL_CALLS] [", "]"),
    "{{ tools }}[TOOL_CALLS][ARGS]": ('[TOOL_CALLS]f[ARGS]{"a": 1}', "", "", ""),
    "{{ tools }}<｜tool▁calls▁begin｜>": (
        '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>',
        "",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
    ),
    "{{ tools }}<｜tool▁calls▁begin｜>```json": (
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>',
        "\n",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
    ),
    "{{ tools }}<|tool_calls_section_begin|>": (
        '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>',
        "",
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
    ),
    "{{ tools }}<tool_call>": (F, "\n", "", ""),
    "{{ tools }}<function=": (F, "\n", "", ""),
    "{{ messages }}": (F, "\n", "", ""),
}


# What marks of calls are in a tokenizer. Of Qwen and DeepSeek they are tokens that are not special.
MARKS = ["text", "tokens", "special tokens"]


def with_marks(folder: Path, template: str, text: str, marks: str) -> Constrained:
    """A model for which those in `text` are such."""
    found = set(re.findall(r"<[^ >]+>|\[[A-Z_]+\]", text))
    return Constrained(
        folder, template, found if marks != "text" else (), is_special=marks == "special tokens"
    )


@pytest.mark.parametrize("template", FORMS)
@pytest.mark.parametrize("marks", MARKS)
def test_forced_calls_have_the_models_own_form(tmp_path: Path, template: str, marks: str) -> None:
    one, between, opening, closing = FORMS[template]
    text = f"{opening}{one}{between}{one}{closing}"
    model = with_marks(tmp_path, template, text, marks)
    request = chat(tools=TOOLS, tool_choice="required")
    assert model.allows(text, request)
    assert model.allows(f"{opening}{one}{closing}", request)
    assert not model.allows(text.replace("1", '"x"'), request)
    make = model.format.answer_format(request, "").make_reader
    assert make is not None
    events = make().push(text, is_last=True)
    assert [event.name for event in events if isinstance(event, CallBegins)] == ["f", "f"]
    assert not any(isinstance(event, Content) for event in events)


OWN_FORMS = [template for template in FORMS if "<function=" not in template]


@pytest.mark.parametrize("template", OWN_FORMS)
@pytest.mark.parametrize("marks", MARKS)
def test_strict_tools_keep_to_their_schemas_in_the_models_own_form(
    tmp_path: Path, template: str, marks: str
) -> None:
    one, between, opening, closing = FORMS[template]
    tag = "<|python_tag|>" if "<|python_" in template else ""
    model = with_marks(tmp_path, template, opening + one + closing + tag, marks)
    request = chat(tools=[tool("f", strict=True), tool("g")])
    text = f"{opening}{one}{between}{one}{closing}"
    wrong = text.replace("1", '"x"')
    for allowed in ("", "Well.", "Well, [1] {}.\n", text, f"Well. {tag}{text}"):
        assert model.allows(allowed, request), allowed
    for other in (wrong, f"Well. {tag}{wrong}", f"{text} Well. {tag}{wrong}"):
        assert not model.allows(other, request), other
    if tag:  # all that begins like a call is one
        for other in (f"\n{wrong}", '{"a": 1}', "[f(a=1)]"):
            assert not model.allows(other, request), other
    make = model.format.answer_format(request, "").make_reader
    assert make is not None
    events = make().push(text, is_last=True)
    assert [event.name for event in events if isinstance(event, CallBegins)] == ["f", "f"]


@pytest.mark.parametrize("is_special", [False, True])
def test_reasoning_may_end_with_a_token_of_its_own(tmp_path: Path, is_special: bool) -> None:
    model = Constrained(tmp_path, "<think></think>", ("<think>", "</think>"), is_special=is_special)
    request = chat(response_format=JSON_ANSWER)
    assert model.allows('hm</think>{"a": 1}', request, "<think>")
    assert model.allows('<think>hm</think>{"a": 1}', request)
    assert not model.allows('hm</think>{"a": "x"}', request, "<think>")


@pytest.mark.parametrize("is_special", [False, True])
def test_a_mark_is_not_spelled_out_where_it_is_a_token(tmp_path: Path, is_special: bool) -> None:
    """The parser reads text, so it would take it for the mark."""
    template = "{{ tools }}<tool_call><think></think>"
    marks = {"<tool_call>", "</tool_call>", "<think>", "</think>"}
    model = Constrained(tmp_path, template, marks, is_special=is_special)
    strict = chat(tools=[tool("f", strict=True)])
    for spelled in ("hm", "a </ b", "<tool"):
        assert model.allows("</think>Well.", strict, "<think>", spelled=spelled)
        assert model.allows(f"{spelled}{F} <tool", strict)
    assert not model.allows("</think>Well.", strict, "<think>", spelled="hm</think>")
    assert not model.allows("", strict, spelled=WRONG)
    assert not model.allows("", strict, spelled=f"Well. {F}")


FINAL = "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"


@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize(
    ("template", "prompt", "thought", "begin"),
    [
        ("<|channel|>", "<|start|>assistant", ANALYSIS, FINAL),
        ("<|channel|>", "<|start|>assistant", ANALYSIS, "<|channel|>final <|constrain|>json<|message|>"),
        ("<|tool_call><|channel><channel|>", "<|turn>model\n", "<|channel>thought\nhm<channel|>", ""),
        ("<|tool_call><|channel><channel|>", "<|turn>model\n<|channel>thought\n", "hm<channel|>", ""),
        ("<|open|>think", "", "<|open|>think<|sep|>hm<|close|>think<|sep|>", "<|open|>response<|sep|>"),
        ("<|open|>think", "<|open|>think<|sep|>", "hm<|close|>think<|sep|>", "<|open|>response<|sep|>"),
    ],
)
def test_reasoning_of_other_forms(
    tmp_path: Path, template: str, prompt: str, thought: str, begin: str, marks: str
) -> None:
    model = with_marks(tmp_path, template, f"{thought}{begin}<|channel>", marks)
    request = chat(response_format=JSON_ANSWER)
    make = model.format.answer_format(request, prompt).make_reader
    assert make is not None
    for text in (f'{thought}{begin}{{"a": 1}}', f'{begin}{{"a": 1}}'):
        if text.startswith(thought) or not prompt.endswith(("thought\n", "think<|sep|>")):
            assert model.allows(text, request, prompt)
            events = make().push(text, is_last=True)
            assert "".join([one.text for one in events if isinstance(one, Content)]) == '{"a": 1}'
            told = "".join([one.text for one in events if isinstance(one, Reasoning)])
            assert told == ("hm" if text.startswith(thought) else "")
    assert not model.allows(f'{thought}{begin}{{"a": "x"}}', request, prompt)
    tools = chat(tools=TOOLS, tool_choice="required")
    assert model.allows(F, tools, prompt)


def test_required_is_one_call_or_several_and_no_text(plain: Constrained) -> None:
    required = chat(tools=TOOLS, tool_choice="required")
    for allowed in (F, G, f"{F}\n{G}"):
        assert plain.allows(allowed, required)
    for other in ("", "Well.", WRONG, OTHER, f"Well. {F}", f"{F} Well."):
        assert not plain.allows(other, required)
    alone = chat(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert plain.allows(F, alone)
    assert not plain.allows(f"{F}\n{G}", alone)
    assert plain.grammar(chat(tools=TOOLS)) is None


def test_a_named_function_is_called_once(plain: Constrained) -> None:
    named = chat(tools=TOOLS, tool_choice=NAMED_G)
    assert plain.allows(G, named)
    assert not plain.allows(F, named)
    assert not plain.allows(f"{G}\n{G}", named)


def test_strict_tools_keep_to_their_schemas(plain: Constrained) -> None:
    strict = chat(tools=[tool("f", strict=True), tool("g")])
    for allowed in ("", "Well.", f"Well.\n{F}", f"{F}\n{G}", call("g", '{"any": []}')):
        assert plain.allows(allowed, strict)
    for other in (WRONG, f"Well. {WRONG}", WRONG.replace("\n", ""), OTHER):
        assert not plain.allows(other, strict)


def test_dates_in_arguments_are_some(plain: Constrained) -> None:
    schema = {"properties": {"on": {"type": "string", "format": "date"}}, "required": ["on"]}
    named = chat(tools=[tool("f", parameters=schema)], tool_choice="required")
    assert plain.allows(call("f", '{"on": "2024-02-29"}'), named)
    assert not plain.allows(call("f", '{"on": "2023-02-29"}'), named)


def test_a_format_leaves_room_for_calls(plain: Constrained) -> None:
    asked = chat(tools=TOOLS, response_format=JSON_ANSWER)
    for allowed in ('{"a": 1}', F, f"{F}\n{G}"):
        assert plain.allows(allowed, asked)
    for other in ("Well.", '{"a": "x"}', OTHER):
        assert not plain.allows(other, asked)
    forced = chat(tools=TOOLS, tool_choice="required", response_format=JSON_ANSWER)
    assert not plain.allows('{"a": 1}', forced)


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"tools": TOOLS, "tool_choice": "required"}, F),
        ({"response_format": JSON_ANSWER}, '{"a": 1}'),
        ({"structured_outputs": {"regex": "a/b|\\/c"}}, "a/b"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "no"),
    ],
    ids=["tools", "schema", "regex", "choice"],
)
def test_reasoning_comes_before_what_is_constrained(
    thinking: Constrained, fields: dict[str, Any], answer: str
) -> None:
    request = chat(**fields)
    assert thinking.allows(f"hm\nhm</think>\n\n{answer}", request, "<think>\n")
    assert not thinking.allows(answer, request, "<think>\n")
    assert thinking.allows(answer, request)
    assert thinking.allows(f"<think>hm</think>{answer}", request)
    assert thinking.allows(answer, request, "<think>\n\n</think>\n\n")
    assert not thinking.allows(f"hm</think>{answer}", request, "<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    "choice",
    [5, "always", {}, NAMED_G["function"], {"type": "function", "function": {"name": "h"}}, "", True],
    ids=str,
)
def test_choices_that_are_none(choice: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        forced_names(chat(tools=TOOLS, tool_choice=choice))
    assert caught.value.field == "tool_choice"
    with pytest.raises(BadRequest):
        forced_names(chat(tool_choice="required"))


@pytest.mark.parametrize("wrong", [{"name": ""}, {"name": 5}, {"parameters": []}, {"strict": "yes"}], ids=str)
def test_functions_that_are_none(wrong: dict[str, Any]) -> None:
    [field] = wrong
    with pytest.raises(BadRequest) as caught:
        offered_tools(chat(tools=[{"type": "function", "function": {"name": "f", **wrong}}]))
    assert caught.value.field == f"tools[0].function.{field}"


@pytest.mark.parametrize("depth", [400, 950, 990])
def test_deep_schemas_are_refused_or_served(plain: Constrained, depth: int) -> None:
    """JSON that could be read may be too deep to be written where the stack is deeper."""
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    request = chat(tools=TOOLS)
    request.tools = [tool("f", parameters=schema, strict=True)]
    with contextlib.suppress(BadRequest):
        plain.grammar(request)
    with contextlib.suppress(BadRequest):
        plain.format.conversation(request)


def test_a_grammar_of_the_clients_own_can_not_be_combined(plain: Constrained) -> None:
    text = 'root ::= "a"'
    for field, own in (
        ("structured_outputs.grammar", {"structured_outputs": {"grammar": text}}),
        ("guided_grammar", {"guided_grammar": text}),
    ):
        assert plain.grammar(chat(**own)) is not None
        with pytest.raises(BadRequest) as caught:
            plain.grammar(chat(tools=TOOLS, **own))
        assert caught.value.field == field
