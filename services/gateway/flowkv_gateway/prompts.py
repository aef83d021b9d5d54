"""Requests to prompts: lists of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from flowkv_common.errors import BadRequest
from flowkv_gateway.chat_template import Conversation
from flowkv_gateway.messages import ChatMessage, for_template
from flowkv_gateway.params import MAX_CHOICES, ChatRequest, CompletionRequest, TokenizeRequest
from flowkv_gateway.tokenizer import Tokenizer

T = TypeVar("T")


async def chat_prompt(request: ChatRequest, tokenizer: Tokenizer) -> list[int]:
    """Raises BadRequest if the model's template refuses the messages."""
    conversation = _conversation(request, request.messages)
    return await tokenizer.encode_chat(conversation, add_special_tokens=bool(request.add_special_tokens))


async def completion_prompts(request: CompletionRequest, tokenizer: Tokenizer) -> list[list[int]]:
    """One prompt or several: a text, token ids, a list of texts or a list of lists of token ids."""
    prompt, adds_special = request.prompt, request.add_special_tokens is not False
    if isinstance(prompt, str):
        return await tokenizer.encode([prompt], add_special_tokens=adds_special)
    if not prompt:
        raise BadRequest("prompt must not be empty.", field="prompt")
    if token_ids := _only(int, prompt):
        return [token_ids]
    if len(prompt) > MAX_CHOICES:
        raise BadRequest(f"There are over {MAX_CHOICES} prompts.", field="prompt")
    if texts := _only(str, prompt):
        return await tokenizer.encode(texts, add_special_tokens=adds_special)
    if lists := _only(list, prompt):
        return lists
    raise BadRequest("prompt mixes texts, token ids and lists.", field="prompt")


def _only(kind: type[T], items: Sequence[object]) -> list[T]:
    """The items if all of them are of this kind, else nothing."""
    same = [item for item in items if isinstance(item, kind)]
    return same if len(same) == len(items) else []


async def tokenize_prompt(request: TokenizeRequest, tokenizer: Tokenizer) -> list[int]:
    if request.messages is not None:
        conversation = _conversation(request, request.messages)
        return await tokenizer.encode_chat(conversation, add_special_tokens=bool(request.add_special_tokens))
    adds_special = request.add_special_tokens is not False
    [token_ids] = await tokenizer.encode([request.prompt or ""], add_special_tokens=adds_special)
    return token_ids


def _conversation(request: ChatRequest | TokenizeRequest, messages: Sequence[ChatMessage]) -> Conversation:
    return Conversation(
        for_template(messages),
        # Templates ask whether there are any in their own ways: `is not none` is one of them.
        tools=None if request.tool_choice == "none" else request.tools or None,
        documents=request.documents or None,
        template_kwargs=request.chat_template_kwargs or {},
        add_generation_prompt=request.add_generation_prompt is not False,
        continue_final_message=bool(request.continue_final_message),
    )
