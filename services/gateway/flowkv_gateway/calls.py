"""Tools and the calls of them: what a request may offer, and how calls are asked for and forced.

A model writes calls as its chat template taught it, and a parser reads them. Where a template knows no tools,
they are in the form of Hermes: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flowkv_common.errors import BadRequest

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


def check_tools(tools: Sequence[Tool] | None) -> None:
    """Raises BadRequest for what is no function that can be called."""
    for place, tool in enumerate(tools or ()):
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


# --- for templates that know no tools -----------------------------------------------------------------


def tell_of_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The conversation in plain messages: tools in the system message, calls and their results as text."""
    shown = [_without_calls(message) for message in messages]
    if tools:
        prompt = _PROMPT.format(tools="\n".join(_json(tool) for tool in tools))
        if shown and shown[0]["role"] == "system":
            shown[0]["content"] = f"{shown[0]['content']}\n\n{prompt}".lstrip()
        else:
            shown.insert(0, {"role": "system", "content": prompt})
    merged: list[dict[str, Any]] = []
    for message in shown:  # results of several calls are one turn
        if message.pop("is_result", False):
            if merged and merged[-1].get("has_results"):
                merged[-1]["content"] += "\n" + message["content"]
                continue
            message["has_results"] = True
        merged.append(message)
    for message in merged:
        message.pop("has_results", None)
    return merged


def _without_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    shown = dict(message)
    if shown["role"] == "tool":
        text = f"<tool_response>\n{shown['content']}\n</tool_response>"
        return {"role": "user", "content": text, "is_result": True}
    if calls := shown.pop("tool_calls", None):
        texts = [_BEGIN + _json(_call(call["function"])) + _END for call in calls]
        shown["content"] = "\n".join(filter(None, (shown["content"], *texts)))
    return shown


def _call(function: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": function["name"], "arguments": function["arguments"]}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
