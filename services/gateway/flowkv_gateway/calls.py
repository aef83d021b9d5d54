"""Tools and the calls of them: what a request may offer, and how calls are asked for and forced.

A model writes calls as its chat template taught it, and a parser reads them. Where a template knows no tools,
or calls are forced, they have the form of Hermes: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from flowkv_common.errors import BadRequest
from flowkv_common.grammar import JSON_OPTIONS
from flowkv_common.wire.messages import Grammar
from flowkv_gateway.schemas import ChatRequest, TokenizeRequest

Tool = Mapping[str, Any]

_TRIGGER = "<tool_call>"
_BEGIN, _END = f"{_TRIGGER}\n", "\n</tool_call>"
_PROMPT = """\
You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def offered_tools(request: ChatRequest | TokenizeRequest) -> Sequence[Tool]:
    """Those that the model may call. Raises BadRequest for what is no function that can be called."""
    for place, tool in enumerate(request.tools or ()):
        field = f"tools[{place}]"
        if tool.get("type", "function") != "function":
            raise BadRequest(f"Only functions can be called, not {tool['type']!r}.", field=f"{field}.type")
        if not isinstance(function := tool.get("function"), dict):
            raise BadRequest(f"{field}.function is missing.", field=f"{field}.function")
        if not isinstance(name := function.get("name"), str) or not name:
            raise BadRequest("A function has a name.", field=f"{field}.function.name")
        if not isinstance(schema := function.get("parameters"), dict | None):
            raise BadRequest("The parameters are no JSON schema.", field=f"{field}.function.parameters")
        if schema and schema.get("type", "object") != "object":
            raise BadRequest("The parameters are no object.", field=f"{field}.function.parameters.type")
    return () if request.tool_choice == "none" else request.tools or ()


def forced_names(request: ChatRequest | TokenizeRequest) -> Sequence[str]:
    """The functions of which the answer must call one; none if it need not. Raises BadRequest."""
    choice, field = request.tool_choice, "tool_choice"
    if choice in (None, "auto", "none"):
        return ()
    names = [tool["function"]["name"] for tool in offered_tools(request)]
    if choice != "required":
        function = choice.get("function") if isinstance(choice, dict) else None
        if not isinstance(function, dict) or choice.get("type", "function") != "function":
            raise BadRequest(
                'tool_choice is "auto", "none", "required" or '
                '{"type": "function", "function": {"name": ...}}.',
                field=field,
            )
        names = [name for name in names if name == function.get("name")][:1]
    if not names:
        raise BadRequest("tool_choice asks for a call of a function that tools does not have.", field=field)
    return names


# --- for templates that know no tools -----------------------------------------------------------------


def tell_of_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The conversation in plain messages: tools in the system message, calls and their results as text."""
    shown: list[dict[str, Any]] = []
    for last, message in zip([None, *messages], messages, strict=False):
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if last is not None and last["role"] == "tool":  # results of several calls are one turn
                shown[-1]["content"] += "\n" + text
            else:
                shown.append({"role": "user", "content": text})
        else:
            shown.append(_with_calls_as_text(message))
    if tools:
        prompt = _PROMPT.format(tools="\n".join(_json(tool) for tool in tools))
        if shown and shown[0]["role"] == "system":
            shown[0]["content"] = f"{shown[0]['content']}\n\n{prompt}".lstrip()
        else:
            shown.insert(0, {"role": "system", "content": prompt})
    return shown


def _with_calls_as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    shown = dict(message)
    texts = [shown["content"]]
    for call in shown.pop("tool_calls", ()):
        function = call["function"]
        called = {"name": function["name"], "arguments": function["arguments"]}
        texts.append(_BEGIN + _json(called) + _END)
    shown["content"] = "\n".join(filter(None, texts))
    return shown


# --- grammars of answers with calls -------------------------------------------------------------------


def answer_grammar(
    content: Grammar | None,
    tools: Sequence[Tool],
    forced: Collection[str],
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
        return content
    rules = [r"ANY: /(.|\n)*/", r"SPACE: /\n{0,2}/"]
    calls = [
        _call_rule(tool["function"], is_enforced=bool(forced or tool["function"].get("strict")))
        for tool in tools
        if not forced or tool["function"]["name"] in forced
    ]
    call = f'"{_TRIGGER}" call'
    several = call if max_calls == 1 else rf'{call} ("\n" {call})*'
    if forced:
        answer = several
    elif content is None:
        rules.append(f'text[lazy]: ANY "{_TRIGGER}"')
        answer = "(text call)* ANY"
    else:
        answer = f"{several} | content" if calls else "content"
        rules.append(_content_rule(content))
    if calls:
        rules.append(f"call: {' | '.join(calls)}")
    if reasoning:
        rules.append(reasoning)
        answer = f"reasoning SPACE ({answer})"
    return Grammar(kind="lark", text="\n".join([f"start: {answer}", *rules]))


def _call_rule(function: Mapping[str, Any], *, is_enforced: bool) -> str:
    """What follows the trigger in a call of this function."""
    schema = {**(function.get("parameters") or {}), "type": "object"} if is_enforced else {"type": "object"}
    head = _BEGIN.removeprefix(_TRIGGER) + f'{{"name": {_json(function["name"])}, "arguments": '
    return f"{_json(head)} %json {_json({**schema, 'x-guidance': JSON_OPTIONS})} {_json('}' + _END)}"


def _content_rule(content: Grammar) -> str:
    match content.kind:
        case "json_schema":
            schema = msgspec.json.decode(content.text)
            if isinstance(schema, dict):
                schema["x-guidance"] = JSON_OPTIONS
            return f"content: %json {_json(schema)}"
        case "regex":
            return "content: /" + re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", content.text) + "/"
        case "lark":  # as the gateway writes them
            return "content: " + content.text.removeprefix("start: ")
        case _:
            raise BadRequest(
                "A grammar can't be kept to beside tools or reasoning.", field="structured_outputs"
            )


def _json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise BadRequest("Tools or calls are nested too deeply.", field="tools") from None
