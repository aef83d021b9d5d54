"""The body of Anthropic's Messages, and the chat that it asks for.

It is read with patience, as a chat's is: what an answer once held can be sent again. What would be lost (an
image), or is done by a server (a web search), is refused by its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby, takewhile
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from flowkv_common.errors import BadRequest
from flowkv_gateway.schemas import (
    Body,
    ChatMessage,
    ChatRequest,
    FunctionCall,
    JsonSchemaFormat,
    PositiveCount,
    ResponseFormat,
    Share,
    StopString,
    ToolCall,
    TopK,
)

# A line that Claude Code puts first, another one with each request: no prefix would be found in the cache.
_BILLING = "x-anthropic-billing-header"
# How clients of this API mark what no person has typed, in the turn of a user.
_REMINDER = "<system-reminder>\n{}\n</system-reminder>"


class MessageBlock(msgspec.Struct):
    """A part of a message. Its `type` says which of the other fields it has."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: Any = None
    tool_use_id: str | None = None
    content: str | list[MessageBlock] | None = None
    is_error: bool | None = None


Content = str | list[MessageBlock]


class InputMessage(msgspec.Struct):
    role: Literal["user", "assistant", "system"]
    content: Content


class CustomTool(msgspec.Struct):
    name: Annotated[str, Meta(min_length=1)]
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    strict: bool | None = None


class MessageToolChoice(msgspec.Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct):
    """How long it takes is for the model to decide: `budget_tokens` changes nothing."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: PositiveCount | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(msgspec.Struct):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct):
    effort: str | None = None
    format: OutputFormat | None = None


class MessageMetadata(msgspec.Struct):
    user_id: str | None = None


_REFUSED = {
    "mcp_servers": "tools are called by the client",
    "container": "nothing is run here",
}


class CountTokensRequest(Body, kw_only=True):
    """Body of `POST /v1/messages/count_tokens`."""

    messages: list[InputMessage]
    system: Content | None = None
    tools: list[CustomTool] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # what `output_config.format` replaced
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's
    mcp_servers: Any = None
    container: Any = None

    def __post_init__(self) -> None:
        for name, reason in _REFUSED.items():
            if getattr(self, name):
                raise BadRequest(f"{name} is not supported: {reason}.", field=name)


class MessagesRequest(CountTokensRequest, kw_only=True):
    """Body of `POST /v1/messages`."""

    max_tokens: PositiveCount
    stream: bool | None = None
    stop_sequences: Annotated[list[StopString], Meta(max_length=16)] | None = None
    temperature: Share | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    service_tier: str | None = None  # there is one: `standard`
    metadata: MessageMetadata | None = None  # for the log


# What a chat calls fields of ours, where one of them is wrong.
FIELD_NAMES = {
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
    "continue_final_message": "messages",
}


def as_chat(request: CountTokensRequest) -> ChatRequest:
    """Raises BadRequest for what can't be shown to a model."""
    if not (messages := list(_conversation(request))):
        raise BadRequest("messages must not be empty.", field="messages")
    thinking, config, choice = request.thinking, request.output_config, request.tool_choice
    is_continued = messages[-1].role == "assistant"
    if is_continued and messages[-1].tool_calls:
        raise BadRequest("The last message has calls: their results come next.", field="messages")
    chat = ChatRequest(
        model=request.model,
        messages=messages,
        tools=[_function(tool, f"tools[{place}]") for place, tool in enumerate(request.tools or ())] or None,
        tool_choice=_tool_choice(choice),
        parallel_tool_calls=False if choice and choice.disable_parallel_tool_use else None,
        response_format=_response_format(request),
        reasoning_effort=config.effort if config else None,
        include_reasoning=False if thinking and thinking.display == "omitted" else None,
        enable_thinking=thinking.type != "disabled" if thinking else None,
        chat_template_kwargs=request.chat_template_kwargs,
        continue_final_message=is_continued,
        add_generation_prompt=not is_continued,
    )
    if isinstance(request, MessagesRequest):
        chat.max_tokens = request.max_tokens
        chat.stream = request.stream
        chat.stop = request.stop_sequences
        chat.temperature = request.temperature
        chat.top_p = request.top_p
        chat.top_k = request.top_k
        chat.user = request.metadata.user_id if request.metadata else None
    return chat


# --- the conversation ---------------------------------------------------------------------------------


class _Said(NamedTuple):
    """One block of a message. `field` is what an error calls it."""

    role: str
    field: str
    block: MessageBlock


