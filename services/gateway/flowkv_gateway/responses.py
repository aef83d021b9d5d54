"""The body of OpenAI's Responses, and the chat that it asks for.

Items are read with patience, as a chat's messages are: what an answer once held can be sent again. What would
be lost (an image), or belongs to a tool that runs on a server (a web search), is refused by its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any

from flowkv_common.errors import BadRequest
from flowkv_gateway.schemas import (
    ChatMessage,
    ChatRequest,
    ContentPart,
    FunctionCall,
    FunctionTool,
    GenerationRequest,
    InputItem,
    JsonSchemaFormat,
    ResponseFormat,
    ResponseRequest,
    ResponseTool,
    TextConfig,
    ToolCall,
)

FIELD_NAMES = {
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "messages": "input",
}
"""What a chat calls fields, and what they are called here."""

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "reasoning_text", "summary_text")


def input_items(request: ResponseRequest) -> list[InputItem]:
    if isinstance(request.input, str):
        return [InputItem(role="user", content=request.input)]
    return request.input


def as_chat(request: ResponseRequest, items: Sequence[InputItem], num_before: int = 0) -> ChatRequest:
    """Of all `items`, the first `num_before` were not in the request, but in those that it goes on from.

    Raises BadRequest for what can't be shown to a model.
    """
    messages = _conversation(request.instructions, items, -num_before)
    if not messages:
        raise BadRequest("input must not be empty.", field="input")
    verbosity = request.text.verbosity if request.text else None
    if verbosity not in (None, "medium"):
        raise BadRequest(
            "text.verbosity is not supported: models are not told how long to answer.", field="text.verbosity"
        )
    common = {name: getattr(request, name) for name in GenerationRequest.__struct_fields__}
    common["stream_options"] = None  # its streams always have their usage
    return ChatRequest(
        **common,
        messages=messages,
        response_format=_response_format(request.text),
        max_completion_tokens=request.max_output_tokens,
        logprobs=request.shows_logprobs,
        top_logprobs=request.top_logprobs,
        tools=list(_functions(request.tools or ())) or None,
        tool_choice=_tool_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls,
        reasoning_effort=request.reasoning.effort if request.reasoning else None,
        chat_template_kwargs=request.chat_template_kwargs,
    )


# --- the conversation ---------------------------------------------------------------------------------


def _conversation(instructions: str | None, items: Iterable[InputItem], first: int) -> list[ChatMessage]:
    """The items as turns. In errors they count from `first`.

    Reasoning, text and calls of the assistant that follow each other are one turn. So are instructions and
    what systems and developers say at the beginning: many templates take one system message.
    """
    said = [turn for place, item in enumerate(items, first) if (turn := _turn(item, f"input[{place}]"))]
    leading = list(takewhile(lambda turn: turn.role == "system", said))
    system: list[ContentPart | str] = [instructions] if instructions else []
    for turn in leading:
        system += turn.content or ()
    turns = [ChatMessage("system", system)] if system else []
    for turn in said[len(leading) :]:
        if turns and _goes_on(turns[-1], turn):
            _join(turns[-1], turn)
        else:
            turns.append(turn)
    return turns


def _goes_on(turn: ChatMessage, said: ChatMessage) -> bool:
    """Whether what was `said` belongs to this turn of the assistant: reasoning, then text, then calls."""
    if turn.role != "assistant" or said.role != "assistant":
        return False
    return bool(said.tool_calls) or not (turn.tool_calls or turn.content)


def _join(turn: ChatMessage, said: ChatMessage) -> None:
    reasoning = filter(None, (turn.reasoning_content, said.reasoning_content))
    turn.reasoning_content = "\n".join(reasoning) or None
    turn.content = said.content or turn.content
    turn.tool_calls = [*(turn.tool_calls or ()), *(said.tool_calls or ())]


def _turn(item: InputItem, field: str) -> ChatMessage | None:
    """The item alone; None if it says nothing to a model."""
    kind = item.type or "message"
    if kind == "message":
        if item.role is None:
            raise BadRequest(f"{field}.role is missing.", field=f"{field}.role")
        if item.content is None and item.role != "assistant":
            raise BadRequest(f"{field}.content is missing.", field=f"{field}.content")
        role = "system" if item.role == "developer" else item.role
        return ChatMessage(role, [*_texts(item.content, f"{field}.content")])
    if kind == "function_call":
        if not item.name:
            raise BadRequest("A function has a name.", field=f"{field}.name")
        call = ToolCall(FunctionCall(flat_name(item.namespace, item.name), item.arguments), item.call_id)
        return ChatMessage("assistant", tool_calls=[call])
    if kind == "function_call_output":
        if item.output is None:
            raise BadRequest(f"{field}.output is missing.", field=f"{field}.output")
        return ChatMessage("tool", [*_texts(item.output, f"{field}.output")], tool_call_id=item.call_id)
    if kind == "reasoning":  # what is encrypted, nobody here can read
        texts = _texts(item.content, f"{field}.content") or _texts(item.summary, f"{field}.summary")
        return ChatMessage("assistant", reasoning_content="\n".join(texts)) if texts else None
    raise BadRequest(
        f"Only messages, function calls, their outputs and reasoning can be read, not {kind!r}.",
        field=f"{field}.type",
    )


def _texts(content: str | Sequence[ContentPart | str] | None, field: str) -> list[str]:
    if isinstance(content, str):
        return [content]
    texts = []
    for at, part in enumerate(content or ()):
        if isinstance(part, str):
            texts.append(part)
            continue
        if part.type not in _TEXT_PARTS:
            raise BadRequest(f"Only text can be read, not {part.type!r}.", field=f"{field}[{at}].type")
        if part.shown is None:
            raise BadRequest("The part has no text.", field=f"{field}[{at}].text")
        texts.append(part.shown)
    return texts


# --- what else is asked for ---------------------------------------------------------------------------


def flat_name(namespace: str | None, name: str) -> str:
    """What a function is called in a chat, which knows no namespaces."""
    return f"{namespace}__{name}" if namespace else name


def _functions(tools: Iterable[ResponseTool]) -> Iterator[dict[str, Any]]:
    """Of all tools, as templates know them. The description of a namespace is in front of its functions'."""
    for place, tool in enumerate(tools):
        field = f"tools[{place}]"
        if tool.type != "namespace":
            yield _function(tool, field)
            continue
        for at, inner in enumerate(tool.tools or ()):
            function = _function(inner, f"{field}.tools[{at}]")
            function["function"]["name"] = flat_name(tool.name, inner.name or "")
            described = "\n".join(filter(None, (tool.description, inner.description)))
            yield {**function, "function": {**function["function"], "description": described}}


def _function(tool: FunctionTool, field: str) -> dict[str, Any]:
    if tool.type != "function":
        raise BadRequest(f"Only functions can be called, not {tool.type!r}.", field=f"{field}.type")
    if not tool.name:
        raise BadRequest("A function has a name.", field=f"{field}.name")
    if tool.parameters and tool.parameters.get("type", "object") != "object":
        raise BadRequest("The parameters are no object.", field=f"{field}.parameters.type")
    names = ("name", "description", "parameters", "strict")
    function = {name: value for name in names if (value := getattr(tool, name)) is not None}
    return {"type": "function", "function": function}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("name"), str):
        return {"type": "function", "function": {"name": choice["name"]}}
    if choice not in (None, "auto", "none", "required"):
        raise BadRequest(
            'tool_choice is "auto", "none", "required" or {"type": "function", "name": ...}.',
            field="tool_choice",
        )
    return choice


def _response_format(text: TextConfig | None) -> ResponseFormat | None:
    asked = text.format if text else None
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return ResponseFormat(type="json_object")
    if asked.schema is None:
        raise BadRequest("The schema is missing.", field="text.format.schema")
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(asked.schema))
