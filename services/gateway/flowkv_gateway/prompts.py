"""A request to prompts, and each prompt to the generations that answer it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

import msgspec

from flowkv_common.errors import BadRequest, CannotStart
from flowkv_common.wire.messages import GREEDY_BELOW, Grammar, ModelCard, SamplingParams
from flowkv_gateway.errors import ContextLengthExceeded
from flowkv_gateway.request_state import NO_GOALS, RequestState, ServiceGoals
from flowkv_gateway.schemas import (
    MAX_CHOICES,
    ChatRequest,
    CompletionRequest,
    RepetitionPenalty,
    Share,
    Temperature,
    TopK,
)
from flowkv_gateway.tenants import Tenant
from flowkv_gateway.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_COMPLETION_MAX_TOKENS = 16  # OpenAI's default
# In an answer, best tokens included: while it is made they take some 200 MB here.
_MAX_PROMPT_LOGPROBS = 1_000_000
_LEAST_TOP_P = 1e-9  # 0 would leave no token; this leaves the best one
_MAX_GOAL_MS = 3_600_000  # an hour: what is longer was meant in another unit
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")

N = TypeVar("N", int, float)


class SamplingDefaults(msgspec.Struct, frozen=True):
    """Of generation_config.json, what requests can set as well. None: the file does not say.

    `do_sample` is ignored, as in vLLM: a request for greedy decoding sets a temperature of 0.
    """

    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    repetition_penalty: RepetitionPenalty | None = None


def load_sampling_defaults(folder: Path, generation_config: str) -> SamplingDefaults:
    """Those of the model in `folder`, and a line in the log; none if `generation_config` is "none".

    Raises CannotStart for a file that can't be used.
    """
    file = folder / "generation_config.json"
    if generation_config == "none" or not file.exists():
        return SamplingDefaults()
    try:
        defaults = msgspec.json.decode(file.read_bytes(), type=SamplingDefaults, strict=False)
    except msgspec.DecodeError as error:
        raise CannotStart(f"{file}: {error}; FLOWKV_GENERATION_CONFIG=none leaves it out") from None
    given = {name: value for name, value in msgspec.structs.asdict(defaults).items() if value is not None}
    if given:
        log.info("where a request is silent, %s applies: %s", file.name, given)
    return defaults


# --- prompts ------------------------------------------------------------------------------------------


async def completion_prompts(request: CompletionRequest, tokenizer: Tokenizer) -> list[list[int]]:
    """One prompt or several: a text, token ids, a list of texts or a list of lists of token ids."""
    items = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    kinds = {type(item) for item in items}
    if kinds == {int}:
        return [cast("list[int]", items)]
    if len(items) > MAX_CHOICES:
        raise BadRequest(f"There are over {MAX_CHOICES} prompts.", field="prompt")
    if kinds == {str}:
        adds_special = request.add_special_tokens is not False
        return await tokenizer.encode(cast("list[str]", items), add_special_tokens=adds_special)
    if kinds == {list}:
        return cast("list[list[int]]", items)
    raise BadRequest("prompt mixes texts, token ids and lists.", field="prompt")


async def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Each word's tokens, as it stands at the beginning of a text and after a space."""
    texts = [space + word.lstrip(" ") for word in words for space in ("", " ")]
    encoded = await tokenizer.encode(texts, add_special_tokens=False) if texts else []
    return [list(word) for word in dict.fromkeys(map(tuple, encoded)) if word]


def service_goals(headers: Mapping[str, str]) -> ServiceGoals:
    """What the request's headers ask for. Raises BadRequest, which names the header."""
    wanted = headers.get("x-request-class")
    if wanted not in (None, "batch"):
        raise BadRequest("The only class that can be asked for is batch.", field="x-request-class")
    return ServiceGoals(
        ttft_s=_goal_s(headers, "x-ttft-goal-ms"),
        itl_s=_goal_s(headers, "x-itl-goal-ms"),
        is_batch=wanted == "batch",
    )


def _goal_s(headers: Mapping[str, str], name: str) -> float:
    """0 without the header."""
    if (text := headers.get(name)) is None:
        return 0.0
    if not _NUMBER.fullmatch(text) or not 0.0 < float(text) <= _MAX_GOAL_MS:
        raise BadRequest(f"{name} is not a number over 0 and up to {_MAX_GOAL_MS}.", field=name)
    return float(text) / 1e3


# --- generations --------------------------------------------------------------------------------------


