"""A request and its prompts to the generations that answer it. Pure: draws no seed, reads no clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from flowkv_common.errors import BadRequest
from flowkv_common.wire.messages import ModelCard, SamplingParams
from flowkv_gateway.dispatch import Generation
from flowkv_gateway.http import ContextLengthExceeded
from flowkv_gateway.messages import ChatMessage, for_template
from flowkv_gateway.schemas import (
    MAX_CHOICES,
    ChatRequest,
    CompletionRequest,
    SamplingDefaults,
    TokenizeRequest,
)
from flowkv_gateway.tokenizer import Conversation, Tokenizer

_COMPLETION_MAX_TOKENS = 16  # OpenAI's default
_GREEDY_BELOW = 1e-5  # dividing logits by less than this overflows
_LEAST_TOP_P = 1e-9  # 0 would leave no token; this leaves the best one

Prompt = list[int]
N = TypeVar("N", int, float)


def plan(
    request: ChatRequest | CompletionRequest,
    prompts: Sequence[Prompt],
    card: ModelCard,
    defaults: SamplingDefaults,
    *,
    request_id: str,
    seed: int,
    deadline_s: float,
) -> list[list[Generation]]:
    """One group per prompt; the `n` of a group differ in their ids and seeds (`seed + i`) alone.

    `seed` is used where the request has none, or -1. Raises BadRequest for what does not fit the model.
    """
    num_samples = request.n or 1
    if not 1 <= len(prompts) * num_samples <= MAX_CHOICES:
        raise BadRequest(f"n times the number of prompts is over {MAX_CHOICES}.", field="n")
    base = seed if request.seed is None or request.seed == -1 else request.seed
    is_alone = len(prompts) * num_samples == 1
    groups = []
    for place, prompt in enumerate(prompts):
        max_tokens = _max_tokens(request, prompt, card)
        group = [
            Generation(
                request_id=request_id if is_alone else f"{request_id}-{place * num_samples + i}",
                prompt_ids=prompt,
                sampling=_sampling(request, card, defaults, max_tokens, _as_int64(base + i)),
                deadline_s=deadline_s,
                priority=request.priority or 0,
                fingerprint=card.fingerprint,
            )
            for i in range(num_samples)
        ]
        groups.append(group)
    return groups


def _max_tokens(request: ChatRequest | CompletionRequest, prompt: Prompt, card: ModelCard) -> int:
    """How long the answer may be: as long as there is room. Raises ContextLengthExceeded if there is none."""
    field = "messages" if isinstance(request, ChatRequest) else "prompt"
    if not prompt:
        raise BadRequest("The prompt has no tokens.", field=field)
    room = card.max_model_len - len(prompt)
    if room < 1:
        # Clients find out by these words that they must shorten the history.
        raise ContextLengthExceeded(
            f"This model's maximum context length is {card.max_model_len} tokens. However, your {field} "
            f"resulted in {len(prompt)} tokens, and an answer needs one more. Make the {field} shorter.",
            field=field,
        )
    _check_ids(prompt, card, field)
    wanted = request.max_tokens
    if isinstance(request, ChatRequest):
        wanted = request.max_completion_tokens or wanted or room
    return min(wanted or _COMPLETION_MAX_TOKENS, room)


def _sampling(
    request: ChatRequest | CompletionRequest,
    card: ModelCard,
    defaults: SamplingDefaults,
    max_tokens: int,
    seed: int,
) -> SamplingParams:
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise BadRequest(
            f"min_tokens, {min_tokens}, is over what this answer may have, {max_tokens} tokens: that is "
            f"max_tokens or, if less, what the prompt leaves of the model's {card.max_model_len} tokens.",
            field="min_tokens",
        )
    bias = request.logit_bias if isinstance(request.logit_bias, dict) else {}
    _check_ids(bias, card, "logit_bias")
    stop_token_ids = request.stop_token_ids or []
    _check_ids(stop_token_ids, card, "stop_token_ids")
    temperature = _first(request.temperature, defaults.temperature, 1.0)
    return SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        temperature=temperature if temperature >= _GREEDY_BELOW else 0.0,
        top_p=max(_first(request.top_p, defaults.top_p, 1.0), _LEAST_TOP_P),
        top_k=max(_first(request.top_k, defaults.top_k, 0), 0),
        min_p=_first(request.min_p, defaults.min_p, 0.0),
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
        logit_bias=bias,
        min_tokens=min_tokens,
        ignore_eos=bool(request.ignore_eos),
        stop_token_ids=stop_token_ids,
        num_logprobs=request.num_logprobs,
    )


def _check_ids(token_ids: Iterable[int], card: ModelCard, field: str) -> None:
    if not all(0 <= token_id < card.vocab_size for token_id in token_ids):
        raise BadRequest(f"A token id is not in the vocabulary of {card.vocab_size}.", field=field)


def _first(asked: N | None, default: N | None, neutral: N) -> N:
    """What the request says, else the model, else what changes nothing."""
    return asked if asked is not None else default if default is not None else neutral


def _as_int64(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


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
