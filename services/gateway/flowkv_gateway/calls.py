"""Tools of a request, and how a model is told of them whose chat template knows none.

It gets them, and the history's calls, in the form of Hermes: `<tool_call>{"name": ..., "arguments": {...}}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flowkv_common.errors import BadRequest
from flowkv_gateway.schemas import ChatRequest, TokenizeRequest

Tool = Mapping[str, Any]

_BEGIN, _END = "<tool_call>\n", "\n</tool_call>"
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
        if not isinstance(function.get("strict"), bool | None):
            raise BadRequest("strict is true or false.", field=f"{field}.function.strict")
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
        prompt = _PROMPT.format(tools="\n".join(in_json(tool) for tool in tools))
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
        texts.append(_BEGIN + in_json(called) + _END)
    shown["content"] = "\n".join(filter(None, texts))
    return shown


def in_json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise BadRequest("Tools or calls are nested too deeply.", field="tools") from None
