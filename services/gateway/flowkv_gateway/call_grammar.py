"""Grammars of answers with tool calls: in the model's own form where that has JSON, else in Hermes'."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from flowkv_common.errors import BadRequest
from flowkv_common.wire.messages import Grammar
from flowkv_gateway.calls import Tool, in_json
from flowkv_gateway.grammar import Wanted, json_rule, json_schema
from flowkv_gateway.grammar_text import ANY, in_grammar, up_to, without
from flowkv_gateway.parsers import Parser
from flowkv_gateway.parsers.deepseek import DeepSeek
from flowkv_gateway.parsers.hermes import Hermes
from flowkv_gateway.parsers.kimi import Kimi
from flowkv_gateway.parsers.llama import Llama
from flowkv_gateway.parsers.mistral import Mistral
from flowkv_gateway.tokenizer import Vocabulary


class Form(NamedTuple):
    """What a model writes around a call's name and arguments, and around and between its calls.

    `parser` reads it: calls begin with one of the `triggers` or, with `begins_text`, also with a bracket at
    the beginning of the answer. With `is_numbered` a call's name has a number behind it.
    """

    parser: type[Parser]
    begin: str
    middle: str
    end: str
    opening: str = ""
    between: str = ""
    closing: str = ""
    triggers: tuple[str, ...] = ()
    begins_text: bool = False
    is_numbered: bool = False


_HERMES = Form(
    Hermes,
    '<tool_call>\n{"name": "',
    '", "arguments": ',
    "}\n</tool_call>",
    between="\n",
    triggers=("<tool_call>",),
)
_LLAMA = Form(
    Llama,
    '{"name": "',
    '", "parameters": ',
    "}",
    between="; ",
    triggers=("<|python_tag|>", "<|python_start|>"),
    begins_text=True,
)
_MISTRAL = Form(Mistral, "[TOOL_CALLS]", "[ARGS]", "", triggers=("[TOOL_CALLS]",))
_OLDER_MISTRAL = Form(
    Mistral,
    '{"name": "',
    '", "arguments": ',
    "}",
    opening="[TOOL_CALLS] [",
    between=", ",
    closing="]",
    triggers=("[TOOL_CALLS]",),
)
_DEEPSEEK = Form(
    DeepSeek,
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    opening="<｜tool▁calls▁begin｜>",
    closing="<｜tool▁calls▁end｜>",
    triggers=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
)
_OLDER_DEEPSEEK = _DEEPSEEK._replace(
    begin="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    middle="\n```json\n",
    end="\n```<｜tool▁call▁end｜>",
    between="\n",
)
_KIMI = Form(
    Kimi,
    "<|tool_call_begin|>functions.",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    opening="<|tool_calls_section_begin|>",
    closing="<|tool_calls_section_end|>",
    triggers=("<|tool_calls_section_begin|>", "<|tool_call_begin|>"),
    is_numbered=True,
)


def form_of(parser: type[Parser] | None, template: str) -> Form:
    """Of the calls in a model's grammars."""
    if parser is Llama:
        return _LLAMA
    if parser is Mistral:
        return _MISTRAL if "[ARGS]" in template else _OLDER_MISTRAL
    if parser is DeepSeek:
        return _OLDER_DEEPSEEK if "```json" in template else _DEEPSEEK
    return _KIMI if parser is Kimi else _HERMES


def answer_grammar(
    content: Wanted | None,
    tools: Sequence[Tool],
    forced: Collection[str],
    form: Form,
    vocabulary: Vocabulary,
    *,
    max_calls: int | None,
    reasoning: str,
) -> Grammar | None:
    """Of an answer that has calls of the `forced` functions alone, or else may have some before its content.

    `content` is what the content must be; None: any text. `reasoning` is a rule for what stands before all of
    it, or empty. None if nothing has to be kept to. Raises BadRequest for a `content` that can't be combined.
    """
    is_strict = any(tool["function"].get("strict") for tool in tools)
    if not forced and content is None and not is_strict:
        return None
    if not forced and not tools and not reasoning:
        return content and content.grammar
    rules = [r"SPACE: /\n{0,2}/"]
    calls = [
        _call(tool["function"], form, vocabulary, is_enforced=bool(forced or tool["function"].get("strict")))
        for tool in tools
        if not forced or tool["function"]["name"] in forced
    ]
    if calls:
        rules.append(f"call: {' | '.join(calls)}")
    answer = _several(form, max_calls, vocabulary)
    if not forced and content is None:
        answer = _among_text(form, max_calls, vocabulary, rules)
    elif not forced and content is not None:
        answer = f"{answer} | content" if calls else "content"
        rules.append(_content_rule(content))
    if reasoning:
        rules.append(reasoning)
        answer = f"reasoning SPACE ({answer})"
    return Grammar(kind="lark", text="\n".join([f"start: {answer}", *rules]))


