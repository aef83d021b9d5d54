"""The messages of a chat: what may stand in them, and how a template gets them.

A history is sent again and again, with all that this or another server once answered. So it is read with
patience: what says nothing counts as empty, older forms as their newer ones, and arguments that a model once
wrote wrongly as none. What would be lost (an image), or can't have been an answer, is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from flowkv_common.errors import BadRequest

log = logging.getLogger(__name__)

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_ROLES = {"developer": "system", "function": "tool"}  # names that no template knows, and those that all know
_MAY_BE_EMPTY = ("assistant", "tool", "function")


class ContentPart(msgspec.Struct):
    type: str
    text: str | None = None
    refusal: str | None = None

    @property
    def shown(self) -> str | None:
        return self.refusal if self.type == "refusal" else self.text


class FunctionCall(msgspec.Struct):
    name: str
    arguments: Any = None


class ToolCall(msgspec.Struct):
    function: FunctionCall
    id: str | None = None
    type: str = "function"


class ChatMessage(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart | str] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None  # what `tool_calls` replaced
    refusal: str | None = None  # instead of content
    reasoning_content: str | None = None


def check_messages(messages: list[ChatMessage]) -> None:
    """Raises BadRequest when there is nothing to render, or what can't be."""
    if not messages:
        raise BadRequest("messages must not be empty.", field="messages")
    for place, message in enumerate(messages):
        field = f"messages[{place}].content"
        if message.content is None and message.role not in _MAY_BE_EMPTY:
            raise BadRequest(f"{field} is missing.", field=field)
        for at, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if isinstance(part, str):
                continue
            if part.type not in _TEXT_PARTS:
                raise BadRequest(f"Only text can be read, not {part.type!r}.", field=f"{field}[{at}].type")
            if part.shown is None:
                raise BadRequest("The part has no text.", field=f"{field}[{at}].text")


def for_template(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Checked messages as templates expect them: plain text, arguments of tool calls as objects."""
    return [_for_template(message, place) for place, message in enumerate(messages)]


def _for_template(message: ChatMessage, place: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": _ROLES.get(message.role, message.role), "content": _text(message)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            fields[name] = value
    calls = message.tool_calls or []
    if not calls and message.function_call is not None:
        calls = [ToolCall(message.function_call)]
    if calls:  # templates take an empty list for a turn that only calls tools
        fields["tool_calls"] = [
            _call(call, f"messages[{place}].tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    return fields


def _text(message: ChatMessage) -> str:
    """Few templates know a null or parts."""
    if isinstance(message.content, list):
        return "\n".join(part if isinstance(part, str) else part.shown or "" for part in message.content)
    return message.content or message.refusal or ""


def _call(call: ToolCall, field: str) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(call)
    fields["function"]["arguments"] = _arguments(call.function.arguments, field)
    return fields


def _arguments(arguments: Any, field: str) -> dict[str, Any]:
    """The object in `arguments`. A model wrote it: were it refused, the chat could never go on."""
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}")
        except (msgspec.DecodeError, RecursionError):
            arguments = None
    if isinstance(arguments, dict):
        return arguments
    log.warning("%s: the arguments are no JSON object, they are left out", field)
    return {}
