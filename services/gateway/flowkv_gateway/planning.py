"""A request and its prompts to the generations that answer it. Pure: draws no seed, reads no clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flowkv_common.errors import BadRequest
from flowkv_common.wire.parts import ModelCard, SamplingParams
from flowkv_gateway.errors import ContextLengthExceeded
from flowkv_gateway.generation import Generation
from flowkv_gateway.params import MAX_CHOICES, ChatRequest, CompletionRequest

_COMPLETION_MAX_TOKENS = 16  # OpenAI's default
_GREEDY_BELOW = 1e-5  # dividing logits by less than this overflows
_LEAST_TOP_P = 1e-9  # 0 would leave no token; this leaves the best one

Prompt = list[int]


def plan(
    request: ChatRequest | CompletionRequest,
    prompts: Sequence[Prompt],
    card: ModelCard,
    *,
    request_id: str,
    seed: int,
    deadline_s: float,
) -> list[list[Generation]]:
    """One group per prompt; the `n` of a group differ in their ids and seeds (`seed + i`) alone.

    `seed` is used where the request has none. Raises BadRequest for what does not fit the model.
    """
    num_samples = request.n or 1
    if not 1 <= len(prompts) * num_samples <= MAX_CHOICES:
        raise BadRequest(f"n times the number of prompts is over {MAX_CHOICES}.", field="n")
    base = seed if request.seed is None else request.seed
    is_alone = len(prompts) * num_samples == 1
    groups = []
    for place, prompt in enumerate(prompts):
        max_tokens = _max_tokens(request, prompt, card)
        group = [
            Generation(
                request_id=request_id if is_alone else f"{request_id}-{place * num_samples + i}",
                prompt_ids=prompt,
                sampling=_sampling(request, card, max_tokens, _as_int64(base + i)),
                deadline_s=deadline_s,
                priority=request.priority or 0,
                fingerprint=card.fingerprint,
            )
            for i in range(num_samples)
        ]
        groups.append(group)
    return groups


def _max_tokens(request: ChatRequest | CompletionRequest, prompt: Prompt, card: ModelCard) -> int:
    """How long the answer may be. Raises ContextLengthExceeded if it can't be that long."""
    field = "messages" if isinstance(request, ChatRequest) else "prompt"
    if not prompt:
        raise BadRequest("The prompt has no tokens.", field=field)
    room = card.max_model_len - len(prompt)
    context = f"The model's context is {card.max_model_len} tokens and the prompt has {len(prompt)}"
    if room < 1:
        raise ContextLengthExceeded(f"{context}.", field=field)
    _check_ids(prompt, card, field)
    wanted, name = request.max_tokens, "max_tokens"
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        wanted, name = request.max_completion_tokens, "max_completion_tokens"
    if wanted is None:
        return room if isinstance(request, ChatRequest) else min(room, _COMPLETION_MAX_TOKENS)
    if wanted > room:
        raise ContextLengthExceeded(f"{context}: {name}={wanted} does not fit.", field=name)
    return wanted


def _sampling(
    request: ChatRequest | CompletionRequest, card: ModelCard, max_tokens: int, seed: int
) -> SamplingParams:
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise BadRequest(f"min_tokens is over max_tokens, {max_tokens}.", field="min_tokens")
    bias = request.logit_bias or {}
    _check_ids(bias, card, "logit_bias")
    temperature = _or(request.temperature, 1.0)
    return SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        temperature=temperature if temperature >= _GREEDY_BELOW else 0.0,
        top_p=max(_or(request.top_p, 1.0), _LEAST_TOP_P),
        top_k=max(request.top_k or 0, 0),
        min_p=request.min_p or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        logit_bias=bias,
        min_tokens=min_tokens,
        ignore_eos=bool(request.ignore_eos),
        num_logprobs=request.num_logprobs,
    )


def _check_ids(token_ids: Iterable[int], card: ModelCard, field: str) -> None:
    if not all(0 <= token_id < card.vocab_size for token_id in token_ids):
        raise BadRequest(f"A token id is not in the vocabulary of {card.vocab_size}.", field=field)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _as_int64(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63