def _conversation(request: CountTokensRequest) -> Iterator[ChatMessage]:
    """In turns as models know them: messages of one role that follow each other are one.

    Templates take one system message, at the beginning. A later one stands at the end of the turn before it:
    it comes with each request, and a prompt that changed at its beginning would be computed again.
    """
    said = list(_said(request.messages))
    leading = list(takewhile(lambda one: one.role == "system", said))
    system = [*_texts(request.system, "system"), *(_text(one.block, one.field) for one in leading)]
    system = [text for text in system if not text.startswith(_BILLING)]
    if system:
        yield ChatMessage("system", [*system])
    turns = groupby(said[len(leading) :], key=lambda one: one.role == "assistant")
    for is_assistant, turn in turns:
        if is_assistant:
            yield _assistant(turn)
        else:
            yield from _user(turn)


def _said(messages: Iterable[InputMessage]) -> Iterator[_Said]:
    for place, message in enumerate(messages):
        field = f"messages[{place}].content"
        if isinstance(message.content, str):
            yield _Said(message.role, field, MessageBlock("text", text=message.content))
        else:
            for at, block in enumerate(message.content):
                yield _Said(message.role, f"{field}[{at}]", block)


def _assistant(turn: Iterable[_Said]) -> ChatMessage:
    texts, thoughts, calls = [], [], []
    for _, field, block in turn:
        if block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type == "tool_use":
            if not block.name:
                raise BadRequest(f"{field}.name is missing.", field=f"{field}.name")
            calls.append(ToolCall(FunctionCall(block.name, block.input), block.id))
        elif block.type != "redacted_thinking":  # nobody can read it
            texts.append(_text(block, field))
    return ChatMessage(
        "assistant", [*texts], tool_calls=calls, reasoning_content="\n".join(filter(None, thoughts))
    )


def _user(turn: Iterable[_Said]) -> Iterator[ChatMessage]:
    """Results of calls come first: they answer the turn before."""
    results: list[tuple[str, list[str]]] = []
    texts: list[str] = []
    for role, field, block in turn:
        if block.type == "tool_result" and role == "user":
            results.append(_result(block, field))
        elif role == "user":
            texts.append(_text(block, field))
        else:
            # Not as a turn after results: many templates show no reasoning from before a user's last turn.
            shown = results[-1][1] if results and not texts else texts
            shown.append(_REMINDER.format(_text(block, field)))
    for call_id, shown in results:
        yield ChatMessage("tool", [*shown], tool_call_id=call_id)
    if texts or not results:
        yield ChatMessage("user", [*texts])


def _result(block: MessageBlock, field: str) -> tuple[str, list[str]]:
    """The id of a call and what it gave."""
    if block.tool_use_id is None:
        raise BadRequest(f"{field}.tool_use_id is missing.", field=f"{field}.tool_use_id")
    texts = _texts(block.content, f"{field}.content")
    return block.tool_use_id, ["Error:", *texts] if block.is_error else texts


def _texts(content: Content | None, field: str) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [_text(block, f"{field}[{place}]") for place, block in enumerate(content or ())]


def _text(block: MessageBlock, field: str) -> str:
    if block.type != "text":
        raise BadRequest(f"Only text can be read here, not {block.type!r}.", field=f"{field}.type")
    if block.text is None:
        raise BadRequest("The block has no text.", field=f"{field}.text")
    return block.text


# --- what else is asked for ---------------------------------------------------------------------------


def _function(tool: CustomTool, field: str) -> dict[str, Any]:
    """The tool as templates know it."""
    if tool.type not in (None, "custom"):
        raise BadRequest(
            f"Only custom tools can be called: {tool.type!r} is run by another server.", field=f"{field}.type"
        )
    if tool.input_schema is None:
        raise BadRequest(f"{field}.input_schema is missing.", field=f"{field}.input_schema")
    if tool.input_schema.get("type", "object") != "object":
        raise BadRequest("The input is no object.", field=f"{field}.input_schema.type")
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.input_schema
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(choice: MessageToolChoice | None) -> Any:
    if choice is None or choice.type in ("auto", "none"):
        return choice and choice.type
    if choice.type == "any":
        return "required"
    if not choice.name:
        raise BadRequest("tool_choice.name is missing.", field="tool_choice.name")
    return {"type": "function", "function": {"name": choice.name}}


def _response_format(request: CountTokensRequest) -> ResponseFormat | None:
    formats = [request.output_config.format if request.output_config else None, request.output_format]
    wanted = [one for one in formats if one is not None]
    if len(wanted) > 1:
        raise BadRequest("output_config.format has replaced output_format: give one.", field="output_format")
    if not wanted:
        return None
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(wanted[0].schema))