def plan(
    request: ChatRequest | CompletionRequest,
    prompts: Sequence[list[int]],
    card: ModelCard,
    defaults: SamplingDefaults,
    grammar: Grammar | None = None,
    *,
    bad_words: Sequence[list[int]] = (),
    request_id: str,
    seed: int,
    deadline_s: float,
    goals: ServiceGoals = NO_GOALS,
    tenant: Tenant | None = None,
) -> list[list[RequestState]]:
    """One group per prompt; the `n` of a group differ in their ids and seeds (`seed + i`) alone, and only
    the first asks for the log probabilities of the prompt.

    `seed` is used where the request has none, or -1. Raises BadRequest for what does not fit the model.
    """
    num_samples = request.num_samples
    if not 1 <= len(prompts) * num_samples <= MAX_CHOICES:
        field = "n" if num_samples == (request.n or 1) else "best_of"
        raise BadRequest(f"{field} times the number of prompts is over {MAX_CHOICES}.", field=field)
    _check_prompt_logprobs(request, prompts)
    base = seed if request.seed is None or request.seed == -1 else request.seed
    is_alone = len(prompts) * num_samples == 1
    groups = []
    for place, whole_prompt in enumerate(prompts):
        prompt = _truncated(request, whole_prompt, card)
        max_tokens = _max_tokens(request, prompt, card)
        group = [
            RequestState(
                request_id=request_id if is_alone else f"{request_id}-{place * num_samples + i}",
                prompt_ids=prompt,
                sampling=_sampling(
                    request, card, defaults, max_tokens, base + i, grammar, bad_words, is_first=i == 0
                ),
                deadline_s=deadline_s,
                fingerprint=card.fingerprint,
                model_name=card.name,
                priority=request.priority or 0,
                goals=goals,
                tenant=tenant,
            )
            for i in range(num_samples)
        ]
        groups.append(group)
    return groups


def _check_prompt_logprobs(request: ChatRequest | CompletionRequest, prompts: Sequence[list[int]]) -> None:
    num_top = request.num_prompt_logprobs
    if num_top is None:
        return
    num_told = (request.n or 1) if isinstance(request, CompletionRequest) else 1  # a chat tells them once
    if (num_top + 1) * sum(map(len, prompts)) * num_told > _MAX_PROMPT_LOGPROBS:
        raise BadRequest(
            f"A request may ask for {_MAX_PROMPT_LOGPROBS} log probabilities of prompts, in all its choices: "
            "ask for fewer of each token, or send several requests.",
            field="logprobs" if request.prompt_logprobs is None else "prompt_logprobs",
        )


def _truncated(request: ChatRequest | CompletionRequest, prompt: list[int], card: ModelCard) -> list[int]:
    """The last `truncate_prompt_tokens` of the prompt; with -1 as many as leave room for the answer."""
    num_kept = request.truncate_prompt_tokens
    if num_kept is None:
        return prompt
    if num_kept == -1:
        num_kept = max(card.max_model_len - (_wanted_tokens(request) or 1), 1)
    return prompt[-num_kept:]


def _wanted_tokens(request: ChatRequest | CompletionRequest) -> int | None:
    """Of the answer; None for all that there is room for."""
    if isinstance(request, ChatRequest):
        return request.max_completion_tokens or request.max_tokens
    if request.max_tokens == 0:
        return 1  # nodes make it, but it is not shown
    return request.max_tokens or _COMPLETION_MAX_TOKENS


def _max_tokens(request: ChatRequest | CompletionRequest, prompt: list[int], card: ModelCard) -> int:
    """How long the answer may be: as long as there is room. Raises ContextLengthExceeded if there is none."""
    field = "messages" if isinstance(request, ChatRequest) else "prompt"
    if not prompt:
        raise BadRequest("The prompt has no tokens.", field=field)
    room = card.max_model_len - len(prompt)
    if room < 1:
        # By these words clients know that they must shorten the history, Anthropic's by those in brackets.
        raise ContextLengthExceeded(
            f"This model's maximum context length is {card.max_model_len} tokens. However, your {field} "
            f"resulted in {len(prompt)} tokens, and an answer needs one more (prompt is too long: "
            f"{len(prompt)} tokens > {card.max_model_len - 1} maximum). Make the {field} shorter.",
            field=field,
        )
    _check_ids(prompt, card, field)
    return min(_wanted_tokens(request) or room, room)


def _sampling(
    request: ChatRequest | CompletionRequest,
    card: ModelCard,
    defaults: SamplingDefaults,
    max_tokens: int,
    seed: int,
    grammar: Grammar | None,
    bad_words: Sequence[list[int]],
    *,
    is_first: bool,
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
    allowed_token_ids = request.allowed_token_ids or []
    _check_ids(allowed_token_ids, card, "allowed_token_ids")
    temperature = _first(request.temperature, defaults.temperature, 1.0)
    return SamplingParams(
        max_tokens=max_tokens,
        seed=(seed + 2**63) % 2**64 - 2**63,  # within 64 bits
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
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
        grammar=grammar,
        allowed_token_ids=allowed_token_ids,
        bad_words=list(bad_words),
        num_prompt_logprobs=request.num_prompt_logprobs if is_first else None,
    )


def _check_ids(token_ids: Iterable[int], card: ModelCard, field: str) -> None:
    if not all(0 <= token_id < card.vocab_size for token_id in token_ids):
        raise BadRequest(f"A token id is not in the vocabulary of {card.vocab_size}.", field=field)


def _first(asked: N | None, default: N | None, neutral: N) -> N:
    """What the request says, else the model, else what changes nothing."""
    return asked if asked is not None else default if default is not None else neutral
