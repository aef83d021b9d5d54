"""Requests to prompts: lists of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from flowkv_common.errors import BadRequest
from flowkv_gateway.params import MAX_CHOICES, ChatMessage, ChatRequest, CompletionRequest, TokenizeRequest
from flowkv_gateway.tokenizer import Tokenizer

T = TypeVar("T")


async def chat_prompt(request: ChatRequest, tokenizer: Tokenizer) -> list[int]:
    """Raises BadRequest if the model's template refuses the messages."""
    tools = None if request.tool_choice == "none" else request.tools
    return await tokenizer.encode_chat(_for_template(request.messages), tools)


async def completion_prompts(request: CompletionRequest, tokenizer: Tokenizer) -> list[list[int]]:
    """One prompt or several: a text, token ids, a list of texts or a list of lists of token ids."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return await tokenizer.encode([prompt])
    if not prompt:
        raise BadRequest("prompt must not be empty.", field="prompt")
    if token_ids := _only(int, prompt):
        return [token_ids]
    if len(prompt) > MAX_CHOICES:
        raise BadRequest(f"There are over {MAX_CHOICES} prompts.", field="prompt")
    if texts := _only(str, prompt):
        return await tokenizer.encode(texts)
    if lists := _only(list, prompt):
        return lists
    raise BadRequest("prompt mixes texts, token ids and lists.", field="prompt")


def _only(kind: type[T], items: Sequence[object]) -> list[T]:
    """The items if all of them are of this kind, else nothing."""
    same = [item for item in items if isinstance(item, kind)]
    return same if len(same) == len(items) else []


async def tokenize_prompt(request: TokenizeRequest, tokenizer: Tokenizer) -> list[int]:
    if request.messages is not None:
        return await tokenizer.encode_chat(
            _for_template(request.messages),
            request.tools,
            add_generation_prompt=request.add_generation_prompt,
        )
    text = request.prompt or ""
    [token_ids] = await tokenizer.encode([text], add_special_tokens=request.add_special_tokens)
    return token_ids


def _for_template(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as templates expect them: plain text, arguments of tool calls as objects."""
    rendered = []
    for place, message in enumerate(messages):
        fields: dict[str, Any] = msgspec.to_builtins(message)
        if message.role == "developer":  # OpenAI's newer name; no template knows it
            fields["role"] = "system"
        if isinstance(message.content, list):
            fields["content"] = "\n".join(part.text or "" for part in message.content)
        fields.setdefault("content", "")  # tool calls alone; few templates know a null
        for call in fields.get("tool_calls", ()):
            function = call["function"]
            function["arguments"] = _arguments(function["arguments"], place)
        rendered.append(fields)
    return rendered


def _arguments(arguments: str | dict[str, Any], place: int) -> dict[str, Any]:
    if isinstance(arguments, dict):
        return arguments
    try:
        return msgspec.json.decode(arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        field = f"messages[{place}].tool_calls"
        raise BadRequest("The arguments of a tool call are not a JSON object.", field=field) from None