def _several(form: Form, max_calls: int | None, vocabulary: Vocabulary, after: str = "") -> str:
    """One call or several, up to `max_calls`, after a trigger with which they may begin."""
    first = in_grammar((form.opening + form.begin).removeprefix(after), vocabulary)
    between, closing = in_grammar(form.between + form.begin, vocabulary), in_grammar(form.closing, vocabulary)
    more = "" if max_calls == 1 else f"({between} call)*"
    return f"{first} call {more} {closing}"


def _among_text(form: Form, max_calls: int | None, vocabulary: Vocabulary, rules: list[str]) -> str:
    """Text with calls in it, and none that could be read as another call. Adds the `rules` that it needs."""
    text = without(form.triggers, vocabulary, r"/([^\s\[{](.|\n)*)?/" if form.begins_text else ANY)
    rules.append(f"TEXT: {text}")
    options = []
    for place, trigger in enumerate(form.triggers):
        rules.append(up_to(f"text_{place}", trigger, vocabulary, text="TEXT"))
        if form.opening and form.begin.startswith(trigger):  # a call without what stands around several
            calls = f"{in_grammar(form.begin.removeprefix(trigger), vocabulary)} call"
        else:
            calls = _several(form, max_calls, vocabulary, after=trigger)
        options.append(f"text_{place} {calls}")
    if not form.begins_text:
        return f"({' | '.join(options)})* TEXT"
    rules.append(r"LEAD: /\s*/")
    return f"LEAD ({' | '.join([_several(form, max_calls, vocabulary), *options])} | TEXT)"


def harmony_rule(vocabulary: Vocabulary) -> str:
    """The rule `reasoning` of GPT-OSS: messages of their own, and the header of the one with the answer."""

    def marked(text: str) -> str:
        return in_grammar(text, vocabulary)

    message = f"{marked('<|channel|>analysis<|message|>')} thought {marked('<|start|>assistant')}"
    header = f"{marked('<|channel|>final')} ({marked(' <|constrain|>json')})? {marked('<|message|>')}"
    thought = up_to("thought", "<|end|>", vocabulary)
    return f"reasoning: ({message})* {header}\n{thought}"


def kimi_k3_rule(prompt: str, vocabulary: Vocabulary) -> str:
    """The rule `reasoning` of Kimi K3: an element of its own, and the beginning of that of the answer."""
    think, response = "<|open|>think<|sep|>", "<|open|>response<|sep|>"
    if prompt.endswith(response):
        return ""
    thought = f"thought {in_grammar('think<|sep|>', vocabulary)}"
    if not prompt.endswith(think):
        thought = f"({in_grammar(think, vocabulary)} {thought})?"
    closed = up_to("thought", "<|close|>", vocabulary)
    return f"reasoning: {thought} {in_grammar(response, vocabulary)}\n{closed}"


def _call(function: Mapping[str, Any], form: Form, vocabulary: Vocabulary, *, is_enforced: bool) -> str:
    """What follows the beginning of a call of this function."""
    schema = {**(function.get("parameters") or {}), "type": "object"} if is_enforced else {"type": "object"}
    name = in_json(function["name"])
    in_call = name[1:-1] if form.begin.endswith('"') else function["name"]
    middle, end = (in_grammar(text, vocabulary) for text in (form.middle, form.end))
    number = "/:[0-9]{1,3}/" if form.is_numbered else ""
    return f"{in_json(in_call)} {number} {middle} {json_rule(json_schema(schema, 'tools'))} {end}"


def _content_rule(content: Wanted) -> str:
    match content.grammar:
        case Grammar(kind="json_schema") as grammar:
            return f"content: {json_rule(grammar)}"
        case Grammar(kind="regex", text=text):
            return "content: /" + re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", text) + "/"
        case Grammar(kind="lark", text=text):  # as the gateway writes them
            return "content: " + text.removeprefix("start: ")
    raise BadRequest("A grammar can't be kept to beside tools or reasoning.", field=content.field)
